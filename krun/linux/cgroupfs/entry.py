"""Ways into a cgroup: for a process that is there, and for one that is about to be born."""

from __future__ import annotations

import errno
import os

from krun.errors import BadState
from krun.linux.cgroupfs import DENIED, Directory, write
from krun.record import Record


def join(pid: int, places: tuple[Directory, ...], tolerant: bool = False) -> None:
    """Move a process into the cgroup."""
    for place in places:
        try:
            write(f"{place.path}/cgroup.procs", str(pid))
        except OSError as error:
            if not (tolerant and error.errno in DENIED):
                raise


class Door(Record):
    """A way into a cgroup for a process that is about to be born.

    Moving another process takes the lock of every fork on the machine, which waits for an RCU
    grace period: 15 ms here.  The kernel leaves that lock out for a thread that moves itself
    through the `tasks` file of v1, and for CLONE_INTO_CGROUP on v2.
    """

    tasks: tuple[int, ...]
    unified: int


def open_door(places: tuple[Directory, ...], tolerant: bool = False, *, born: bool = True) -> Door:
    """Open a cgroup for a process to be born; the files keep the rights of their opener.

    Unless it may be born in the v2 cgroup it moves itself there.
    """
    tasks = []
    unified = -1
    for place in places:
        try:
            if place.version == 2 and not born:
                tasks.append(os.open(f"{place.path}/cgroup.procs", os.O_WRONLY | os.O_CLOEXEC))
            elif place.version == 2:
                unified = os.open(place.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            else:
                tasks.append(os.open(f"{place.path}/tasks", os.O_WRONLY | os.O_CLOEXEC))
        except OSError as error:
            if not (tolerant and error.errno in DENIED):
                raise
    return Door(tuple(tasks), unified)


def enter(door: Door) -> None:
    """Move the calling thread through the door; its descriptors are closed.

    Raises BadState when somebody has removed the cgroup meanwhile.
    """
    for fd in door.tasks:
        try:
            os.write(fd, b"0")
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENODEV):
                raise
            text = "the container's cgroup was removed while a process entered it"
            raise BadState(text, "does something else use the same cgroupsPath?") from error
        os.close(fd)
    if door.unified != -1:
        os.close(door.unified)


def close_door(door: Door) -> None:
    """Close the descriptors."""
    for fd in (*door.tasks, door.unified):
        if fd != -1:
            os.close(fd)
