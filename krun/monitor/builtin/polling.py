"""System calls that wait for descriptors: poll, select, epoll."""

from __future__ import annotations

import struct
import time

from krun.monitor.builtin.areas import Fault
from krun.monitor.builtin.arguments import INT, SECOND, buffer, descriptor, signed, timespec
from krun.monitor.builtin.hostcall import call
from krun.monitor.builtin.signals import Interrupted

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from krun.monitor.builtin.thread import Thread

EINVAL, EBADF = 22, 9
POLLIN, POLLOUT, POLLPRI, POLLERR, POLLHUP, POLLNVAL = 1, 4, 2, 8, 16, 32


def with_mask(thread: Thread, address: int, size: int, wait: Callable[[], int]) -> int:
    """Do a wait under another signal mask, as ppoll(2) and its kin do."""
    if not address:
        return wait()
    if size != 8:
        return -EINVAL
    mask = int.from_bytes(thread.process.memory.read(address, 8), "little")
    return under_mask(thread, mask, wait)


def under_mask(thread: Thread, mask: int, wait: Callable[[], int]) -> int:
    """Do a wait under another signal mask.

    A handler that interrupts it runs under that mask, and the frame brings the old one back.
    """
    before = thread.mask
    thread.set_mask(mask)
    try:
        result = wait()
    except Interrupted:
        thread.saved_mask = before
        raise
    thread.set_mask(before)
    return result


def sys_poll(thread: Thread, address: int, count: int, milliseconds: int) -> int:
    limit = signed(milliseconds)
    return _poll(thread, address, count & INT, None if limit < 0 else limit * 1000000)


def sys_ppoll(thread: Thread, address: int, count: int, timeout: int, mask: int, size: int) -> int:
    limit = timespec(thread, timeout)
    start = time.monotonic_ns()
    try:
        return with_mask(thread, mask, size, lambda: _poll(thread, address, count & INT, limit))
    finally:
        _left(thread, timeout, limit, start)


def _left(thread: Thread, address: int, limit: int | None, start: int, resolution: int = 1) -> None:
    """Linux writes back the time that was not slept, where it can be written."""
    if address and limit is not None:
        left = max(limit - (time.monotonic_ns() - start), 0)
        try:
            thread.process.memory.write(
                address, struct.pack("<qq", left // SECOND, left % SECOND // resolution)
            )
        except Fault:
            pass


def _poll(thread: Thread, address: int, count: int, limit: int | None) -> int:
    memory = thread.process.memory
    if count > thread.process.floor:
        return -EINVAL
    if count:
        memory.host(address, 8 * count, 1)
    data = memory.read(address, 8 * count) if count else b""
    entries = list(struct.iter_unpack("<ihh", data))
    floor = thread.process.floor
    polled = [(-1 if fd >= floor else fd, events) for fd, events, _ in entries]
    hidden = any(fd >= floor for fd, _, _ in entries)
    try:
        found = thread.wait(polled, 0 if hidden else limit)
    except Interrupted as error:
        raise Interrupted(False) from error
    out = bytearray(data)
    ready = 0
    for index, (fd, _, _) in enumerate(entries):
        revents = POLLNVAL if fd >= floor else found[index] if found else 0
        struct.pack_into("<h", out, 8 * index + 6, revents)
        ready += bool(revents)
    if count:
        memory.write(address, out)
    return ready


def sys_select(
    thread: Thread, count: int, reads: int, writes: int, errors: int, timeout: int
) -> int:
    limit = None
    if timeout:
        seconds, micro = struct.unpack("<qq", thread.process.memory.read(timeout, 16))
        if seconds < 0 or micro < 0:
            return -EINVAL
        limit = min(int(seconds) * SECOND + int(micro) * 1000, 1 << 62)
    start = time.monotonic_ns()
    result = _select(thread, signed(count), (reads, writes, errors), limit)
    _left(thread, timeout, limit, start, 1000)
    return result


def sys_pselect6(
    thread: Thread, count: int, reads: int, writes: int, errors: int, timeout: int, mask: int
) -> int:
    limit = timespec(thread, timeout)
    pointer = size = 0
    if mask:
        pointer, size = struct.unpack("<QQ", thread.process.memory.read(mask, 16))
    start = time.monotonic_ns()
    try:
        return with_mask(
            thread,
            pointer,
            size,
            lambda: _select(thread, signed(count), (reads, writes, errors), limit),
        )
    finally:
        _left(thread, timeout, limit, start)


def _select(thread: Thread, count: int, addresses: tuple[int, int, int], limit: int | None) -> int:
    if count < 0:
        return -EINVAL
    memory = thread.process.memory
    count = min(count, thread.process.floor)
    size = (count + 63) // 64 * 8
    sets = [
        int.from_bytes(memory.read(address, size), "little") if address and size else 0
        for address in addresses
    ]
    wanted = {}
    for fd in range(count):
        events = 0
        for members, event in zip(sets, (POLLIN, POLLOUT, POLLPRI), strict=True):
            if members >> fd & 1:
                events |= event
        if events:
            wanted[fd] = events
    try:
        found = thread.wait(list(wanted.items()), limit)
    except Interrupted as error:
        raise Interrupted(False) from error
    results = [0, 0, 0]
    total = 0
    for fd, revents in zip(wanted, found or [0] * len(wanted), strict=True):
        if revents & POLLNVAL:
            return -EBADF
        for index, bits in enumerate((POLLIN | POLLHUP | POLLERR, POLLOUT | POLLERR, POLLPRI)):
            if revents & bits and sets[index] >> fd & 1:
                results[index] |= 1 << fd
                total += 1
    for address, members in zip(addresses, results, strict=True):
        if address and size:
            memory.write(address, members.to_bytes(size, "little"))
    return total


def sys_epoll_ctl(thread: Thread, epoll: int, operation: int, fd: int, event: int) -> int:
    epoll, fd = descriptor(thread, epoll), descriptor(thread, fd)
    place = buffer(thread, event, 12, 1) if event and operation & INT != 2 else 0
    return call(233, epoll, operation, fd, place)


def sys_epoll_wait(thread: Thread, epoll: int, events: int, count: int, limit: int) -> int:
    milliseconds = signed(limit)
    return _epoll(
        thread, epoll, events, signed(count), None if milliseconds < 0 else milliseconds * 1000000
    )


def sys_epoll_pwait(
    thread: Thread, epoll: int, events: int, count: int, limit: int, mask: int, size: int
) -> int:
    return with_mask(
        thread, mask, size, lambda: sys_epoll_wait(thread, epoll, events, count, limit)
    )


def sys_epoll_pwait2(
    thread: Thread, epoll: int, events: int, count: int, timeout: int, mask: int, size: int
) -> int:
    limit = timespec(thread, timeout)
    return with_mask(
        thread, mask, size, lambda: _epoll(thread, epoll, events, signed(count), limit)
    )


def _epoll(thread: Thread, epoll: int, events: int, count: int, limit: int | None) -> int:
    epoll = descriptor(thread, epoll)
    if count <= 0 or count > 1 << 24:
        return -EINVAL
    # Only as much as can be reported must be writable.
    place = buffer(thread, events, 12 * min(count, 4096), 2)
    count = min(count, 4096)
    deadline = None if limit is None else time.monotonic_ns() + limit
    while True:
        result = call(232, epoll, place, count, 0)
        if result or limit == 0:
            return result
        left = None if deadline is None else max(deadline - time.monotonic_ns(), 0)
        try:
            if thread.wait([(epoll, POLLIN)], left) is None:
                return call(232, epoll, place, count, 0)
        except Interrupted as error:
            raise Interrupted(False) from error
