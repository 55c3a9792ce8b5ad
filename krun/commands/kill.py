"""krun kill: send a signal to a container's payload."""

from __future__ import annotations

from krun import engine

TYPE_CHECKING = False
if TYPE_CHECKING:
    from krun.grammar import Call


def run(call: Call) -> int:
    """Signal one container, or with --regex all that match; raises KrunError."""
    if call.options["regex"]:
        from krun import many

        return many.each(call)
    root, container, holder = engine.find(call)
    if holder == "native":
        from krun import removal

        signal = call.arguments[1] if len(call.arguments) > 1 else "SIGTERM"
        return removal.kill(root, container, signal, call.options["all"])
    if len(call.arguments) > 1:
        from krun.signals import for_crun

        call = call._replace(arguments=[container, for_crun(call.arguments[1])])
    engine.pass_on(call)
