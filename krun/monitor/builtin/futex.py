"""futex(2) between the payload's threads; between processes the host's own.

A waiter sits in a list under its word's host address and polls its signalfd; the waker takes it
out of the list and kicks it.  Words in shared mappings are the host kernel's business: there a
wait comes back every 50 ms to look for signals.
"""

from __future__ import annotations

import struct
import time

from krun.monitor.builtin import hostcall
from krun.monitor.builtin.areas import Fault
from krun.monitor.builtin.signals import Interrupted

TYPE_CHECKING = False
if TYPE_CHECKING:
    from krun.monitor.builtin.process import Process
    from krun.monitor.builtin.thread import Thread

EAGAIN, EINVAL, ENOSYS, ETIMEDOUT = 11, 22, 38, 110
WAIT, WAKE, REQUEUE, CMP_REQUEUE, WAKE_OP, WAIT_BITSET, WAKE_BITSET = 0, 1, 3, 4, 5, 9, 10
PRIVATE, CLOCK_REALTIME = 128, 256
INT = 0xFFFFFFFF
SECOND = 1000000000
SLICE = 50000000


class Waiter:
    """A thread that waits for a word."""

    __slots__ = ("bits", "key", "thread")

    def __init__(self, thread: Thread, key: int, bits: int) -> None:
        self.thread = thread
        self.key = key
        self.bits = bits


def _key(process: Process, address: int) -> tuple[int, bool]:
    """The word's host address, and whether other processes may share it; raises Fault."""
    if address & 3:
        raise ValueError
    area = process.memory.find(address)
    if area is None or area.slot is None or not area.prot & 1:
        raise Fault
    return area.hva + address - area.start, area.shared


def sys_futex(
    thread: Thread, address: int, operation: int, value: int, timeout: int, second: int, third: int
) -> int:
    process = thread.process
    command = operation & 127
    value &= INT
    if command not in (WAIT, WAKE, REQUEUE, CMP_REQUEUE, WAKE_OP, WAIT_BITSET, WAKE_BITSET):
        return -ENOSYS
    try:
        key, shared = _key(process, address)
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
        other, _ = _key(process, second)
    except ValueError:
        return -EINVAL
    if command == WAKE_OP:
        return _wake_op(thread, key, other, second, value, timeout & INT, third & INT)
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
            woken = thread.woken
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
                waiter.thread.woken = True
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
    deadline = None if limit is None else time.monotonic_ns() + limit
    while True:
        left = SLICE if deadline is None else min(deadline - time.monotonic_ns(), SLICE)
        if left <= 0:
            return -ETIMEDOUT
        end = time.monotonic_ns() + left
        place = thread.scratch.put(struct.pack("<qq", end // SECOND, end % SECOND), 1024)
        result = hostcall.call(202, key, WAIT_BITSET, value, place, 0, bits)
        if result != -ETIMEDOUT:
            return result
        try:
            thread.wait([], 0)
        except Interrupted as error:
            error.restart = limit is None
            raise
