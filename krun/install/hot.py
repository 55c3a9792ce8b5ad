"""Which pages a program writes until it ends: seen by a tracer (ptrace(2)) at its exit."""

from __future__ import annotations

import os
import signal
import struct

from krun.linux import libc

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from krun.install.memory import Segment

_PAGE = 4096
# More of them than pages between two that are written, and the two are one range.
_GAPS = (0, 1, 2, 4, 8, 16)
# ptrace(2), madvise(2), proc_pid_pagemap(5)
_SYS_ptrace = 101
_SYS_madvise = 28
_PTRACE_TRACEME = 0
_PTRACE_CONT = 7
_PTRACE_SETOPTIONS = 0x4200
_PTRACE_O_TRACEEXIT = 0x40
_PTRACE_O_EXITKILL = 0x100000
_EVENT_EXIT = signal.SIGTRAP | 6 << 8
_MADV_POPULATE_WRITE = 23
_PRESENT = 1 << 63
_OF_A_FILE = 1 << 61


def is_supported() -> bool:
    """Return whether the kernel copies pages when it is told to: Linux 5.14 or newer."""
    try:
        libc.syscall(_SYS_madvise, 0, 0, _MADV_POPULATE_WRITE)
    except OSError:
        return False
    return True


def ranges(pages: set[int], limit: int) -> list[tuple[int, int]]:
    """Return the first page and the number of pages of at most `limit` stretches with all pages."""
    for gap in _GAPS:
        found: list[list[int]] = []
        for page in sorted(pages):
            if found and page - sum(found[-1]) <= gap:
                found[-1][1] = page - found[-1][0] + 1
            else:
                found.append([page, 1])
        if len(found) <= limit:
            return [(start, count) for start, count in found]
    return []


def _pages(pid: int, segments: Sequence[Segment]) -> set[int]:
    """Return the numbers of the pages of a process that are no longer the file's."""
    pages = set()
    with open(f"/proc/{pid}/pagemap", "rb") as file:
        for segment in segments:
            if segment.flags & 2:
                first, count = segment.start // _PAGE, len(segment.content) // _PAGE
                file.seek(first * 8)
                entries = struct.unpack(f"<{count}Q", file.read(count * 8))
                for page, entry in enumerate(entries, first):
                    if entry & _PRESENT and not entry & _OF_A_FILE:
                        pages.add(page)
    return pages


def _ptrace(request: int, pid: int, data: int = 0) -> None:
    libc.syscall(_SYS_ptrace, request, pid, 0, data)


def written(
    argv: list[str], environment: Mapping[str, str], segments: Sequence[Segment]
) -> set[int]:
    """Run a command to its exit; returns the pages of the segments that it has written."""
    pid = os.fork()
    if pid == 0:
        try:
            null = os.open(os.devnull, os.O_RDWR)
            for descriptor in range(3):
                os.dup2(null, descriptor)
            _ptrace(_PTRACE_TRACEME, 0)
            os.execve(argv[0], argv, environment)
        finally:
            os._exit(127)
    pages: set[int] = set()
    begun = False
    while True:
        _, status = os.waitpid(pid, 0)
        if not os.WIFSTOPPED(status):
            return pages
        number = os.WSTOPSIG(status)
        if not begun:
            _ptrace(_PTRACE_SETOPTIONS, pid, _PTRACE_O_TRACEEXIT | _PTRACE_O_EXITKILL)
            begun, number = True, 0
        elif status >> 8 == _EVENT_EXIT:
            pages, number = _pages(pid, segments), 0
        elif number == signal.SIGTRAP:
            number = 0
        _ptrace(_PTRACE_CONT, pid, number)
