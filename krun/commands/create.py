"""krun create: translate the bundle and let the engine build the container."""

from __future__ import annotations

import os

from krun import engine, jsontext, log, prepare
from krun.errors import PolicyDenied

TYPE_CHECKING = False
if TYPE_CHECKING:
    from krun.grammar import Call


def _build(call: Call, prepared: prepare.Prepared, container: str, networked: bool) -> int:
    """Let the engine build the container.  Does not return where krun becomes crun."""
    translation = prepared.translation
    if translation.engine == "native":
        from krun import native

        return native.create(call, prepared, container)
    engine.refuse(call, "keep")
    spec = translation.spec
    if prepared.choice.images:
        from krun import image_check

        spec = image_check.attend(spec, container, prepared.bundle)
    lowest = 3 + engine.listen_fds() + call.options["preserve_fds"]
    config = engine.document_fd(jsontext.dumps(spec), lowest)
    words = engine.crun_words(call, skip=("config",))
    argv = [*words, "--config", config, container]
    # Of a root that cannot be made crun says that it does not exist.
    os.makedirs(engine.root_of(call), mode=0o700, exist_ok=True)
    if networked:
        from krun import network

        return network.attend(prepared.host.crun, argv)
    engine.hand_over(prepared.host.crun, argv)


def _build_in_network(call: Call, prepared: prepare.Prepared, container: str) -> int:
    """Build the container in the network that its configuration asks for."""
    from krun import network

    root = engine.root_of(call)
    translation = prepared.translation
    source = "--network" if call.settings.network else f"{prepared.policy.source}: defaults.network"
    spec = network.claim(translation.spec, container, root, prepared.choice.network, source)
    try:
        joined = prepared._replace(translation=translation._replace(spec=spec))
        return _build(call, joined, container, True)
    finally:
        # Unless the container is there: it failed, or `run` saw it end.
        network.release(container, root)


def run(call: Call) -> int:
    """Create a container; raises KrunError."""
    container = engine.check_id(call.arguments[0])
    prepared = prepare.prepare(call)
    translation = prepared.translation
    for note in translation.notes:
        log.emit(note.level, note.text)
    if translation.node is not None:
        from krun import node

        node.make(translation.node)
    log.debug(f"engine {translation.engine}, monitor {translation.monitor}")
    devices = (translation.spec.get("linux") or {}).get("netDevices")
    if devices and not prepared.policy.allow.get("network", True):
        raise PolicyDenied(
            f"linux.netDevices: {prepared.policy.source} does not allow it",
            "set allow.network in the policy",
        )
    if prepared.choice.network is not None or devices:
        return _build_in_network(call, prepared, container)
    return _build(call, prepared, container, False)
