"""System calls that wait for children."""

from __future__ import annotations

from krun.monitor.builtin import signals
from krun.monitor.builtin.arguments import INT, descriptor, signed
from krun.monitor.builtin.hostcall import call
from krun.monitor.builtin.signals import DEFAULT, SIG_IGN, SIGCHLD, Interrupted, bit

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from krun.monitor.builtin.thread import Thread

WNOHANG = 1
SLICE = 20000000


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
            elif process.crowd and thread.mask & bit(SIGCHLD):
                # Other threads', too: it stays pending for them, or they may be the first to take
                # it, and not by signals.take: from a signalfd.
                thread.wait([], SLICE, 0 if _pending(thread) else bit(SIGCHLD))
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


def _pending(thread: Thread) -> bool:
    call(127, thread.scratch.address, 8)
    return bool(int.from_bytes(thread.scratch.get(8), "little") & bit(SIGCHLD))


def _ignored_children(thread: Thread, attempt: Callable[[], int]) -> int:
    """Without zombies and SIGCHLD only the last child's end is told, by ECHILD."""
    while True:
        result = attempt()
        if result:
            return result
        thread.wait([], 10000000)
