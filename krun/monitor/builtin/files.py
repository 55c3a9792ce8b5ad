"""System calls on descriptors, paths and memory that need more than checked arguments."""

from __future__ import annotations

import os
import struct

from krun.monitor.builtin import procfs
from krun.monitor.builtin.areas import PAGE, Fault
from krun.monitor.builtin.blocking import can_interrupt, interruptible
from krun.monitor.builtin.hostcall import call
from krun.monitor.builtin.space import TASK_SIZE
from krun.monitor.builtin.syscalls import (
    STRINGS,
    Refused,
    _directory,
    _path,
    buffer,
    settle,
    whole,
    within,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from krun.monitor.builtin.thread import Thread

EBADF, ENOMEM, EACCES, EINVAL, ENOTTY = 9, 12, 13, 22, 25
POLLIN, POLLOUT = 1, 4
O_RDONLY, O_WRONLY, O_ACCMODE, O_NONBLOCK = 0, 1, 3, 0o4000
F_GETFL = 3
SOL_SOCKET, SO_ACCEPTCONN = 1, 30
PIPE_BUF = 4096
INT = 0xFFFFFFFF
WORD = (1 << 64) - 1


def descriptor(thread: Thread, value: int) -> int:
    """A descriptor of the payload; raises Refused for any other."""
    fd = value & INT
    if fd >= thread.process.floor:
        raise Refused(EBADF)
    return fd


def signed(value: int) -> int:
    """A register as C's int."""
    value &= INT
    return value - (1 << 32) if value & 1 << 31 else value


def ready(thread: Thread, fd: int, events: int, listening: int = 0) -> None:
    """Wait until a blocking descriptor is ready; raises Interrupted for a signal.

    Then the call itself does not block, and no signal is missed while it waits.  What fails at
    once is not waited for: the wrong end of a pipe, reading from a socket that listens, or, with
    `listening`, accepting on one that does not.
    """
    view = thread.scratch.view
    address = thread.scratch.address + 4096
    struct.pack_into("<ihh", view, 4096, fd, events, 0)
    if call(7, address, 1, 0):
        return
    flags = call(72, fd, F_GETFL)
    if flags & O_NONBLOCK or flags & O_ACCMODE == (O_WRONLY if events == POLLIN else O_RDONLY):
        return
    struct.pack_into("<ii", view, 4096, 0, 4)
    result = call(55, fd, SOL_SOCKET, SO_ACCEPTCONN, address, address + 4)
    if result == 0 and view[4096] != listening:
        return
    thread.wait([(fd, events)])


# Reading and writing.


def sys_read(thread: Thread, fd: int, address: int, size: int) -> int:
    fd = descriptor(thread, fd)
    place = whole(thread, address, size, 2)
    if size:
        ready(thread, fd, POLLIN)
    return call(0, fd, place, min(size, 0x7FFFF000))


def sys_write(thread: Thread, fd: int, address: int, size: int) -> int:
    fd = descriptor(thread, fd)
    place = whole(thread, address, size, 1)
    if size:
        ready(thread, fd, POLLOUT)
    if size > PIPE_BUF and can_interrupt(thread) and _may_wait(thread, fd):
        return interruptible(thread, 1, fd, place, min(size, 0x7FFFF000))
    return call(1, fd, place, min(size, 0x7FFFF000))


def _may_wait(thread: Thread, fd: int) -> bool:
    """Whether a write of more than there is room for waits in the kernel: pipes, sockets, ttys."""
    if call(72, fd, 3) & O_NONBLOCK:
        return False
    result = call(5, fd, thread.scratch.address + 1024)
    mode: int = struct.unpack_from("<I", thread.scratch.view, 1024 + 24)[0]
    return result == 0 and mode & 0o170000 in (0o010000, 0o020000, 0o140000)


def sys_pread64(thread: Thread, fd: int, address: int, size: int, offset: int) -> int:
    place = whole(thread, address, size, 2)
    return call(17, descriptor(thread, fd), place, min(size, 0x7FFFF000), offset)


def sys_pwrite64(thread: Thread, fd: int, address: int, size: int, offset: int) -> int:
    place = whole(thread, address, size, 1)
    return call(18, descriptor(thread, fd), place, min(size, 0x7FFFF000), offset)


def vectors(thread: Thread, address: int, count: int, prot: int) -> list[tuple[int, int]]:
    """Host pieces of a struct iovec array; raises Fault, or Refused(EINVAL).

    What is not accessible becomes a piece at which the kernel stops.
    """
    if count > 1024:
        raise Refused(EINVAL)
    memory = thread.process.memory
    data = memory.read(address, 16 * count) if count else b""
    pieces = []
    total = 0
    for base, length in struct.iter_unpack("<QQ", data):
        if length >= 1 << 63:
            raise Refused(EINVAL)
        size = min(length, 0x7FFFF000 - total)
        if size and base + size > TASK_SIZE:
            raise Fault
        good = memory.reach(base, size, prot)
        missing = size - sum(each for _, each in good)
        pieces += good
        if missing:
            pieces.append((memory.hole(), missing))
        total += size
    return pieces


def put_vectors(thread: Thread, pieces: list[tuple[int, int]]) -> int:
    """Host address of a struct iovec array of pieces; bounced ones are the caller's to limit."""
    if len(pieces) > 1024:
        raise Refused(EINVAL)
    data = b"".join(struct.pack("<QQ", *piece) for piece in pieces)
    return thread.scratch.put(data, 32768)


def _vectored(
    thread: Thread, number: int, fd: int, address: int, count: int, prot: int, *rest: int
) -> int:
    fd = descriptor(thread, fd)
    count = signed(count)
    if count < 0:
        return -EINVAL
    try:
        pieces = vectors(thread, address, count, prot)
        place = put_vectors(thread, pieces)
    except (Refused, Fault):
        # What is wrong with the descriptor goes first.
        result = call(number, fd, 0, 0, *rest)
        if result == -EBADF:
            return result
        raise
    if not rest and pieces:
        ready(thread, fd, POLLIN if prot == 2 else POLLOUT)
    return call(number, fd, place, len(pieces), *rest)


def sys_readv(thread: Thread, fd: int, address: int, count: int) -> int:
    return _vectored(thread, 19, fd, address, count, 2)


def sys_writev(thread: Thread, fd: int, address: int, count: int) -> int:
    return _vectored(thread, 20, fd, address, count, 1)


def sys_preadv(thread: Thread, fd: int, address: int, count: int, low: int, high: int) -> int:
    return _vectored(thread, 295, fd, address, count, 2, low, high)


def sys_pwritev(thread: Thread, fd: int, address: int, count: int, low: int, high: int) -> int:
    return _vectored(thread, 296, fd, address, count, 1, low, high)


def sys_preadv2(
    thread: Thread, fd: int, address: int, count: int, low: int, high: int, flags: int
) -> int:
    return _vectored(thread, 327, fd, address, count, 2, low, high, flags)


def sys_pwritev2(
    thread: Thread, fd: int, address: int, count: int, low: int, high: int, flags: int
) -> int:
    return _vectored(thread, 328, fd, address, count, 1, low, high, flags)


# Opening and closing.


def _open(thread: Thread, directory: int, path: int, flags: int, mode: int) -> int:
    flags &= INT
    # O_LARGEFILE is implied; O_PATH of a link to the monitor's files leads nowhere useful.
    if not flags & O_NONBLOCK and can_interrupt(thread) and _is_fifo(thread, directory, path):
        fd = interruptible(thread, 257, directory, path, flags, mode)
    else:
        fd = call(257, directory, path, flags, mode)
    if fd == -EACCES:
        text = bytes(thread.scratch.view[STRINGS : STRINGS + 64]).split(b"\0", 1)[0]
        return procfs.refused(thread.process, text, flags)
    if fd < 0:
        return fd
    return procfs.opened(thread, fd, flags)


def _is_fifo(thread: Thread, directory: int, path: int) -> bool:
    result = call(262, directory, path, thread.scratch.address + 1024, 0)
    mode: int = struct.unpack_from("<I", thread.scratch.view, 1024 + 24)[0]
    return result == 0 and mode & 0o170000 == 0o010000


def sys_open(thread: Thread, path: int, flags: int, mode: int) -> int:
    return _open(thread, -100, _path(thread, None, path, 0), flags, mode)


def sys_creat(thread: Thread, path: int, mode: int) -> int:
    return _open(thread, -100, _path(thread, None, path, 0), 0o1101, mode)


def sys_openat(thread: Thread, directory: int, path: int, flags: int, mode: int) -> int:
    directory = _directory(thread, None, directory, 0)
    return _open(thread, directory, _path(thread, None, path, 0), flags, mode)


def sys_openat2(thread: Thread, directory: int, path: int, how: int, size: int) -> int:
    directory = _directory(thread, None, directory, 0)
    if size < 24:
        return -EINVAL
    if size > 4096:
        return -7
    data = thread.process.memory.read(how, size)
    name = _path(thread, None, path, 0)
    place = thread.scratch.put(data, 24576)
    fd = call(437, directory, name, place, size)
    if fd < 0:
        return fd
    return procfs.opened(thread, fd, int.from_bytes(data[:8], "little"))


def sys_close(thread: Thread, fd: int) -> int:
    return call(3, descriptor(thread, fd))


def sys_close_range(thread: Thread, first: int, last: int, flags: int) -> int:
    first &= INT
    last &= INT
    # CLOSE_RANGE_UNSHARE (2) would part this thread's descriptors from the monitor's others.
    flags &= ~2
    if first > last:
        return -EINVAL
    if first >= thread.process.floor:
        return 0
    return call(436, first, min(last, thread.process.floor - 1), flags)


def sys_dup2(thread: Thread, old: int, new: int) -> int:
    return call(33, descriptor(thread, old), descriptor(thread, new))


def sys_dup3(thread: Thread, old: int, new: int, flags: int) -> int:
    return call(292, descriptor(thread, old), descriptor(thread, new), flags)


F_DUPFD, F_DUPFD_CLOEXEC = 0, 1030
F_SIMPLE = frozenset((1, 2, 3, 4, 8, 9, 10, 11, 1024, 1025, 1026, 1031, 1032, 1033, 1034))
F_LOCKS = frozenset((5, 6, 36, 37))
F_WAITING_LOCKS = frozenset((7, 38))
LOCK_NB = 4
F_OWNER_EX = {15: 1, 16: 2}


def sys_fcntl(thread: Thread, fd: int, command: int, argument: int) -> int:
    fd = descriptor(thread, fd)
    command &= INT
    if command in (F_DUPFD, F_DUPFD_CLOEXEC):
        if argument & INT >= thread.process.floor:
            return -EINVAL
        return within_or_close(thread, call(72, fd, command, argument))
    if command in F_SIMPLE:
        return call(72, fd, command, argument)
    if command in F_WAITING_LOCKS:
        return interruptible(thread, 72, fd, command, buffer(thread, argument, 32, 3))
    if command in F_LOCKS:
        return call(72, fd, command, buffer(thread, argument, 32, 3))
    if command in F_OWNER_EX:
        return call(72, fd, command, buffer(thread, argument, 8, F_OWNER_EX[command]))
    if command in (1035, 1036, 1037, 1038):
        return call(72, fd, command, buffer(thread, argument, 8, 3))
    return -EINVAL


def sys_flock(thread: Thread, fd: int, operation: int) -> int:
    fd = descriptor(thread, fd)
    if operation & LOCK_NB:
        return call(73, fd, operation)
    return interruptible(thread, 73, fd, operation)


def within_or_close(thread: Thread, fd: int) -> int:
    """A call's new descriptor, or its error; EMFILE where it lies among the monitor's."""
    return within(thread, fd) if fd >= 0 else fd


# Terminals and devices: request, bytes the kernel reads (1) or writes (2), size.
IOCTLS = {
    0x5401: (2, 36),  # TCGETS
    0x5402: (1, 36),
    0x5403: (1, 36),
    0x5404: (1, 36),
    0x5405: (2, 18),  # TCGETA
    0x5406: (1, 18),
    0x5407: (1, 18),
    0x5408: (1, 18),
    0x5409: (0, 0),  # TCSBRK
    0x540A: (0, 0),
    0x540B: (0, 0),
    0x540C: (0, 0),  # TIOCEXCL
    0x540D: (0, 0),
    0x540E: (0, 0),  # TIOCSCTTY
    0x540F: (2, 4),  # TIOCGPGRP
    0x5410: (1, 4),
    0x5411: (2, 4),  # TIOCOUTQ
    0x5413: (2, 8),  # TIOCGWINSZ
    0x5414: (1, 8),
    0x541B: (2, 4),  # FIONREAD
    0x5421: (1, 4),  # FIONBIO
    0x5422: (0, 0),  # TIOCNOTTY
    0x5423: (1, 4),
    0x5424: (2, 4),
    0x5425: (0, 0),
    0x5429: (2, 4),  # TIOCGSID
    0x5450: (0, 0),  # FIONCLEX
    0x5451: (0, 0),  # FIOCLEX
    0x5452: (1, 4),  # FIOASYNC
    0x80045430: (2, 4),  # TIOCGPTN
    0x40045431: (1, 4),  # TIOCSPTLCK
    0x80045439: (2, 4),  # TIOCGPTLCK
    0x802C542A: (2, 44),  # TCGETS2
    0x402C542B: (1, 44),
    0x402C542C: (1, 44),
    0x402C542D: (1, 44),
    0x8910: (3, 40),  # SIOCGIFNAME
    0x8913: (3, 40),
    0x8915: (3, 40),
    0x8917: (3, 40),
    0x8919: (3, 40),
    0x891B: (3, 40),
    0x891D: (3, 40),
    0x8921: (3, 40),
    0x8927: (3, 40),
    0x8933: (3, 40),
    0x8942: (3, 40),
    0x8904: (2, 4),  # SIOCGPGRP
    0x8905: (2, 4),
    0x1268: (2, 4),  # BLKSSZGET
    0x80081272: (2, 8),
    0x40049409: (0, 0),  # FICLONE: the argument is a descriptor
}
SIOCGIFCONF, FICLONE, TIOCGPTPEER = 0x8912, 0x40049409, 0x5441


def sys_ioctl(thread: Thread, fd: int, request: int, argument: int) -> int:
    fd = descriptor(thread, fd)
    request &= INT
    if request == SIOCGIFCONF:
        return _interfaces(thread, fd, argument)
    if request == FICLONE:
        return call(16, fd, request, descriptor(thread, argument))
    if request == TIOCGPTPEER:
        return within_or_close(thread, call(16, fd, request, argument))
    known = IOCTLS.get(request)
    if known is None:
        # A closed descriptor is EBADF before an unknown request is ENOTTY.
        result = call(72, fd, 1)
        return result if result < 0 else -ENOTTY
    direction, size = known
    if direction:
        argument = buffer(thread, argument, size, direction)
    return call(16, fd, request, argument)


def _interfaces(thread: Thread, fd: int, argument: int) -> int:
    memory = thread.process.memory
    size, pointer = struct.unpack("<i4xQ", memory.read(argument, 16))
    place = buffer(thread, pointer, max(size, 0), 2) if pointer else 0
    address = thread.scratch.put(struct.pack("<i4xQ", size, place), 1024)
    result = call(16, fd, SIOCGIFCONF, address)
    if result >= 0:
        memory.write(argument, thread.scratch.get(4, 1024))
    return result


def sys_readlink(thread: Thread, path: int, address: int, size: int) -> int:
    return _readlink(thread, -100, path, address, size)


def sys_readlinkat(thread: Thread, directory: int, path: int, address: int, size: int) -> int:
    return _readlink(thread, _directory(thread, None, directory, 0), path, address, size)


def _readlink(thread: Thread, directory: int, path: int, address: int, size: int) -> int:
    size = signed(size)
    if size <= 0:
        return -EINVAL
    process = thread.process
    text = process.memory.string(path)
    answer = procfs.link(process, text)
    if answer is not None:
        answer = answer[:size]
        process.memory.write(address, answer)
        return len(answer)
    place = buffer(thread, address, size, 2)
    return call(267, directory, _path(thread, None, path, 0), place, size)


def sys_getdents64(thread: Thread, fd: int, address: int, size: int) -> int:
    fd = descriptor(thread, fd)
    size &= INT
    place = buffer(thread, address, size, 2)
    while True:
        result = call(217, fd, place, size)
        if result <= 0:
            return result
        # /proc/self/fd lists the monitor's descriptors too.
        if not _lists_descriptors(fd):
            return result
        if thread.bounces:
            settle(thread)
            place = buffer(thread, address, size, 2)
        kept = _payload_entries(thread.process.memory.read(address, result), thread.process.floor)
        if kept:
            thread.process.memory.write(address, kept)
            if thread.bounces:
                settle(thread, False)
            return len(kept)


def _lists_descriptors(fd: int) -> bool:
    try:
        path = os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return False
    return path.startswith("/proc/") and path.endswith(("/fd", "/fdinfo"))


def _payload_entries(data: bytes, floor: int) -> bytes:
    kept = bytearray()
    offset = 0
    while offset < len(data):
        size = struct.unpack_from("<H", data, offset + 16)[0]
        name = data[offset + 19 : data.index(b"\0", offset + 19)]
        if not (name.isdigit() and int(name) >= floor):
            kept += data[offset : offset + size]
        offset += size
    return bytes(kept)


# Memory.


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
    for area in list(memory.overlapping(address, address + size)):
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
    for area in list(thread.process.memory.overlapping(start, end)):
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
