"""krun update: change a container's resource limits."""

from __future__ import annotations

from krun import engine

TYPE_CHECKING = False
if TYPE_CHECKING:
    from krun.grammar import Call


def run(call: Call) -> int:
    """Change limits; raises KrunError."""
    root, container, holder = engine.find(call)
    if holder == "native":
        from krun import native

        return native.update(root, container, call.options)
    engine.refuse(call, "l3_cache_schema", "mem_bw_schema", "cpu_burst", "cpu_idle")
    from krun import watch

    engine.pass_on(call._replace(options=watch.for_crun(call.options)))
