"""krun events: a container's statistics and out-of-memory events."""

from __future__ import annotations

from krun import engine
from krun.errors import KrunError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from krun.grammar import Call


def run(call: Call) -> int:
    """Print events; raises KrunError."""
    root, container, holder = engine.find(call)
    if holder == "native":
        from krun import native

        return native.events(root, container, call.options["stats"], call.options["interval"])
    raise KrunError("events: crun has no such verb", "create the container with --engine native")
