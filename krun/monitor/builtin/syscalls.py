"""From the table to handlers: each system call number gets a function of (thread, registers).

A handler is made when its number is first used.  The generic ones check and translate each
argument by its kind and pass the call on; the others are the functions sys_NAME of the modules
that the table names.
"""

from __future__ import annotations

import _thread
import time
from _ctypes import get_errno

from krun.monitor.builtin import arguments, cpu, table
from krun.monitor.builtin.arguments import MAX_COUNT, Refused, buffer, descriptor, settle, within
from krun.monitor.builtin.hostcall import CALLS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from krun.monitor.builtin.thread import Thread

    Handler = Callable[[Thread, Any], int]
    Converter = Callable[[Thread, Any, int, int], int]

EIO, ENOSYS = 5, 38
ARGUMENTS = (cpu.RDI, cpu.RSI, cpu.RDX, cpu.R10, cpu.R8, cpu.R9)


def _value(thread: Thread, words: Any, value: int, extra: int) -> int:
    return value


def _narrow(thread: Thread, words: Any, value: int, extra: int) -> int:
    return value & 0xFFFFFFFF


def _length(thread: Thread, words: Any, value: int, extra: int) -> int:
    return min(value, MAX_COUNT)


def _descriptor(thread: Thread, words: Any, value: int, extra: int) -> int:
    return descriptor(thread, value)


def _directory(thread: Thread, words: Any, value: int, extra: int) -> int:
    return arguments.directory(thread, value)


def _path(thread: Thread, words: Any, value: int, extra: int) -> int:
    return arguments.path(thread, value, extra)


def _path_or_null(thread: Thread, words: Any, value: int, extra: int) -> int:
    return _path(thread, words, value, extra) if value else 0


def _string(thread: Thread, words: Any, value: int, extra: int) -> int:
    return arguments.string(thread, value, extra)


def _sized_in(thread: Thread, words: Any, value: int, extra: int) -> int:
    size = words[ARGUMENTS[extra]]
    return buffer(thread, value, size, 1)


def _sized_out(thread: Thread, words: Any, value: int, extra: int) -> int:
    size = words[ARGUMENTS[extra]]
    return buffer(thread, value, size, 2)


def _struct_in(thread: Thread, words: Any, value: int, extra: int) -> int:
    return buffer(thread, value, extra, 1)


def _struct_in_or_null(thread: Thread, words: Any, value: int, extra: int) -> int:
    return buffer(thread, value, extra, 1) if value else 0


def _struct_out(thread: Thread, words: Any, value: int, extra: int) -> int:
    return buffer(thread, value, extra, 2)


def _struct_out_or_null(thread: Thread, words: Any, value: int, extra: int) -> int:
    return buffer(thread, value, extra, 2) if value else 0


def converter(kind: str) -> tuple[Converter, int]:
    """The function that checks and translates an argument of a kind, and its parameter."""
    plain: dict[str, Converter] = {
        "v": _value,
        "u": _narrow,
        "fd": _descriptor,
        "at": _directory,
        "p": _path,
        "p?": _path_or_null,
        "s": _string,
    }
    if kind in plain:
        return plain[kind], 0
    null = kind.endswith("?")
    number = int(kind[1:].rstrip("?"))
    if kind[0] == "i":
        return _sized_in, number
    if kind[0] == "o":
        return _sized_out, number
    if kind[0] == "I":
        return (_struct_in_or_null if null else _struct_in), number
    return (_struct_out_or_null if null else _struct_out), number


def pass_on(number: int, kinds: tuple[str, ...], new_descriptor: bool) -> Handler:
    """A handler that makes the same call on the host with checked arguments."""
    call = CALLS[len(kinds)]
    if not kinds:

        def plain(thread: Thread, words: Any) -> int:
            result: int = call(number)
            return result if result != -1 else -get_errno()

        return plain

    plan: list[tuple[int, Converter, int]] = []
    strings = 0
    for index, kind in enumerate(kinds):
        convert, extra = converter(kind)
        if kind in ("p", "p?", "s"):
            extra = strings
            strings += 1
        if kind == "v" and (f"i{index}" in kinds or f"o{index}" in kinds):
            convert = _length
        plan.append((ARGUMENTS[index], convert, extra))
    first = plan[0]
    if len(plan) == 1 and first[1] is _value:

        def single(thread: Thread, words: Any) -> int:
            result: int = call(number, words[cpu.RDI])
            return result if result != -1 else -get_errno()

        if not new_descriptor:
            return single

    def general(thread: Thread, words: Any) -> int:
        try:
            values = [
                convert(thread, words, words[register], extra) for register, convert, extra in plan
            ]
        except Refused as refused:
            return -refused.errno
        result: int = call(number, *values)
        if result == -1:
            result = -get_errno()
        if thread.bounces:
            settle(thread)
        return within(thread, result) if new_descriptor else result

    return general


class Handlers(dict):  # type: ignore[type-arg]
    """Handlers by system call number, made on first use."""

    def __init__(self, statistics: bool = False, kill_unimplemented: bool = False) -> None:
        super().__init__()
        # What is imported while another thread forks would stay half imported in the child.
        self.lock = _thread.RLock()
        self.statistics = statistics
        self.kill_unimplemented = kill_unimplemented

    def __missing__(self, number: int) -> Handler:
        with self.lock:
            return self._made(number)

    def _made(self, number: int) -> Handler:
        table.load()
        kinds = table.KINDS.get(number)
        if kinds is None:
            handler = self._unimplemented(number)
        elif kinds and kinds[0][0] == "@":
            handler = special(table.NAMES[number], kinds[0][1:])
        else:
            handler = pass_on(number, kinds, number in table.NEW_DESCRIPTOR)
        if self.statistics:
            handler = _counted(number, handler)
        if len(self) < 1024:
            self[number] = handler
        return handler

    def _unimplemented(self, number: int) -> Handler:
        kill = self.kill_unimplemented

        def unimplemented(thread: Thread, words: Any) -> int:
            counts = thread.process.unimplemented
            if number not in counts and len(counts) < 1024:
                counts[number] = 0
                if thread.process.settings.verbose:
                    thread.process.say(f"system call {number} is not implemented")
            if number in counts:
                counts[number] += 1
            if kill:
                thread.process.fatal(thread, 31)
            return -ENOSYS

        return unimplemented


def _counted(number: int, handler: Handler) -> Handler:
    """A handler that notes calls, failures and time."""

    def counted(thread: Thread, words: Any) -> int:
        entry = thread.process.statistics.get(number)
        if entry is None:
            entry = thread.process.statistics[number] = [0, 0, 0.0]
        start = time.perf_counter()
        result = 0
        try:
            result = handler(thread, words)
            return result
        finally:
            entry[0] += 1
            if -4096 < result < 0:
                entry[1] += 1
            entry[2] += time.perf_counter() - start

    return counted


def special(name: str, module: str) -> Handler:
    """The handler of a call that the monitor does itself, by its arity."""
    # Its modules are imported when they are needed; run.preload does it before pivot_root.
    parent = __import__("krun.monitor.builtin", fromlist=[module])
    function = getattr(getattr(parent, module), f"sys_{name}")
    arity = function.__code__.co_argcount - 1
    registers = ARGUMENTS[:arity]

    def call(thread: Thread, words: Any) -> int:
        try:
            return function(thread, *[words[register] for register in registers])  # type: ignore[no-any-return]
        except Refused as refused:
            return -refused.errno
        except OSError as error:
            # What the monitor needed for it was not to be had: descriptors, memory.
            return -(error.errno or EIO)
        finally:
            if thread.bounces:
                settle(thread)

    return call
