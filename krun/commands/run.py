"""krun run: create, start and wait; its status is the payload's."""

from __future__ import annotations

from krun.commands import create

TYPE_CHECKING = False
if TYPE_CHECKING:
    from krun.grammar import Call


def run(call: Call) -> int:
    """Run a container; crun's run takes the same configuration as its create."""
    return create.run(call)
