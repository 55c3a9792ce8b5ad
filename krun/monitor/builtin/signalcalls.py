"""System calls about signals: no signal is lost while one is waited for."""

from __future__ import annotations

import struct
import time

from krun.monitor.builtin import cpu, signals
from krun.monitor.builtin.areas import Fault
from krun.monitor.builtin.arguments import INT, descriptor, signed, timespec, within
from krun.monitor.builtin.hostcall import call
from krun.monitor.builtin.polling import under_mask
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
from krun.monitor.builtin.thread import Entered, Thread

EPERM, EINTR, EAGAIN, ENOMEM, EINVAL = 1, 4, 11, 12, 22


def sys_pause(thread: Thread) -> int:
    try:
        while True:
            thread.wait([])
    except Interrupted as error:
        raise Interrupted(False) from error


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
    limit = timespec(thread, timeout)
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

    def forever() -> int:
        while True:
            thread.wait([])

    try:
        return under_mask(thread, mask, forever)
    except Interrupted as error:
        raise Interrupted(False) from error


def sys_rt_sigreturn(thread: Thread) -> int:
    stack = thread.processor.words[cpu.RSP]
    try:
        context = signals.sigreturn(thread, stack)
    except Fault:
        thread.process.fatal(thread, signals.SIGSEGV)
    thread.enter(context)
    raise Entered


def sys_restart_syscall(thread: Thread) -> int:
    return -EINTR


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
    return within(thread, call(289, signed(fd), place, 8, flags))
