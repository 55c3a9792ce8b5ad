"""A container's network: claimed in `create`, released in `delete`, for either engine.

    spec = network.claim(spec, id, root)     where a network is asked for
    network.release(id, root)                when network.held(id, root)

`claim` returns the configuration with a network namespace that is ready to be joined: from the
pool by one rename, or made on the spot.  Whatever is killed between the two, `gc` finds.
"""

from __future__ import annotations

import os

from krun.errors import BadSpec, KrunError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from krun.types import Spec


def asked(spec: Spec) -> bool:
    """Whether a configuration asks krun for a network; a few look-ups in dicts."""
    extension = spec.get("kontain")
    return (
        (isinstance(extension, dict) and "network" in extension)
        or "app.kontain.network" in (spec.get("annotations") or ())
        or bool((spec.get("linux") or {}).get("netDevices"))
    )


def held(id: str, root: str) -> bool:
    """Whether krun holds a network for the container; one or two looks at the file system."""
    from krun.network import state

    directory = state.directory()
    return os.path.isdir(f"{directory}/containers") and os.path.isdir(
        state.container(directory, root, id)
    )


def claim(spec: Spec, id: str, root: str, default: Any = None, source: str = "") -> Spec:
    """Return spec with the network it asks for, which is there and recorded for id.

    One that asks for none gets the host's `default`, which is written in `source`.  Raises
    BadSpec for a wrong request, KrunError when the host cannot serve it; then nothing is left.
    """
    from krun.network import join

    if default is None or asked(spec):
        return join.claim(spec, id, root)
    extension: Any = {**(spec.get("kontain") or {}), "network": default}
    asking: Spec = {**spec, "kontain": extension}
    try:
        return join.claim(asking, id, root)
    except BadSpec as error:
        wrong = error.path.removeprefix("kontain.network").removeprefix(".")
        place = f"{source}: {wrong}" if wrong else source
        raise KrunError(f"{place}: {error.text}", error.hint) from None


def release(id: str, root: str) -> None:
    """Take down the container's network, and what killed processes left behind.

    A container that is there keeps it.  A process that outlives this one may do the work: what
    anyone could notice, a published port for one, is gone before.
    """
    if os.path.isdir(f"{root}/{id}"):
        return
    from krun.network import removal

    removal.release(id, root, wait=False)


def attend(path: str, argv: list[str]) -> int:
    """Run the engine's binary and wait, so that release() can follow; return its status."""
    from krun.network import child

    return child.run(path, argv)
