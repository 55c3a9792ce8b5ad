"""System calls that may wait, and those about signals: no signal is lost while one waits."""

from __future__ import annotations

import struct
import time

from krun.monitor.builtin import cpu, signals
from krun.monitor.builtin.areas import Fault
from krun.monitor.builtin.files import INT, descriptor, signed
from krun.monitor.builtin.hostcall import call
from krun.monitor.builtin.signals import (
    DEFAULT,
    NEVER,
    SIG_DFL,
    SIG_IGN,
    SIGCHLD,
    Action,
    Interrupted,
    bit,
)
from krun.monitor.builtin.syscalls import buffer

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from krun.monitor.builtin.thread import Thread

EINTR, EAGAIN, EFAULT, EINVAL, ESRCH, EBADF, ENOMEM, EPERM, ECHILD = 4, 11, 14, 22, 3, 9, 12, 1, 10
EMFILE = 24
POLLIN, POLLOUT, POLLPRI, POLLERR, POLLHUP, POLLNVAL = 1, 4, 2, 8, 16, 32
SECOND = 1000000000
WNOHANG = 1


def timespec(thread: Thread, address: int) -> int | None:
    """Nanoseconds of a struct timespec; None for NULL; raises Fault or ValueError."""
    if not address:
        return None
    seconds, nanoseconds = struct.unpack("<qq", thread.process.memory.read(address, 16))
    if seconds < 0 or not 0 <= nanoseconds < SECOND:
        raise ValueError
    return min(int(seconds) * SECOND + int(nanoseconds), 1 << 62)


def with_mask(thread: Thread, address: int, size: int, wait: Callable[[], int]) -> int:
    """Do a wait under another signal mask, as ppoll(2) and its kin do."""
    if not address:
        return wait()
    if size != 8:
        return -EINVAL
    mask = int.from_bytes(thread.process.memory.read(address, 8), "little")
    before = thread.mask
    thread.set_mask(mask)
    try:
        result = wait()
    except Interrupted:
        # The handler runs under the wait's mask; the frame brings the old one back.
        thread.saved_mask = before
        raise
    thread.set_mask(before)
    return result


# poll, select, epoll.


def sys_poll(thread: Thread, address: int, count: int, milliseconds: int) -> int:
    limit = signed(milliseconds)
    return _poll(thread, address, count & INT, None if limit < 0 else limit * 1000000)


def sys_ppoll(thread: Thread, address: int, count: int, timeout: int, mask: int, size: int) -> int:
    try:
        limit = timespec(thread, timeout)
    except ValueError:
        return -EINVAL
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
    try:
        limit = timespec(thread, timeout)
    except ValueError:
        return -EINVAL
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
    try:
        limit = timespec(thread, timeout)
    except ValueError:
        return -EINVAL
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


# Time.


def sys_nanosleep(thread: Thread, request: int, remain: int) -> int:
    try:
        limit = timespec(thread, request)
    except ValueError:
        return -EINVAL
    if limit is None:
        return -EFAULT
    return _sleep(thread, limit, remain)


def _sleep(thread: Thread, limit: int, remain: int) -> int:
    start = time.monotonic_ns()
    try:
        thread.wait([], limit)
    except Interrupted as error:
        if remain:
            left = max(limit - (time.monotonic_ns() - start), 0)
            thread.process.memory.write(remain, struct.pack("<qq", left // SECOND, left % SECOND))
        raise Interrupted(False) from error
    return 0


def sys_clock_nanosleep(thread: Thread, clock: int, flags: int, request: int, remain: int) -> int:
    clock = signed(clock)
    try:
        limit = timespec(thread, request)
    except ValueError:
        return -EINVAL
    if limit is None:
        return -EFAULT
    if clock not in (0, 1, 2, 7, 11):
        return -EINVAL
    if not flags & 1:
        return _sleep(thread, limit, remain)
    while True:
        left = limit - time.clock_gettime_ns(clock)
        if left <= 0:
            return 0
        _sleep(thread, left, 0)


def sys_pause(thread: Thread) -> int:
    try:
        while True:
            thread.wait([])
    except Interrupted as error:
        raise Interrupted(False) from error


# Signals.


def sys_rt_sigaction(thread: Thread, signal: int, new: int, old: int, size: int) -> int:
    signal &= INT
    if size != 8 or not 0 < signal < 65 or (new and bit(signal) & NEVER):
        return -EINVAL
    process = thread.process
    memory = process.memory
    action = None
    if new:
        handler, flags, restorer, mask = struct.unpack("<QQQQ", memory.read(new, 32))
        action = Action(handler, flags, restorer, mask & ~NEVER)
    before = process.actions.get(signal, DEFAULT)
    if action is not None:
        if action.handler not in (SIG_DFL, SIG_IGN) and before.handler in (SIG_DFL, SIG_IGN):
            # What came while nobody cared must not reach the new handler.
            if signal == SIGCHLD and not thread.mask & bit(signal):
                signals.take(thread, bit(signal))
        elif action.handler == SIG_IGN or (
            action.handler == SIG_DFL and signal in signals.IGNORED_BY_DEFAULT
        ):
            while signals.take(thread, bit(signal)):
                pass
        process.set_action(signal, action)
    if old:
        memory.write(
            old,
            struct.pack("<QQQQ", before.handler, before.flags, before.restorer, before.mask),
        )
    return 0


def sys_rt_sigprocmask(thread: Thread, how: int, new: int, old: int, size: int) -> int:
    if size != 8:
        return -EINVAL
    memory = thread.process.memory
    before = thread.mask
    if new:
        mask = int.from_bytes(memory.read(new, 8), "little")
        how &= INT
        if how == 0:
            mask |= before
        elif how == 1:
            mask = before & ~mask
        elif how != 2:
            return -EINVAL
        thread.set_mask(mask)
    if old:
        memory.write(old, before.to_bytes(8, "little"))
    return 0


def sys_rt_sigpending(thread: Thread, address: int, size: int) -> int:
    if size > 8:
        return -EINVAL
    result = call(127, thread.scratch.address, 8)
    if result < 0:
        return result
    pending = int.from_bytes(thread.scratch.get(8), "little") & thread.mask
    thread.process.memory.write(address, pending.to_bytes(8, "little")[:size])
    return 0


def sys_rt_sigtimedwait(thread: Thread, wanted: int, info: int, timeout: int, size: int) -> int:
    if size != 8:
        return -EINVAL
    memory = thread.process.memory
    mask = int.from_bytes(memory.read(wanted, 8), "little") & ~NEVER & ~bit(signals.KICK)
    try:
        limit = timespec(thread, timeout)
    except ValueError:
        return -EINVAL
    # While it waits the signals are blocked, whatever the mask says.
    before = thread.mask
    thread.set_mask(before | mask)
    deadline = None if limit is None else time.monotonic_ns() + limit
    try:
        while True:
            if thread.attention:
                thread.attend()
            found = signals.take(thread, mask)
            if found is not None:
                if info:
                    memory.write(info, found[1])
                return found[0]
            left = None if deadline is None else deadline - time.monotonic_ns()
            if left is not None and left <= 0:
                return -EAGAIN
            thread.wait([], left, mask)
    except Interrupted as error:
        raise Interrupted(False) from error
    finally:
        thread.set_mask(before)


def sys_rt_sigsuspend(thread: Thread, address: int, size: int) -> int:
    if size != 8:
        return -EINVAL
    mask = int.from_bytes(thread.process.memory.read(address, 8), "little")
    before = thread.mask
    thread.set_mask(mask)
    try:
        while True:
            thread.wait([])
    except Interrupted as error:
        thread.saved_mask = before
        raise Interrupted(False) from error


def sys_sigaltstack(thread: Thread, new: int, old: int) -> int:
    memory = thread.process.memory
    base, flags, size = thread.altstack
    stack = thread.processor.words[cpu.RSP]
    on_stack = bool(size) and base <= stack < base + size
    replacement = None
    if new:
        if on_stack and not flags & signals.SS_AUTODISARM:
            return -EPERM
        start, wanted, length = struct.unpack("<QI4xQ", memory.read(new, 24))
        mode = wanted & ~signals.SS_AUTODISARM
        if mode not in (0, signals.SS_ONSTACK, signals.SS_DISABLE):
            return -EINVAL
        if mode == signals.SS_DISABLE:
            replacement = (0, signals.SS_DISABLE, 0)
        elif length < 2048:
            return -ENOMEM
        else:
            replacement = (start, wanted & signals.SS_AUTODISARM, length)
    if old:
        shown = (signals.SS_ONSTACK if on_stack else 0) if size else signals.SS_DISABLE
        memory.write(
            old,
            struct.pack("<QI4xQ", base, shown | (flags & signals.SS_AUTODISARM), size),
        )
    if replacement is not None:
        thread.altstack = replacement
    return 0


def sys_kill(thread: Thread, pid: int, signal: int) -> int:
    return call(62, signed(pid), signal & INT)


def sys_tkill(thread: Thread, tid: int, signal: int) -> int:
    return call(200, signed(tid), signal & INT)


def sys_tgkill(thread: Thread, group: int, tid: int, signal: int) -> int:
    return call(234, signed(group), signed(tid), signal & INT)


def sys_rt_sigqueueinfo(thread: Thread, pid: int, signal: int, info: int) -> int:
    place = thread.scratch.put(thread.process.memory.read(info, 128), 1024)
    return call(129, signed(pid), signal & INT, place)


def sys_rt_tgsigqueueinfo(thread: Thread, group: int, tid: int, signal: int, info: int) -> int:
    place = thread.scratch.put(thread.process.memory.read(info, 128), 1024)
    return call(297, signed(group), signed(tid), signal & INT, place)


def sys_pidfd_send_signal(thread: Thread, fd: int, signal: int, info: int, flags: int) -> int:
    place = 0
    if info:
        place = thread.scratch.put(thread.process.memory.read(info, 128), 1024)
    return call(424, descriptor(thread, fd), signal & INT, place, flags)


def sys_signalfd(thread: Thread, fd: int, mask: int, size: int) -> int:
    return sys_signalfd4(thread, fd, mask, size, 0)


def sys_signalfd4(thread: Thread, fd: int, mask: int, size: int, flags: int) -> int:
    if size != 8:
        return -EINVAL
    if signed(fd) != -1:
        fd = descriptor(thread, fd)
    members = int.from_bytes(thread.process.memory.read(mask, 8), "little") & ~bit(signals.KICK)
    place = thread.scratch.put(members.to_bytes(8, "little"), 1024)
    result = call(289, signed(fd), place, 8, flags)
    if result >= thread.process.floor:
        call(3, result)
        return -EMFILE
    return result


# Children.


def sys_wait4(thread: Thread, pid: int, status: int, options: int, usage: int) -> int:
    memory = thread.process.memory
    view = thread.scratch.view

    def attempt() -> int:
        place = thread.scratch.address + 1024
        return call(61, signed(pid), place, (options & INT) | WNOHANG, place + 16)

    result = _children(thread, attempt, bool(options & WNOHANG))
    if result > 0:
        if status:
            memory.write(status, view[1024:1028])
        if usage:
            memory.write(usage, view[1040:1184])
    return result


def sys_waitid(thread: Thread, kind: int, number: int, info: int, options: int, usage: int) -> int:
    memory = thread.process.memory
    kind &= INT
    if kind == 3:
        number = descriptor(thread, number)
    view = thread.scratch.view

    def attempt() -> int:
        view[1024:1344] = bytes(320)
        place = thread.scratch.address + 1024
        result = call(247, kind, signed(number), place, (options & INT) | WNOHANG, place + 128)
        if result < 0:
            return result
        return 1 if any(view[1024:1040]) else 0

    result = _children(thread, attempt, bool(options & WNOHANG))
    if result < 0:
        if info:
            # Linux writes the fields in any case, and says EFAULT where it cannot.
            memory.write(info, bytes(12))
            memory.write(info + 16, bytes(12))
        return result
    if info:
        memory.write(info, view[1024:1152])
    if usage and result:
        memory.write(usage, view[1152:1296])
    return 0


def _children(thread: Thread, attempt: Callable[[], int], at_once: bool) -> int:
    """Try, and wait for SIGCHLD between tries; every thread keeps that one blocked."""
    process = thread.process
    taken: bytes | None = None
    result = attempt()
    if result or at_once:
        return result
    if process.actions.get(SIGCHLD, DEFAULT).handler == SIG_IGN:
        return _ignored_children(thread, attempt)
    # Whichever thread takes SIGCHLD wakes these (signals.take).
    process.child_waiters.add(thread)
    try:
        while True:
            thread.woken = False
            result = attempt()
            if result:
                return result
            if process.handled & bit(SIGCHLD) and not thread.mask & bit(SIGCHLD):
                # Its handler runs after the call, so a child that is there goes first.
                try:
                    thread.wait([])
                except Interrupted:
                    result = attempt()
                    if not result:
                        raise
                    thread.requeue()
                    return result
            else:
                thread.wait([], None, bit(SIGCHLD))
                found = signals.take(thread, bit(SIGCHLD))
                if found is not None:
                    taken = found[1]
    finally:
        process.child_waiters.discard(thread)
        thread.woken = False
        if taken is not None and thread.mask & bit(SIGCHLD):
            # Who blocks SIGCHLD looks for it later.
            place = thread.scratch.put(taken, 2048)
            call(129, process.memory.pid, SIGCHLD, place)


def _ignored_children(thread: Thread, attempt: Callable[[], int]) -> int:
    """Without zombies and SIGCHLD only the last child's end is told, by ECHILD."""
    while True:
        result = attempt()
        if result:
            return result
        thread.wait([], 10000000)
