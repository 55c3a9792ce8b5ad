"""krun create: translate the bundle and let the engine build the container."""

from __future__ import annotations

from krun import engine, jsontext, log, prepare

TYPE_CHECKING = False
if TYPE_CHECKING:
    from krun.grammar import Call


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
    if translation.engine == "native":
        from krun import native

        return native.create(call, prepared, container)
    engine.refuse(call, "keep")
    lowest = 3 + engine.listen_fds() + call.options["preserve_fds"]
    config = engine.document_fd(jsontext.dumps(translation.spec), lowest)
    words = engine.crun_words(call, skip=("config",))
    engine.hand_over(prepared.host.crun, [*words, "--config", config, container])
