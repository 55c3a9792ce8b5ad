"""futex(2) between the payload's threads; between processes the host's own.

A waiter sits in a list under its word's host address and polls its signalfd; the waker takes it
out of the list and kicks it.  Words in shared mappings are the host kernel's business: there a
wait comes back every 50 ms to look for signals.  So are priority-inheriting futexes everywhere:
a payload thread's id is its host thread's, which is what such a word holds.
"""

from __future__ import annotations

import struct
import time

from krun.monitor.builtin import hostcall
from krun.monitor.builtin.areas import Fault
from krun.monitor.builtin.signals import Interrupted
from krun.monitor.builtin.space import TASK_SIZE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from krun.monitor.builtin.process import Process
    from krun.monitor.builtin.thread import Thread

EAGAIN, EINVAL, ENOSYS, ETIMEDOUT = 11, 22, 38, 110
WAIT, WAKE, REQUEUE, CMP_REQUEUE, WAKE_OP, WAIT_BITSET, WAKE_BITSET = 0, 1, 3, 4, 5, 9, 10
LOCK_PI, UNLOCK_PI, TRYLOCK_PI, LOCK_PI2 = 6, 7, 8, 13
PRIVATE, CLOCK_REALTIME = 128, 256
INT = 0xFFFFFFFF
SECOND = 1000000000
SLICE = 50000000


class Waiter:
    """A thread that waits for a word."""

    __slots__ = ("bits", "key", "thread", "woken")

    def __init__(self, thread: Thread, key: int, bits: int) -> None:
        self.thread = thread
        self.key = key
        self.bits = bits
        self.woken = False


def _key(process: Process, address: int, private: int = 0) -> tuple[int, bool]:
    """The word's host address, and whether other processes may share it; raises Fault.

    A private word need not be there to be woken: then something that stands for no host address.
    """
    if address & 3:
        raise ValueError
    area = process.memory.find(address)
    if area is None or area.slot is None or not area.prot & 1:
        if private and address <= TASK_SIZE:
            return -address, False
        raise Fault
    return area.hva + address - area.start, area.shared


def sys_futex(
    thread: Thread, address: int, operation: int, value: int, timeout: int, second: int, third: int
) -> int:
    process = thread.process
    command = operation & 127
    value &= INT
    if command in (LOCK_PI, UNLOCK_PI, TRYLOCK_PI, LOCK_PI2):
        return _priority(thread, address, operation, timeout)
    if command not in (WAIT, WAKE, REQUEUE, CMP_REQUEUE, WAKE_OP, WAIT_BITSET, WAKE_BITSET):
        return -ENOSYS
    try:
        key, shared = _key(process, address, operation & PRIVATE)
    except ValueError:
        return -EINVAL
    if command in (WAIT, WAIT_BITSET):
        limit = None
        if timeout:
            seconds, nanoseconds = struct.unpack("<qq", process.memory.read(timeout, 16))
            if seconds < 0 or not 0 <= nanoseconds < SECOND:
                return -EINVAL
            limit = min(seconds * SECOND + nanoseconds, 1 << 62)
            if command == WAIT_BITSET:
                clock = 0 if operation & CLOCK_REALTIME else 1
                limit = max(limit - time.clock_gettime_ns(clock), 0)
        bits = third & INT if command == WAIT_BITSET else INT
        if not bits:
            return -EINVAL
        if shared and not operation & PRIVATE:
            return _shared_wait(thread, key, value, bits, limit)
        return _wait(thread, address, key, value, bits, limit)
    if command in (WAKE, WAKE_BITSET):
        bits = third & INT if command == WAKE_BITSET else INT
        if not bits:
            return -EINVAL
        woken = wake(process, key, value, bits)
        if shared and not operation & PRIVATE:
            result = hostcall.call(202, key, WAKE_BITSET, value, 0, 0, bits)
            return woken + max(result, 0)
        return woken
    try:
        other, _ = _key(process, second, operation & PRIVATE)
    except ValueError:
        return -EINVAL
    if command == WAKE_OP:
        return _wake_op(thread, key, other, second, value, timeout & INT, third & INT)
    if (value | timeout) & 1 << 31:
        return -EINVAL
    if command == CMP_REQUEUE and process.memory.word(address) != third & INT:
        return -EAGAIN
    return _requeue(process, key, other, value, timeout & INT, command == CMP_REQUEUE)


def _wait(thread: Thread, address: int, key: int, value: int, bits: int, limit: int | None) -> int:
    process = thread.process
    waiter = Waiter(thread, key, bits)
    with process.futex_lock:
        if process.memory.word(address) != value:
            return -EAGAIN
        thread.woken = False
        process.waiters.setdefault(key, []).append(waiter)
    interrupted = None
    found: list[int] | None = []
    try:
        found = thread.wait([], limit)
    except Interrupted as error:
        interrupted = error
    finally:
        with process.futex_lock:
            # Not the thread's: a late word of a child, say, may have ended the wait.
            woken = waiter.woken
            thread.woken = False
            if not woken:
                _leave(process, waiter)
    if interrupted is not None:
        if woken:
            thread.requeue()
            return 0
        interrupted.restart = limit is None
        raise interrupted
    if woken:
        return 0
    return -ETIMEDOUT if found is None else 0


def _leave(process: Process, waiter: Waiter) -> None:
    line = process.waiters.get(waiter.key, [])
    if waiter in line:
        line.remove(waiter)
    if not line:
        process.waiters.pop(waiter.key, None)


def wake(process: Process, key: int, count: int, bits: int = INT) -> int:
    """Wake up to `count` waiters of a word; how many there were."""
    woken: list[Waiter] = []
    with process.futex_lock:
        line = process.waiters.get(key)
        if not line:
            return 0
        for waiter in list(line):
            if len(woken) >= count:
                break
            if waiter.bits & bits:
                line.remove(waiter)
                waiter.woken = waiter.thread.woken = True
                woken.append(waiter)
        if not line:
            del process.waiters[key]
    for waiter in woken:
        process.kick(waiter.thread)
    return len(woken)


def _requeue(
    process: Process, key: int, other: int, count: int, move: int, tell_moved: bool
) -> int:
    woken = wake(process, key, count)
    moved = 0
    with process.futex_lock:
        line = process.waiters.get(key, [])
        while line and moved < move and key != other:
            waiter = line.pop(0)
            waiter.key = other
            process.waiters.setdefault(other, []).append(waiter)
            moved += 1
        if not line:
            process.waiters.pop(key, None)
    return woken + moved if tell_moved or moved else woken


def _wake_op(
    thread: Thread, key: int, other: int, address: int, first: int, second: int, code: int
) -> int:
    """FUTEX_WAKE_OP: change the second word, wake on the first, and maybe on the second."""
    process = thread.process
    operation, comparison = code >> 28 & 15, code >> 24 & 15
    operand, expected = _signed12(code >> 12), _signed12(code)
    if operation & 8:
        operand = 1 << (operand & 31)
    with process.futex_lock:
        old = process.memory.word(address)
        results = {
            0: operand,
            1: old + operand,
            2: old | operand,
            3: old & ~operand,
            4: old ^ operand,
        }
        if operation & 7 not in results:
            return -ENOSYS
        process.memory.write(address, (results[operation & 7] & INT).to_bytes(4, "little"))
    value = old - (1 << 32) if old & 1 << 31 else old
    holds = {
        0: value == expected,
        1: value != expected,
        2: value < expected,
        3: value <= expected,
        4: value > expected,
        5: value >= expected,
    }.get(comparison, False)
    woken = wake(process, key, first)
    if holds:
        woken += wake(process, other, second)
    return woken


def _signed12(value: int) -> int:
    value &= 0xFFF
    return value - 0x1000 if value & 0x800 else value


def _shared_wait(thread: Thread, key: int, value: int, bits: int, limit: int | None) -> int:
    def attempt(place: int) -> int:
        return hostcall.call(202, key, WAIT_BITSET, value, place, 0, bits)

    try:
        return _in_slices(thread, attempt, time.monotonic_ns, limit)
    except Interrupted as error:
        error.restart = limit is None
        raise


def _in_slices(
    thread: Thread,
    attempt: Callable[[int], int],
    clock: Callable[[], int],
    limit: int | None,
) -> int:
    """Wait in the host's kernel for `limit` nanoseconds, coming back to look for signals.

    attempt(address of a struct timespec in clock's time) makes the call.  Raises Interrupted.
    """
    deadline = None if limit is None else clock() + limit
    while True:
        left = SLICE if deadline is None else min(deadline - clock(), SLICE)
        if left <= 0 and deadline is not None:
            return -ETIMEDOUT
        end = clock() + left
        place = thread.scratch.put(struct.pack("<qq", end // SECOND, end % SECOND), 1024)
        result = attempt(place)
        if result != -ETIMEDOUT:
            return result
        thread.wait([], 0)


def _priority(thread: Thread, address: int, operation: int, timeout: int) -> int:
    """The priority-inheriting operations: the host kernel's, on the word in guest memory."""
    memory = thread.process.memory
    if address & 3:
        return -EINVAL
    key = memory.host(address, 4, 2)
    command = operation & 127
    if command in (UNLOCK_PI, TRYLOCK_PI):
        return hostcall.call(202, key, operation, 0, 0, 0, 0)
    limit = None
    monotonic = command == LOCK_PI2 and not operation & CLOCK_REALTIME
    clock = time.monotonic_ns if monotonic else time.time_ns
    if timeout:
        seconds, nanoseconds = struct.unpack("<qq", memory.read(timeout, 16))
        if seconds < 0 or not 0 <= nanoseconds < SECOND:
            return -EINVAL
        limit = max(min(seconds * SECOND + nanoseconds, 1 << 62) - clock(), 0)
        if not limit:
            result = hostcall.call(202, key, TRYLOCK_PI | (operation & PRIVATE), 0, 0, 0, 0)
            return -ETIMEDOUT if result == -EAGAIN else result
    try:
        return _in_slices(
            thread, lambda place: hostcall.call(202, key, operation, 0, place, 0, 0), clock, limit
        )
    except Interrupted as error:
        # futex(2): a signal never ends these; they go on after the handler.
        error.always = True
        raise


# Robust lists: set_robust_list(2), Documentation/locking/robust-futexes.rst.

WAITERS, OWNER_DIED, OWNER = 0x80000000, 0x40000000, 0x3FFFFFFF
MOST = 2048


def abandon(thread: Thread) -> None:
    """Mark the robust futexes that an ending thread still holds, and wake a waiter of each."""
    memory = thread.process.memory
    head = thread.robust_list
    thread.robust_list = 0
    try:
        entry, offset, pending = struct.unpack("<QqQ", memory.read(head, 24))
        seen = 0
        while entry & ~1 != head and seen < MOST:
            following = struct.unpack("<Q", memory.read(entry & ~1, 8))[0]
            if entry != pending:
                _owner_died(thread, (entry & ~1) + offset, bool(entry & 1))
            entry = following
            seen += 1
        if pending:
            _owner_died(thread, (pending & ~1) + offset, bool(pending & 1))
    except Fault:
        # As the kernel does with a list that leads nowhere.
        return


def _owner_died(thread: Thread, address: int, priority: bool) -> None:
    process = thread.process
    key, shared = _key(process, address & ~3)
    with process.futex_lock:
        value = process.memory.word(address)
        if value & OWNER != thread.tid or priority:
            return
        changed = (value & WAITERS) | OWNER_DIED
        process.memory.write(address, changed.to_bytes(4, "little"))
    if value & WAITERS:
        wake(process, key, 1)
        if shared:
            hostcall.call(202, key, WAKE, 1, 0, 0, 0)
