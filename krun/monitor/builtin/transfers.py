"""System calls that read and write."""

from __future__ import annotations

import struct

from krun.monitor.builtin.areas import Fault
from krun.monitor.builtin.arguments import (
    MAX_RW_COUNT,
    SECOND,
    Refused,
    descriptor,
    signed,
    whole,
)
from krun.monitor.builtin.blocking import can_interrupt, interruptible
from krun.monitor.builtin.hostcall import call
from krun.monitor.builtin.signals import Interrupted
from krun.monitor.builtin.space import TASK_SIZE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from krun.monitor.builtin.thread import Thread

EBADF, EAGAIN, EINVAL, EOPNOTSUPP = 9, 11, 22, 95
POLLIN, POLLOUT = 1, 4
O_RDONLY, O_WRONLY, O_ACCMODE, O_NONBLOCK = 0, 1, 3, 0o4000
F_GETFL = 3
SOL_SOCKET, SO_RCVTIMEO, SO_SNDTIMEO, SO_ACCEPTCONN = 1, 20, 21, 30
RWF_NOWAIT = 8
PIPE_BUF = 4096


def ready(thread: Thread, fd: int, events: int, listening: int = 0) -> bool:
    """Wait until a blocking descriptor is ready; whether that took a wait.

    Then the call itself does not block, unless someone else who waited was faster, and no signal
    is missed while it waits.  What fails at once is not waited for: the wrong end of a pipe,
    reading from a socket that listens, or, with `listening`, accepting on one that does not.
    Raises Interrupted for a signal, Refused(EAGAIN) at the end of a socket's own time limit.
    """
    view = thread.scratch.view
    address = thread.scratch.address + 4096
    struct.pack_into("<ihh", view, 4096, fd, events, 0)
    if call(7, address, 1, 0):
        return False
    flags = call(72, fd, F_GETFL)
    if flags & O_NONBLOCK or flags & O_ACCMODE == (O_WRONLY if events == POLLIN else O_RDONLY):
        return False
    struct.pack_into("<ii", view, 4096, 0, 4)
    result = call(55, fd, SOL_SOCKET, SO_ACCEPTCONN, address, address + 4)
    if result == 0 and view[4096] != listening:
        return False
    limit = _time_limit(thread, fd, events) if result == 0 else None
    try:
        found = thread.wait([(fd, events)], limit)
    except Interrupted as error:
        # signal(7): with a time limit it is never started anew.
        error.restart = limit is None
        raise
    if found is None:
        raise Refused(EAGAIN)
    return True


def _time_limit(thread: Thread, fd: int, events: int) -> int | None:
    """A socket's SO_RCVTIMEO or SO_SNDTIMEO in nanoseconds; None without one."""
    place = thread.scratch.put(struct.pack("<qqi", 0, 0, 16), 4096)
    option = SO_RCVTIMEO if events == POLLIN else SO_SNDTIMEO
    call(55, fd, SOL_SOCKET, option, place, place + 16)
    seconds, microseconds = struct.unpack_from("<qq", thread.scratch.view, 4096)
    return int(seconds) * SECOND + int(microseconds) * 1000 or None


def _read_now(thread: Thread, fd: int, place: int, count: int) -> int:
    """Read what is there into a struct iovec array, after a wait that a signal could have ended.

    Another reader may have been faster: then a plain read would wait where no signal ends it.
    0 bytes and errors are the call's too; EAGAIN when there is nothing, or when the file only
    reads plainly.
    """
    result = call(327, fd, place, count, -1, -1, RWF_NOWAIT)
    return -EAGAIN if result == -EOPNOTSUPP else result


def sys_read(thread: Thread, fd: int, address: int, size: int) -> int:
    fd = descriptor(thread, fd)
    place = whole(thread, address, size, 2)
    size = min(size, MAX_RW_COUNT)
    while size and ready(thread, fd, POLLIN) and can_interrupt(thread):
        vector = thread.scratch.put(struct.pack("<QQ", place, size), 4096)
        result = _read_now(thread, fd, vector, 1)
        if result != -EAGAIN:
            return result
    return call(0, fd, place, size)


def sys_write(thread: Thread, fd: int, address: int, size: int) -> int:
    fd = descriptor(thread, fd)
    place = whole(thread, address, size, 1)
    waited = size > 0 and ready(thread, fd, POLLOUT)
    if (waited or size > PIPE_BUF) and can_interrupt(thread) and _may_wait(thread, fd):
        return interruptible(thread, 1, fd, place, min(size, MAX_RW_COUNT))
    return call(1, fd, place, min(size, MAX_RW_COUNT))


def _may_wait(thread: Thread, fd: int) -> bool:
    """Whether a write of more than there is room for waits in the kernel: pipes, sockets, ttys."""
    if call(72, fd, 3) & O_NONBLOCK:
        return False
    result = call(5, fd, thread.scratch.address + 1024)
    mode: int = struct.unpack_from("<I", thread.scratch.view, 1024 + 24)[0]
    return result == 0 and mode & 0o170000 in (0o010000, 0o020000, 0o140000)


def sys_pread64(thread: Thread, fd: int, address: int, size: int, offset: int) -> int:
    place = whole(thread, address, size, 2)
    return call(17, descriptor(thread, fd), place, min(size, MAX_RW_COUNT), offset)


def sys_pwrite64(thread: Thread, fd: int, address: int, size: int, offset: int) -> int:
    place = whole(thread, address, size, 1)
    return call(18, descriptor(thread, fd), place, min(size, MAX_RW_COUNT), offset)


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
        size = min(length, MAX_RW_COUNT - total)
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
    if not rest and pieces and prot == 1:
        ready(thread, fd, POLLOUT)
    while not rest and pieces and prot == 2 and ready(thread, fd, POLLIN) and can_interrupt(thread):
        result = _read_now(thread, fd, place, len(pieces))
        if result != -EAGAIN:
            return result
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
