"""What create and exec do alike when a process of a container is born."""

from __future__ import annotations

import errno
import os

from krun import log
from krun.execution import note_own_file
from krun.linux import cgroupfs, proc
from krun.linux import flags as k
from krun.linux.namespaces import clone

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from krun.linux.cgroupfs import Door


def check_descriptors(count: int) -> None:
    """Warn of the first descriptor to preserve that is not open; those that are go on, as in crun.

    What krun opens itself in their places is close-on-exec, and so never the payload's.
    """
    for fd in range(3, 3 + count):
        if not _is_given(fd):
            log.warning(f"--preserve-fds {count}: descriptor {fd} is not open")
            return


def _is_given(fd: int) -> bool:
    """Tell whether the caller has left a descriptor open."""
    try:
        return os.get_inheritable(fd)
    except OSError:
        return False


def seccomp_program(
    section: dict[str, Any] | None, strict: bool = False
) -> tuple[bytes, int] | None:
    """Return the filter program of linux.seccomp and the flags to load it with.

    When strict, a system call of no known name is an error: raises KrunError.
    """
    if not section:
        return None
    from krun.linux import seccomp
    from krun.plan.seccomp import notifies, plan_flags

    flags = plan_flags(section)
    if notifies(section) or section.get("listenerPath"):
        # Who listens gets its descriptor, whether or not a rule uses it, as with crun.
        flags |= k.SECCOMP_FILTER_FLAG_NEW_LISTENER
    else:
        # The kernel refuses it where there is no listener to wait for.
        flags &= ~k.SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV
    return seccomp.program(section, seccomp.cache_directory(), strict), flags


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


def born(flags: int, door: Door) -> int:
    """Clone a process into the cgroup, by its v2 directory where that is allowed."""
    note_own_file()
    if door.unified != -1:
        try:
            return clone(flags, door.unified)
        except OSError as error:
            # Rootless, or a v2 cgroup that has controllers below: create moves it by pid.
            if error.errno not in (errno.EACCES, errno.EBUSY, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
    return clone(flags)
