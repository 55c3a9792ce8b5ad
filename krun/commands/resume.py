"""krun resume: thaw a container."""

from __future__ import annotations

from krun import engine

TYPE_CHECKING = False
if TYPE_CHECKING:
    from krun.grammar import Call


def run(call: Call) -> int:
    """Find who holds the container and let it act; raises KrunError."""
    root, container, holder = engine.find(call)
    if holder == "native":
        from krun import native

        return native.resume(root, container)
    engine.pass_on(call)
