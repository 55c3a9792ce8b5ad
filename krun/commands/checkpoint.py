"""krun checkpoint: crun and criu do it; the native engine says so."""

from __future__ import annotations

from krun import engine
from krun.errors import KrunError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from krun.grammar import Call


def need_criu(call: Call) -> None:
    """Raise KrunError where crun cannot checkpoint: it does not know the verb then."""
    from krun import many

    if "+CRIU" not in many.crun_output(call, ["--version"]).split():
        raise KrunError(
            f"{call.verb}: {engine.crun_path(call)} is built without criu",
            "crun --version lists +CRIU where it has it",
        )


def run(call: Call) -> int:
    """Hand over to crun; raises KrunError."""
    _, _, holder = engine.find(call)
    if holder == "native" or call.settings.engine == "native":
        raise KrunError("checkpoint: the native engine cannot do it", "--engine crun has criu")
    need_criu(call)
    engine.pass_on(call)
