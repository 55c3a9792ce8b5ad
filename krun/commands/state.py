"""krun state: print a container's state (runtime-spec, runtime.md, "State")."""

from __future__ import annotations

import sys

from krun import engine

TYPE_CHECKING = False
if TYPE_CHECKING:
    from krun.grammar import Call


def run(call: Call) -> int:
    """Print the state as JSON; raises KrunError."""
    root, container, holder = engine.find(call)
    if holder == "native":
        from krun import native, store

        sys.stdout.write(store.text(native.state(root, container)))
        return 0
    engine.pass_on(call)
