"""System calls that make threads and processes, and end them: clone(2), exit(2) and their kin."""

from __future__ import annotations

import _thread
import os
import struct

from krun.errors import KrunError
from krun.monitor.builtin import cpu, hostcall, kvm, signals
from krun.monitor.builtin.areas import Fault, OutOfMemory
from krun.monitor.builtin.arguments import INT, within
from krun.monitor.builtin.hostcall import call
from krun.monitor.builtin.kvm import Processor
from krun.monitor.builtin.process import Process
from krun.monitor.builtin.signals import ALL, NEVER, STOP_BITS
from krun.monitor.builtin.thread import ProcessExit, Renewed, Thread, ThreadExit
from krun.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

POLLIN = 1
EPERM, ESRCH, E2BIG, EAGAIN, EINVAL = 1, 3, 7, 11, 22

CLONE_VM, CLONE_SIGHAND, CLONE_PIDFD = 0x100, 0x800, 0x1000
CLONE_VFORK, CLONE_THREAD, CLONE_SETTLS = 0x4000, 0x10000, 0x80000
CLONE_PARENT_SETTID, CLONE_CHILD_CLEARTID, CLONE_CHILD_SETTID = 0x100000, 0x200000, 0x1000000
CLONE_CLEAR_SIGHAND = 1 << 32
NAMESPACES = 0x7E020080  # CLONE_NEW*
THREAD = CLONE_VM | CLONE_SIGHAND | CLONE_THREAD


class Wanted(Record):
    """What clone(2) or clone3(2) is asked for; addresses are the payload's, 0 for none."""

    flags: int
    signal: int = signals.SIGCHLD
    stack: int = 0
    parent_tid: int = 0
    child_tid: int = 0
    tls: int = 0
    pidfd: int = 0


class Parent(Record):
    """What a child of fork takes over from the processor that its parent runs on."""

    regs: list[int]
    fs_base: int
    gs_base: int
    xsave: bytearray


def sys_clone(
    thread: Thread, flags: int, stack: int, parent_tid: int, child_tid: int, tls: int
) -> int:
    flags &= INT
    # The descriptor of a process goes where the parent's view of a tid would.
    return _clone(
        thread, Wanted(flags & ~0xFF, flags & 0xFF, stack, parent_tid, child_tid, tls, parent_tid)
    )


def sys_clone3(thread: Thread, address: int, size: int) -> int:
    if size < 64:
        return -EINVAL
    if size > 4096:
        return -E2BIG
    data = thread.process.memory.read(address, size).ljust(88, b"\0")
    if any(data[88:]):
        return -E2BIG
    flags, pidfd, child, parent, signal, stack, stack_size, tls, set_tid, _, _ = struct.unpack(
        "<11Q", data[:88]
    )
    if set_tid or signal > 64 or flags & 0xFF or bool(stack) != bool(stack_size):
        return -EINVAL
    if flags & 1 << 33:
        return -EINVAL
    return _clone(thread, Wanted(flags, signal, stack + stack_size, parent, child, tls, pidfd))


def sys_fork(thread: Thread) -> int:
    return _clone(thread, Wanted(0))


def sys_vfork(thread: Thread) -> int:
    return _clone(thread, Wanted(CLONE_VFORK | CLONE_VM))


def _clone(thread: Thread, wanted: Wanted) -> int:
    flags = wanted.flags
    if flags & NAMESPACES:
        return -EPERM
    if flags & CLONE_SIGHAND and not flags & CLONE_VM:
        return -EINVAL
    if flags & CLONE_THREAD:
        return _new_thread(thread, wanted) if flags & THREAD == THREAD else -EINVAL
    if flags & CLONE_VM and not flags & CLONE_VFORK:
        # Two processes in one memory: none of the programs this serves does that.
        return -EINVAL
    return _new_process(thread, wanted)


def _started(regs: list[int], wanted: Wanted) -> list[int]:
    """The caller's registers as the new one starts with them: 0 is returned, on its own stack."""
    return [0, *regs[1:6], wanted.stack or regs[6], *regs[7:]]


def _fs_base(thread: Thread, wanted: Wanted) -> int:
    return wanted.tls if wanted.flags & CLONE_SETTLS else thread.base(cpu.S_FS)


def _new_thread(thread: Thread, wanted: Wanted) -> int:
    process = thread.process
    flags = wanted.flags
    if not process.crowd:
        # Nobody else runs yet, so no signal can slip in between.
        process.crowd = ALL & ~NEVER & ~STOP_BITS
        thread.settle_masks()
    regs = _started(thread.context(), wanted)
    try:
        new = _fresh(process)
    except (OSError, OutOfMemory):
        return -EAGAIN
    new.mask = thread.mask
    fs_base = _fs_base(thread, wanted)
    ready = _thread.allocate_lock()
    ready.acquire()
    refused: list[int] = []

    def begin() -> None:
        new.tid = _thread.get_native_id()
        try:
            if flags & CLONE_CHILD_SETTID:
                process.memory.write(wanted.child_tid, struct.pack("<I", new.tid))
            if flags & CLONE_PARENT_SETTID:
                process.memory.write(wanted.parent_tid, struct.pack("<I", new.tid))
        except Fault:
            pass
        if flags & CLONE_CHILD_CLEARTID:
            new.clear_tid = wanted.child_tid
        try:
            new.start(regs, fs_base, new.gs)
            new.settle_masks()
        except OSError as error:
            refused.append(error.errno or EAGAIN)
            ready.release()
            return
        with process.lock:
            process.threads[new.tid] = new
            # What all were asked before it was one of them: other masks, or to end.
            new.attention = new.masks_stale = True
        ready.release()
        _carry(process, new)

    try:
        _thread.start_new_thread(begin, ())
    except RuntimeError:
        refused.append(EAGAIN)
    else:
        ready.acquire()
    if refused:
        with process.lock:
            process.spare(new)
        new.scratch.release()
        return -refused[0]
    return new.tid


def _fresh(process: Process) -> Thread:
    """A thread on a processor: one that another left, or a new one; raises OSError, OutOfMemory."""
    with process.memory.lock, process.lock:
        used = bool(process.idle)
        processor = process.idle.pop() if used else Processor(process.machine, process.memory)
        try:
            new = Thread(process, processor)
            new.gs_page()
        except (OSError, OutOfMemory):
            process.idle.append(processor)
            raise
    # It was told of no change while it stood idle.
    new.flush = used
    if process.settings.ring and processor.words[cpu.RIP] >= 1 << 63:
        _to_ring3(processor)
    return new


def _to_ring3(processor: Processor) -> None:
    """A processor that an ended thread left inside the stub goes back to ring 3."""
    sregs = processor.sregs()
    sregs[cpu.S_CS : cpu.S_CS + 24] = cpu.CODE3
    sregs[cpu.S_SS : cpu.S_SS + 24] = cpu.DATA3
    processor.set_sregs(sregs)


def _carry(process: Process, thread: Thread) -> None:
    """Run a thread to its end; what goes wrong with the machine ends the process."""
    try:
        process.carry(thread)
    except KrunError as error:
        process.say(str(error))
        os._exit(1)
    except BaseException as error:
        process.say(f"{type(error).__name__}: {error}")
        os._exit(1)


def _new_process(thread: Thread, wanted: Wanted) -> int:
    """fork: the host's copies the memory, and the child makes a VM of its own around it."""
    process = thread.process
    memory = process.memory
    flags = wanted.flags
    if flags & CLONE_PIDFD:
        memory.host(wanted.pidfd, 4, 2)
    if wanted.signal not in (0, signals.SIGCHLD):
        return -EINVAL
    parent = Parent(
        thread.context(), _fs_base(thread, wanted), thread.base(cpu.S_GS), thread.processor.xsave()
    )
    # No other thread holds a lock then, is about to import, or has its vfork's pipe half open.
    with process.handlers.lock, process.futex_lock, memory.lock, process.lock:
        pipe = _vfork_pipe(process) if flags & CLONE_VFORK else (-1, -1)
        try:
            pid = os.fork()
        except OSError as error:
            _close_pipe(process, pipe)
            return -(error.errno or EAGAIN)
        if pid == 0:
            process.child = True
        elif pipe[1] >= 0:
            os.close(pipe[1])
    if pid == 0:
        _reborn(thread, pipe)
        _begin_child(thread, wanted, parent)
    if flags & CLONE_PARENT_SETTID:
        memory.write(wanted.parent_tid, struct.pack("<I", pid))
    if flags & CLONE_PIDFD:
        memory.write(wanted.pidfd, struct.pack("<i", within(thread, call(434, pid, 0))))
    if flags & CLONE_VFORK:
        try:
            changed = _await_vfork(thread, pipe[0])
        finally:
            _close_pipe(process, (pipe[0], -1))
        if changed:
            memory.write(parent.regs[6], changed)
    return pid


def _vfork_pipe(process: Process) -> tuple[int, int]:
    """The pipe whose other end a vfork's child holds until it executes or ends."""
    low = os.pipe2(os.O_CLOEXEC)
    pipe = kvm.high(low[0], process.floor), kvm.high(low[1], process.floor)
    process.vfork_waits.add(pipe[0])
    return pipe


def _await_vfork(thread: Thread, fd: int) -> bytes:
    """What became of the lent stack, at the end of vfork's child or its execve.

    As on Linux handlers wait that long, but neither the process's end nor another's execve.
    """
    before = thread.mask
    thread.set_mask(before | thread.process.handled)
    changed = b""
    try:
        while True:
            thread.wait([(fd, POLLIN)])
            data = os.read(fd, 1 << 16)
            if not data:
                return changed
            changed += data
    finally:
        thread.set_mask(before)


def _close_pipe(process: Process, pipe: tuple[int, int]) -> None:
    with process.lock:
        process.vfork_waits.discard(pipe[0])
        for fd in pipe:
            if fd >= 0:
                os.close(fd)


def _begin_child(thread: Thread, wanted: Wanted, parent: Parent) -> NoReturn:
    """In the child of fork: go on where the parent was, with what was wanted for the child."""
    process = thread.process
    flags = wanted.flags
    process.vfork_stack = parent.regs[6] if flags & CLONE_VM else 0
    if flags & CLONE_CHILD_SETTID:
        try:
            process.memory.write(wanted.child_tid, struct.pack("<I", process.memory.pid))
        except Fault:
            pass
    thread.clear_tid = wanted.child_tid if flags & CLONE_CHILD_CLEARTID else 0
    if flags & CLONE_CLEAR_SIGHAND:
        for number, action in list(process.actions.items()):
            if action.handler != signals.SIG_IGN:
                process.set_action(number, signals.Action(0, 0, 0, 0))
    thread.start(_started(parent.regs, wanted), parent.fs_base, parent.gs_base)
    thread.processor.set_xsave(parent.xsave)
    thread.settle_masks()
    raise Renewed


def _reborn(thread: Thread, pipe: tuple[int, int]) -> None:
    """In the child of fork: one thread, a VM of its own; the parent's descriptors go."""
    process = thread.process
    memory = process.memory
    machine = process.machine
    # Also that of a thread which was just being made.
    for other in list(machine.open):
        other.close()
    for each in process.threads.values():
        # The parent's too: setting its mask here would set it there.
        if each.signal_fd >= 0:
            os.close(each.signal_fd)
    thread.signal_fd = thread.signal_fd_mask = -1
    machine.close()
    if process.vfork_pipe >= 0:
        os.close(process.vfork_pipe)
    process.vfork_pipe = pipe[1]
    for fd in process.vfork_waits:
        os.close(fd)
    process.vfork_waits.clear()
    memory.pid = hostcall.call(39)
    if process.log_fd >= 0 and not (process.settings.statistics or process.settings.verbose):
        # A payload that closes its standard error lets go of it.
        os.close(process.log_fd)
        process.log_fd = -1
    process.idle.clear()
    process.gs_free += [each.gs for each in process.threads.values() if each is not thread]
    process.waiters.clear()
    process.child_waiters.clear()
    process.unimplemented = {}
    process.statistics.clear()
    process.crowd = 0
    process.ending = False
    process.successor = None
    machine.create()
    for index, slot in enumerate(memory.slots):
        machine.register(index, slot.gpa, slot.size, slot.hva, slot.flags)
    before = thread.processor
    thread.processor = Processor(machine, memory, (before.task, before.task_gpa))
    thread.tid = memory.pid
    thread.run_mask = -1
    thread.in_call = False
    thread.robust_list = 0
    process.threads = {thread.tid: thread}


def sys_exit(thread: Thread, status: int) -> int:
    thread.status = status & 0xFF
    raise ThreadExit


def sys_exit_group(thread: Thread, status: int) -> int:
    raise ProcessExit(status & 0xFF)


def sys_set_tid_address(thread: Thread, address: int) -> int:
    thread.clear_tid = address
    return thread.tid


def sys_set_robust_list(thread: Thread, head: int, size: int) -> int:
    if size != 24:
        return -EINVAL
    thread.robust_list = head
    return 0


def sys_get_robust_list(thread: Thread, tid: int, head: int, size: int) -> int:
    target = thread if not tid else thread.process.threads.get(tid & INT)
    if target is None:
        return -ESRCH
    thread.process.memory.write(head, struct.pack("<Q", target.robust_list))
    thread.process.memory.write(size, struct.pack("<Q", 24))
    return 0
