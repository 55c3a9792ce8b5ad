"""krun restore: crun and criu do it, for containers that go without a VM."""

from __future__ import annotations

from krun import engine, prepare
from krun.commands.checkpoint import need_criu
from krun.errors import KrunError, PolicyDenied

TYPE_CHECKING = False
if TYPE_CHECKING:
    from krun.grammar import Call


def _check_allowed(call: Call) -> None:
    """Raise PolicyDenied unless the container would go without a VM if it were created.

    What a checkpoint holds are processes of the host's kernel, and it can come from an image.
    """
    created = call._replace(options={**call.options, "config": None})
    prepared = prepare.prepare(created)
    if prepared.choice.mode != "label" or prepared.translation.state:
        raise PolicyDenied(
            "restore: the processes of a checkpoint would run outside of any VM",
            "only a container that mode label leaves unchanged can be restored",
        )


def run(call: Call) -> int:
    """Hand over to crun; raises KrunError."""
    root = engine.root_of(call)
    container = engine.check_id(call.arguments[0])
    if engine.of(root, container) == "native" or call.settings.engine == "native":
        raise KrunError("restore: the native engine cannot do it", "--engine crun has criu")
    _check_allowed(call)
    need_criu(call)
    engine.pass_on(call)
