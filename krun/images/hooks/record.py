"""poststart and poststop hook: a line in the ledger."""

from __future__ import annotations

import posix
import time

from krun.images import index, ledger
from krun.images.hooks import container

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def age_of(pid: int) -> float:
    """Return the seconds since a process began (proc(5): field 22, in clock ticks of boot time)."""
    with open(f"/proc/{pid}/stat", "rb") as file:
        fields = file.read().rpartition(b")")[2].split()
    began = int(fields[19]) / posix.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - began


def act(options: dict[str, str]) -> int:
    """Record one start or stop; never fails a start."""
    state = container.read_state()
    if container.is_sandbox(state["annotations"]):
        return 0
    one = container.describe(state)
    stopped = one.status == "stopped"
    entry: dict[str, Any] = {
        "event": "stop" if stopped else "start",
        "time": round(time.time(), 3),
        "container": one.id,
        "image": one.name,
        "id": one.image_id,
    }
    if one.namespace:
        entry["namespace"] = one.namespace
    if not stopped:
        if one.annotations.get(container.CACHE) == "true":
            entry["cache"] = True
        try:
            known = index.find(options["state"], one.name) if one.name else None
        except FileNotFoundError:
            known = None
        if known is not None and (not one.image_id or known.id == one.image_id):
            entry["digest"] = known.digest
            entry["warm"] = True
        if one.pid:
            try:
                entry["start_ms"] = round(age_of(one.pid) * 1000)
            except (OSError, ValueError, IndexError):
                # It ended already; its start is recorded all the same.
                pass
    ledger.append(options["state"], entry)
    return 0
