"""krun ps: the processes of a container."""

from __future__ import annotations

from krun import engine

TYPE_CHECKING = False
if TYPE_CHECKING:
    from krun.grammar import Call


def run(call: Call) -> int:
    """Print the processes; raises KrunError."""
    root, container, holder = engine.find(call)
    if holder == "native":
        from krun import native

        return native.ps(root, container, call.options["format"], call.arguments[1:])
    if len(call.arguments) > 1:
        # crun prints process ids alone; ps(1) makes the columns, as runc does it.
        from krun import many, processes

        listed = many.crun_output(call, ["--root", root, "ps", container]).split()[1:]
        return processes.columns(set(listed), call.arguments[1:])
    engine.pass_on(call)
