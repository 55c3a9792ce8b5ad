"""System calls on the payload's memory: mmap(2) and its kin."""

from __future__ import annotations

import os

from krun.monitor.builtin.areas import PAGE, Fault
from krun.monitor.builtin.arguments import INT, WORD, buffer, descriptor
from krun.monitor.builtin.hostcall import call

TYPE_CHECKING = False
if TYPE_CHECKING:
    from krun.monitor.builtin.thread import Thread

EBADF, ENOMEM, EINVAL = 9, 12, 22


def sys_mmap(
    thread: Thread, address: int, size: int, prot: int, flags: int, fd: int, offset: int
) -> int:
    name = ""
    if flags & 0x20:
        fd = -1
        offset = 0
    else:
        if offset & 4095:
            return -EINVAL
        fd = descriptor(thread, fd)
        if call(72, fd, 1) < 0:
            return -EBADF
        try:
            name = os.readlink(f"/proc/self/fd/{fd}")
        except OSError:
            name = "?"
    return thread.process.memory.map(address, size, prot, flags & INT, fd, offset, name)


def sys_munmap(thread: Thread, address: int, size: int) -> int:
    return thread.process.memory.unmap(address, size)


def sys_mprotect(thread: Thread, address: int, size: int, prot: int) -> int:
    return thread.process.memory.protect(address, size, prot)


def sys_mremap(thread: Thread, old: int, old_size: int, size: int, flags: int, new: int) -> int:
    return thread.process.memory.remap(old, old_size, size, flags, new)


def sys_brk(thread: Thread, address: int) -> int:
    return thread.process.memory.brk(address)


def sys_madvise(thread: Thread, address: int, size: int, advice: int) -> int:
    return thread.process.memory.advise(address, size, advice & INT)


def sys_msync(thread: Thread, address: int, size: int, flags: int) -> int:
    memory = thread.process.memory
    if address & 4095 or flags & INT & ~7 or flags & 5 == 5:
        return -EINVAL
    size = (size + 4095) & -4096 & WORD
    reach = address
    for area in memory.listed(address, address + size):
        if area.start > reach:
            return -12
        reach = area.end
        if area.slot is not None and area.file:
            part = area.part(max(area.start, address), min(area.end, address + size))
            result = call(26, part.hva, part.end - part.start, flags)
            if result < 0:
                return result
    return 0 if reach >= address + size else -12


def sys_mincore(thread: Thread, address: int, size: int, vector: int) -> int:
    if address & 4095:
        return -EINVAL
    memory = thread.process.memory
    pages = (size + 4095) >> 12
    try:
        pieces = memory.pieces(address, pages << 12, 7)
    except Fault:
        return -12
    place = buffer(thread, vector, pages, 2)
    for hva, length in pieces:
        result = call(27, hva, length, place)
        if result < 0:
            return result
        place += length >> 12
    return 0


def _locking(thread: Thread, address: int, size: int, prot: int) -> int:
    """Locking is a hint that succeeds: nothing but the range is looked at."""
    start = address & -PAGE
    end = start + ((size + address - start + PAGE - 1) & -PAGE & WORD)
    if end > WORD:
        return -EINVAL
    for area in thread.process.memory.listed(start, end):
        if area.start > start or area.prot & prot != prot:
            return -ENOMEM
        start = area.end
    return 0 if start >= end else -ENOMEM


def sys_mlock(thread: Thread, address: int, size: int) -> int:
    return _locking(thread, address, size, 1)


def sys_mlock2(thread: Thread, address: int, size: int, flags: int) -> int:
    return -EINVAL if flags & INT & ~1 else sys_mlock(thread, address, size)


def sys_munlock(thread: Thread, address: int, size: int) -> int:
    return _locking(thread, address, size, 0)


def sys_mlockall(thread: Thread, flags: int) -> int:
    # MCL_ONFAULT (4) alone says nothing.
    return 0 if 0 < flags & INT < 8 and flags & INT != 4 else -EINVAL


def sys_munlockall(thread: Thread) -> int:
    return 0
