"""krun checkpoint: crun and criu do it; the native engine says so."""

from __future__ import annotations

from krun import engine
from krun.errors import KrunError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from krun.grammar import Call


def run(call: Call) -> int:
    """Hand over to crun; raises KrunError."""
    root = engine.root_of(call)
    container = engine.check_id(call.arguments[0])
    if engine.of(root, container) == "native" or call.settings.engine == "native":
        raise KrunError("checkpoint: the native engine cannot do it", "--engine crun has criu")
    engine.pass_on(call)
