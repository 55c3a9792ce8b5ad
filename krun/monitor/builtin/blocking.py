"""Host calls that block where nothing can be polled: a signal for the payload must end them.

    payload's thread                         another thread of the monitor
    ────────────────                         ─────────────────────────────
    starts it, waits for signals  ─────────▶ makes the call, the kick unblocked
    a signal: kicks until the call ended ──▶ the kernel ends the call with EINTR
    takes the result              ◀───────── wakes the payload's thread

The kick has a handler that does nothing (Process makes it): without one the kernel would not
return from the call.  No other thread ever has it unblocked.
"""

from __future__ import annotations

import _thread
import time

from krun.monitor.builtin import signals
from krun.monitor.builtin.hostcall import Scratch, call
from krun.monitor.builtin.signals import ALL, KICK, Interrupted, bit

TYPE_CHECKING = False
if TYPE_CHECKING:
    from krun.monitor.builtin.thread import Thread

EINTR, EAGAIN = 4, 11
RETRY = 0.0005


def can_interrupt(thread: Thread) -> bool:
    """Whether anything but a signal's default action could end a call of this thread."""
    process = thread.process
    return bool(process.crowd or process.handled & ~thread.mask)


def interruptible(thread: Thread, number: int, *arguments: int) -> int:
    """Make a call that may block; raises Interrupted when a signal of the payload ended it."""
    if not can_interrupt(thread):
        return call(number, *arguments)
    process = thread.process
    results: list[int] = []
    tids: list[int] = []
    done = _thread.allocate_lock()
    done.acquire()

    def make() -> None:
        try:
            scratch = Scratch(4096)
            scratch.view[0:8] = (ALL & ~bit(KICK)).to_bytes(8, "little")
            call(signals.SYS_rt_sigprocmask, 2, scratch.address, 0, 8)
            scratch.release()
            tids.append(_thread.get_native_id())
            results.append(call(number, *arguments))
        except OSError:
            results.append(-EAGAIN)
        thread.woken = True
        process.kick(thread)
        done.release()

    thread.woken = False
    try:
        _thread.start_new_thread(make, ())
    except RuntimeError:
        return -EAGAIN
    try:
        while not results:
            thread.wait([])
    except Interrupted:
        _end(thread, tids, results)
        if results[0] == -EINTR:
            raise
        thread.requeue()
    except BaseException:
        # The whole process ends, or executes another program.
        _end(thread, tids, results)
        raise
    finally:
        done.acquire()
        thread.woken = False
    return results[0]


def _end(thread: Thread, tids: list[int], results: list[int]) -> None:
    """Kick until the call has ended: a kick may come before the kernel is in it."""
    while not results:
        if tids:
            call(signals.SYS_tgkill, thread.process.memory.pid, tids[0], KICK)
        time.sleep(RETRY)
