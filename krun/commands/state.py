"""krun state: print a container's state (runtime-spec, runtime.md, "State")."""

from __future__ import annotations

import sys

from krun import engine, jsontext

TYPE_CHECKING = False
if TYPE_CHECKING:
    from krun.grammar import Call


def run(call: Call) -> int:
    """Print the state as JSON; raises KrunError."""
    root, container, holder = engine.find(call)
    if holder == "native":
        from krun import native

        sys.stdout.write(jsontext.dumps(native.state(root, container), indent="  ") + "\n")
        return 0
    engine.pass_on(call)
