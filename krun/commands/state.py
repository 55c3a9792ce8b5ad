"""krun state: print a container's state (runtime-spec, runtime.md, "State")."""

from __future__ import annotations

import sys

from krun import engine
from krun.errors import NotFound

TYPE_CHECKING = False
if TYPE_CHECKING:
    from krun.grammar import Call


def run(call: Call) -> int:
    """Print the state as JSON; raises KrunError."""
    root, container, holder = engine.find(call)
    if holder == "native":
        from krun import native, store

        state = native.state(root, container)
        if state["status"] == "creating":
            # Whoever waits for a container by asking for its state starts it once there is one.
            raise NotFound(f"container `{container}` does not exist yet: it is being created")
        sys.stdout.write(store.text(state))
        return 0
    engine.pass_on(call)
