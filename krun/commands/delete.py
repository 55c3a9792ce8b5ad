"""krun delete: remove a container and all it held."""

from __future__ import annotations

from krun import engine
from krun.errors import NotFound

TYPE_CHECKING = False
if TYPE_CHECKING:
    from krun.grammar import Call


def run(call: Call) -> int:
    """Delete one container, or with --regex all that match; raises KrunError."""
    if call.options["regex"]:
        from krun import many

        return many.each(call)
    force = call.options["force"]
    try:
        root, container, holder = engine.find(call)
    except NotFound:
        if force:
            return 0
        raise
    if holder == "native":
        from krun import native

        return native.delete(root, container, force)
    engine.pass_on(call)
