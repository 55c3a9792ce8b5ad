"""krun ps: the processes of a container."""

from __future__ import annotations

from krun import engine
from krun.errors import BadState

TYPE_CHECKING = False
if TYPE_CHECKING:
    from krun.grammar import Call


def run(call: Call) -> int:
    """Print the processes; raises KrunError."""
    root, container, holder = engine.find(call)
    if holder == "native":
        from krun import native

        return native.ps(root, container, call.options["format"], call.arguments[1:])
    from krun import crun, watch

    try:
        found = watch.pids(crun.state(root, container))
    except BadState:
        # It has stopped: crun crashes, runc lists nothing.
        found = []
    return watch.show(found, call.options["format"], call.arguments[1:])
