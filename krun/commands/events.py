"""krun events: a container's statistics and out-of-memory events."""

from __future__ import annotations

from krun import engine

TYPE_CHECKING = False
if TYPE_CHECKING:
    from krun.grammar import Call


def run(call: Call) -> int:
    """Print events; crun has no such verb, but its containers have the same cgroups.

    Raises KrunError.
    """
    root, container, holder = engine.find(call)
    if holder == "native":
        from krun import native

        return native.events(root, container, call.options["stats"], call.options["interval"])
    from krun import crun, watch

    state = crun.state(root, container)
    return watch.events(root, state, call.options["stats"], call.options["interval"])
