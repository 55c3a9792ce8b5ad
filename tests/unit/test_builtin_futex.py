"""The built-in monitor's futexes: who waits is in the line, and who does not is not."""

from __future__ import annotations

import _thread
from types import SimpleNamespace
from typing import Any

from krun.monitor.builtin import futex
from krun.monitor.builtin.memory import Memory

PRIVATE_ANONYMOUS = 0x22
WAIT, WAKE, PRIVATE = 0, 1, 128


def test_who_was_not_woken_leaves_the_line() -> None:
    """What ends a thread's wait may be meant for another of its waits, and late."""
    memory = Memory(1 << 30, lambda *slot: None, lambda: None)
    lock = _thread.allocate_lock()
    process: Any = SimpleNamespace(memory=memory, waiters={}, futex_lock=lock)
    process.kick = lambda thread: None
    thread: Any = SimpleNamespace(process=process, woken=False)

    def wait(polled: list[tuple[int, int]], timeout: int | None = None) -> list[int]:
        thread.woken = True
        return []

    thread.wait = wait
    try:
        address = memory.map(0, 4096, 3, PRIVATE_ANONYMOUS)
        assert futex.sys_futex(thread, address, WAIT | PRIVATE, 0, 0, 0, 0) == 0
        assert futex.sys_futex(thread, address, WAKE | PRIVATE, 1, 0, 0, 0) == 0
    finally:
        memory.release()
