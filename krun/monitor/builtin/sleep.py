"""System calls that wait for a time."""

from __future__ import annotations

import struct
import time

from krun.monitor.builtin.arguments import SECOND, signed, timespec
from krun.monitor.builtin.signals import Interrupted

TYPE_CHECKING = False
if TYPE_CHECKING:
    from krun.monitor.builtin.thread import Thread

EFAULT, EINVAL = 14, 22


def sys_nanosleep(thread: Thread, request: int, remain: int) -> int:
    limit = timespec(thread, request)
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
    limit = timespec(thread, request)
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
