"""What /proc tells about a process: its state and start time, which survive a reused pid."""

from __future__ import annotations

import os

from krun.record import Record


class ProcessStat(Record):
    """Fields of /proc/PID/stat (proc(5)): the state letter, parent, start time in ticks."""

    state: str
    parent: int
    start_time: int


def read(path: str, size: int = 1 << 16) -> str:
    """Return the text of a small file; size is what one read(2) asks for, in bytes."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        data = os.read(fd, size)
        while True:
            more = os.read(fd, size)
            if not more:
                return data.decode("utf-8", "surrogateescape")
            data += more
    finally:
        os.close(fd)


def write(path: str, text: str) -> None:
    """Write a file of /proc in one write(2), as the kernel wants it; raises OSError."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from None
    finally:
        os.close(fd)


def stat(pid: int) -> ProcessStat | None:
    """Return the state of a process, None when there is no such process."""
    try:
        text = read(f"/proc/{pid}/stat")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The command name may hold spaces and parentheses; what follows its last one does not.
    fields = text[text.rindex(")") + 2 :].split()
    return ProcessStat(fields[0], int(fields[1]), int(fields[19]))


def alive(pid: int, start_time: int) -> bool:
    """Tell whether the process that started then still runs (a zombie does not)."""
    found = stat(pid)
    return found is not None and found.start_time == start_time and found.state not in "ZX"
