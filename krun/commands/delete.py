"""krun delete: remove a container and all it held."""

from __future__ import annotations

import os

from krun import engine
from krun.errors import NotFound

TYPE_CHECKING = False
if TYPE_CHECKING:
    from krun.grammar import Call


def _delete(call: Call) -> int:
    """Remove the container; becomes crun where krun holds nothing for it."""
    root, container, holder = engine.find(call)
    if holder == "native":
        from krun import removal

        return removal.delete(root, container, call.options["force"])
    if call.options["force"] and not os.path.exists(f"{root}/{container}/status"):
        from krun import leftover

        leftover.clear(root, container)
    from krun import network

    if network.held(container, root):
        argv = [*engine.crun_words(call), container]
        return network.attend(engine.crun_path(call), argv)
    engine.pass_on(call)


def run(call: Call) -> int:
    """Delete one container, or with --regex all that match; raises KrunError."""
    if call.options["regex"]:
        from krun import many

        return many.each(call)
    try:
        return _delete(call)
    except NotFound:
        if call.options["force"]:
            return 0
        raise
    finally:
        from krun import network

        root, container = engine.root_of(call), call.arguments[0]
        if network.held(container, root):
            network.release(container, root)
