"""What create and exec do alike when a process of a container is born."""

from __future__ import annotations

import os

from krun.errors import KrunError
from krun.linux import cgroupfs, proc
from krun.linux import flags as k

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def check_descriptors(count: int) -> None:
    """Make sure that the descriptors to preserve are open; others would take their place."""
    for fd in range(3, 3 + count):
        try:
            os.fstat(fd)
        except OSError:
            raise KrunError(f"--preserve-fds {count}: descriptor {fd} is not open") from None


def seccomp_program(section: dict[str, Any] | None) -> tuple[bytes, int] | None:
    """Return the filter program of linux.seccomp and the flags to load it with."""
    if not section:
        return None
    from krun.linux import seccomp
    from krun.plan.seccomp import notifies, plan_flags

    flags = plan_flags(section)
    if notifies(section):
        flags |= k.SECCOMP_FILTER_FLAG_NEW_LISTENER
    return seccomp.program(section, seccomp.cache_directory()), flags


def move_unified(pid: int, places: tuple[cgroupfs.Directory, ...], tolerant: bool) -> None:
    """Move a process by its pid into the v2 cgroup that it could not be born in."""
    unified = tuple(place for place in places if place.version == 2)
    if unified and not _is_in(pid, unified[0]):
        cgroupfs.join(pid, unified, tolerant)


def _is_in(pid: int, place: cgroupfs.Directory) -> bool:
    """Tell whether the process is in a v2 cgroup already."""
    for line in proc.read(f"/proc/{pid}/cgroup").splitlines():
        if line.startswith("0::"):
            return place.path.endswith(line[3:]) and line[3:] != "/"
    return True


def kill_child(pid: int, places: tuple[cgroupfs.Directory, ...]) -> None:
    """Kill a child that is in a cgroup, and wait for it."""
    try:
        os.kill(pid, 9)
        cgroupfs.let_die([pid], places)
        os.waitpid(pid, 0)
    except (ProcessLookupError, ChildProcessError):
        return
