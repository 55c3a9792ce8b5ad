"""System calls that make and end threads and processes, and those about the process itself."""

from __future__ import annotations

import _thread
import os
import struct

from krun.errors import KrunError
from krun.monitor.builtin import cpu, hostcall, kvm, signals
from krun.monitor.builtin.areas import Fault, OutOfMemory
from krun.monitor.builtin.elf import BadExecutable
from krun.monitor.builtin.files import INT, signed
from krun.monitor.builtin.hostcall import call
from krun.monitor.builtin.kvm import Processor
from krun.monitor.builtin.process import Process
from krun.monitor.builtin.procfs import rename
from krun.monitor.builtin.program import open_program
from krun.monitor.builtin.signals import ALL, NEVER, STOP_BITS
from krun.monitor.builtin.space import TASK_SIZE
from krun.monitor.builtin.syscalls import _directory, buffer, within
from krun.monitor.builtin.thread import Entered, ProcessExit, Renewed, Thread, ThreadExit

EPERM, ESRCH, EINTR, E2BIG, EBADF, EAGAIN = 1, 3, 4, 7, 9, 11
EACCES, EFAULT, EINVAL, ENOSYS = 13, 14, 22, 38

CLONE_VM, CLONE_FS, CLONE_FILES, CLONE_SIGHAND, CLONE_PIDFD = 0x100, 0x200, 0x400, 0x800, 0x1000
CLONE_VFORK, CLONE_PARENT, CLONE_THREAD, CLONE_SETTLS = 0x4000, 0x8000, 0x10000, 0x80000
CLONE_PARENT_SETTID, CLONE_CHILD_CLEARTID, CLONE_CHILD_SETTID = 0x100000, 0x200000, 0x1000000
CLONE_CLEAR_SIGHAND = 1 << 32
NAMESPACES = 0x7E020080  # CLONE_NEW*
THREAD = CLONE_VM | CLONE_SIGHAND | CLONE_THREAD
STACK_ROOM = 256 << 10
MAX_STRING = 32 * 4096


# Making threads and processes.


def sys_clone(
    thread: Thread, flags: int, stack: int, parent_tid: int, child_tid: int, tls: int
) -> int:
    flags &= INT
    return _clone(
        thread, flags & ~0xFF, flags & 0xFF, stack, parent_tid, child_tid, tls, parent_tid
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
    return _clone(thread, flags, signal, stack + stack_size, parent, child, tls, pidfd)


def sys_fork(thread: Thread) -> int:
    return _clone(thread, 0, signals.SIGCHLD, 0, 0, 0, 0, 0)


def sys_vfork(thread: Thread) -> int:
    return _clone(thread, CLONE_VFORK | CLONE_VM, signals.SIGCHLD, 0, 0, 0, 0, 0)


def _clone(
    thread: Thread,
    flags: int,
    signal: int,
    stack: int,
    parent_tid: int,
    child_tid: int,
    tls: int,
    pidfd: int,
) -> int:
    if flags & NAMESPACES:
        return -EPERM
    if flags & CLONE_SIGHAND and not flags & CLONE_VM:
        return -EINVAL
    if flags & CLONE_THREAD:
        if flags & THREAD != THREAD:
            return -EINVAL
        return _new_thread(thread, flags, stack, parent_tid, child_tid, tls)
    if flags & CLONE_VM and not flags & CLONE_VFORK:
        # Two processes in one memory: none of the programs this serves does that.
        return -EINVAL
    return _new_process(thread, flags, signal, stack, parent_tid, child_tid, tls, pidfd)


def _new_thread(
    thread: Thread, flags: int, stack: int, parent_tid: int, child_tid: int, tls: int
) -> int:
    process = thread.process
    if not process.crowd:
        # Nobody else runs yet, so no signal can slip in between.
        process.crowd = ALL & ~NEVER & ~STOP_BITS
        thread.settle_masks()
    regs = thread.context()
    regs[0] = 0
    if stack:
        regs[6] = stack
    try:
        with process.lock:
            processor = process.idle.pop() if process.idle else None
            if processor is None:
                processor = Processor(process.machine, process.memory)
        new = Thread(process, processor)
        new.mask = thread.mask
        gs_base = new.gs_page()
    except (OSError, OutOfMemory):
        return -EAGAIN
    if process.settings.ring and new.processor.words[cpu.RIP] >= 1 << 63:
        _to_ring3(processor)
    fs_base = tls if flags & CLONE_SETTLS else thread.base(cpu.S_FS)
    ready = _thread.allocate_lock()
    ready.acquire()
    refused: list[int] = []

    def begin() -> None:
        new.tid = _thread.get_native_id()
        try:
            if flags & CLONE_CHILD_SETTID:
                process.memory.write(child_tid, struct.pack("<I", new.tid))
            if flags & CLONE_PARENT_SETTID:
                process.memory.write(parent_tid, struct.pack("<I", new.tid))
        except Fault:
            pass
        if flags & CLONE_CHILD_CLEARTID:
            new.clear_tid = child_tid
        try:
            new.start(regs, fs_base, gs_base)
            new.settle_masks()
        except OSError as error:
            refused.append(error.errno or EAGAIN)
            ready.release()
            return
        with process.lock:
            process.threads[new.tid] = new
        ready.release()
        _carry(process, new)

    try:
        _thread.start_new_thread(begin, ())
    except RuntimeError:
        process.idle.append(processor)
        return -EAGAIN
    ready.acquire()
    return -refused[0] if refused else new.tid


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


def _new_process(
    thread: Thread,
    flags: int,
    signal: int,
    stack: int,
    parent_tid: int,
    child_tid: int,
    tls: int,
    pidfd: int,
) -> int:
    """fork: the host's copies the memory, and the child makes a VM of its own around it."""
    process = thread.process
    memory = process.memory
    if flags & CLONE_PIDFD:
        memory.host(pidfd, 4, 2)
    if signal not in (0, signals.SIGCHLD):
        return -EINVAL
    regs = thread.context()
    state = thread.processor.xsave()
    fs_base = tls if flags & CLONE_SETTLS else thread.base(cpu.S_FS)
    gs_base = thread.base(cpu.S_GS)
    pipe = (-1, -1)
    if flags & CLONE_VFORK:
        low = os.pipe2(os.O_CLOEXEC)
        pipe = (kvm.high(low[0], process.floor), kvm.high(low[1], process.floor))
    with memory.lock, process.lock, process.futex_lock:
        try:
            pid = os.fork()
        except OSError as error:
            for fd in pipe:
                if fd >= 0:
                    os.close(fd)
            return -(error.errno or EAGAIN)
        if pid == 0:
            process.child = True
    if pid == 0:
        _reborn(thread, pipe)
        process.vfork_stack = regs[6] if flags & CLONE_VM else 0
        regs[0] = 0
        if stack:
            regs[6] = stack
        if flags & CLONE_CHILD_SETTID:
            try:
                memory.write(child_tid, struct.pack("<I", memory.pid))
            except Fault:
                pass
        thread.clear_tid = child_tid if flags & CLONE_CHILD_CLEARTID else 0
        if flags & CLONE_CLEAR_SIGHAND:
            for number, action in list(process.actions.items()):
                if action.handler != signals.SIG_IGN:
                    process.set_action(number, signals.Action(0, 0, 0, 0))
        thread.start(regs, fs_base, gs_base)
        thread.processor.set_xsave(state)
        thread.settle_masks()
        raise Renewed
    if flags & CLONE_PARENT_SETTID:
        memory.write(parent_tid, struct.pack("<I", pid))
    if flags & CLONE_PIDFD:
        fd = call(434, pid, 0)
        if fd >= 0:
            fd = within(thread, fd)
        memory.write(pidfd, struct.pack("<i", fd))
    if flags & CLONE_VFORK:
        os.close(pipe[1])
        changed = b""
        while data := os.read(pipe[0], 1 << 16):
            changed += data
        os.close(pipe[0])
        if changed:
            memory.write(regs[6], changed)
    return pid


def _reborn(thread: Thread, pipe: tuple[int, int]) -> None:
    """In the child of fork: one thread, a VM of its own; the parent's descriptors go."""
    process = thread.process
    memory = process.memory
    machine = process.machine
    for other in [*(each.processor for each in process.threads.values()), *process.idle]:
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
    if pipe[0] >= 0:
        os.close(pipe[0])
    memory.pid = hostcall.call(39)
    if process.log_fd >= 0 and not (process.settings.statistics or process.settings.verbose):
        # A payload that closes its standard error lets go of it.
        os.close(process.log_fd)
        process.log_fd = -1
    process.idle.clear()
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


# Executing.


def sys_execve(thread: Thread, path: int, argv: int, environ: int) -> int:
    text = rename(thread.process, thread.process.memory.string(path))
    return _execute(thread, text, argv, environ)


def sys_execveat(
    thread: Thread, directory: int, path: int, argv: int, environ: int, flags: int
) -> int:
    directory = _directory(thread, None, directory, 0)
    text = rename(thread.process, thread.process.memory.string(path))
    flags &= INT
    if flags & ~0x1100:
        return -EINVAL
    if not text:
        if not flags & 0x1000:
            return -2
        text = b"/proc/self/fd/%d" % directory
    elif directory != -100 and not text.startswith(b"/"):
        if call(72, directory, 1) < 0:
            return -EBADF
        text = b"/proc/self/fd/%d/%s" % (directory, text)
    return _execute(thread, text, argv, environ)


def _strings(thread: Thread, address: int) -> list[bytes]:
    memory = thread.process.memory
    strings: list[bytes] = []
    if not address:
        return strings
    total = 0
    while True:
        pointer = struct.unpack("<Q", memory.read(address, 8))[0]
        if not pointer:
            return strings
        text = memory.string(pointer, MAX_STRING + 1)
        if len(text) > MAX_STRING:
            raise OverflowError
        strings.append(text)
        total += len(text) + 9
        if total > 2 << 20:
            raise OverflowError
        address += 8


def _execute(thread: Thread, path: bytes, argv: int, environ: int) -> int:
    process = thread.process
    try:
        arguments = _strings(thread, argv) or [b""]
        environment = _strings(thread, environ)
    except (OverflowError, Fault) as error:
        # A file that cannot be opened goes first.
        result = _openable(path)
        if result < 0 or isinstance(error, OverflowError):
            return result or -E2BIG
        raise
    try:
        program, interpreter, arguments = open_program(path, arguments)
    except OSError as error:
        return -(error.errno or EACCES)
    except BadExecutable as error:
        return -error.errno
    with process.lock:
        if process.ending:
            # Another thread executes already, and ends this one.
            os.close(program.fd)
            if interpreter is not None:
                os.close(interpreter.fd)
            raise ThreadExit
        # In this order: a thread that ends because of the one must find the other.
        process.successor = (program, interpreter, arguments, environment, path, thread.mask)
        process.ending = True
    for other in list(process.threads.values()):
        if other is not thread:
            other.attention = True
            process.kick(other)
    # The first host thread makes the new VM once all payload threads are gone.
    raise ThreadExit


def _openable(path: bytes) -> int:
    """0, or the negative errno with which executing a file would fail before it is read."""
    try:
        program, interpreter, _ = open_program(path, [b""])
    except OSError as error:
        return -(error.errno or EACCES)
    except BadExecutable:
        return 0
    os.close(program.fd)
    if interpreter is not None:
        os.close(interpreter.fd)
    return 0


def sys_exit(thread: Thread, status: int) -> int:
    thread.status = status & 0xFF
    raise ThreadExit


def sys_exit_group(thread: Thread, status: int) -> int:
    raise ProcessExit(status & 0xFF)


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


# What the process is.


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


def sys_rseq(thread: Thread, address: int, size: int, flags: int, signature: int) -> int:
    """No restartable sequences: the C library does without."""
    return -ENOSYS


CAPABILITY_VERSION_1 = struct.pack("<I", 0x19980330)
ARCH_SET_GS, ARCH_SET_FS, ARCH_GET_FS, ARCH_GET_GS = 0x1001, 0x1002, 0x1003, 0x1004


def sys_arch_prctl(thread: Thread, code: int, address: int) -> int:
    code &= INT
    if code in (ARCH_SET_FS, ARCH_SET_GS):
        if address >= TASK_SIZE:
            return -EPERM
        thread.set_base(cpu.S_FS if code == ARCH_SET_FS else cpu.S_GS, address)
        return 0
    if code in (ARCH_GET_FS, ARCH_GET_GS):
        base = thread.base(cpu.S_FS if code == ARCH_GET_FS else cpu.S_GS)
        thread.process.memory.write(address, struct.pack("<Q", base))
        return 0
    return -EINVAL


def sys_uname(thread: Thread, address: int) -> int:
    result = call(63, thread.scratch.address)
    if result < 0:
        return result
    data = bytearray(thread.scratch.get(390))
    release = bytes(data[130:195]).split(b"\0", 1)[0][:52] + b".kontain.KVM"
    data[130:195] = release.ljust(65, b"\0")
    thread.process.memory.write(address, data)
    return 0


RLIMIT_CORE, RLIMIT_NOFILE, RLIMITS = 4, 7, 16


def _limit(process: Process, resource: int) -> tuple[int, int]:
    """The payload's view of a limit: the monitor keeps descriptors above NOFILE for itself."""
    if resource in process.limits:
        return process.limits[resource]
    data = bytearray(16)
    result = call(302, 0, resource, 0, hostcall.address_of(data))
    if result < 0:
        raise OSError(-result, "prlimit64")
    soft, hard = struct.unpack("<QQ", data)
    return soft, hard


def sys_getrlimit(thread: Thread, resource: int, address: int) -> int:
    if not address:
        return -EFAULT if resource & INT < RLIMITS else -EINVAL
    return sys_prlimit64(thread, 0, resource, 0, address)


def sys_setrlimit(thread: Thread, resource: int, address: int) -> int:
    if not address:
        return -EFAULT
    return sys_prlimit64(thread, 0, resource, address, 0)


def sys_prlimit64(thread: Thread, pid: int, resource: int, new: int, old: int) -> int:
    process = thread.process
    memory = process.memory
    resource &= INT
    if signed(pid) not in (0, memory.pid):
        return call(
            302,
            signed(pid),
            resource,
            buffer(thread, new, 16, 1) if new else 0,
            buffer(thread, old, 16, 2) if old else 0,
        )
    wanted = struct.unpack("<QQ", memory.read(new, 16)) if new else None
    if old:
        memory.host(old, 16, 2)
    try:
        before = _limit(process, resource)
    except OSError as error:
        return -(error.errno or EINVAL)
    if wanted is not None:
        soft, hard = wanted
        if soft > hard:
            return -EINVAL
        if resource in (RLIMIT_NOFILE, RLIMIT_CORE):
            if hard > before[1] or (resource == RLIMIT_NOFILE and soft > process.floor):
                return -EPERM
            process.limits[resource] = (soft, hard)
        else:
            place = thread.scratch.put(struct.pack("<QQ", soft, hard), 1024)
            result = call(302, 0, resource, place, 0)
            if result < 0:
                return result
    if old:
        memory.write(old, struct.pack("<QQ", *before))
    return 0


# option: which arguments lead anywhere; "v" none, "o4" an int, "n" a name of 16 bytes.
PRCTLS = {
    1: "v",
    2: "o4",
    7: "v",
    8: "v",
    15: "i16",
    16: "o16",
    23: "v",
    24: "v",
    27: "v",
    28: "v",
    29: "v",
    30: "v",
    36: "v",
    37: "o4",
    38: "v",
    39: "v",
    41: "v",
    42: "v",
    47: "v",
}
PR_GET_DUMPABLE, PR_SET_DUMPABLE, PR_SET_NAME = 3, 4, 15
PR_SET_NO_NEW_PRIVS, PR_GET_NO_NEW_PRIVS = 38, 39


def sys_prctl(thread: Thread, option: int, second: int, third: int, fourth: int, fifth: int) -> int:
    option &= INT
    if option == PR_GET_DUMPABLE:
        return 1
    if option == PR_SET_DUMPABLE:
        return 0 if second in (0, 1) else -EINVAL
    if option == PR_GET_NO_NEW_PRIVS and not second | third | fourth | fifth:
        # The monitor's own filter has set it, the payload may not have.
        return int(thread.process.no_new_privs)
    kind = PRCTLS.get(option)
    if kind is None:
        return -EINVAL
    if option == PR_SET_NAME:
        name = thread.process.memory.string(second, 16)[:15]
        return call(157, option, thread.scratch.put(name + b"\0", 1024))
    if kind != "v":
        second = buffer(thread, second, int(kind[1:]), 2)
    result = call(157, option, second, third, fourth, fifth)
    if option == PR_SET_NO_NEW_PRIVS and result == 0:
        thread.process.no_new_privs = True
    return result


def sys_personality(thread: Thread, persona: int) -> int:
    return 0 if persona & INT in (0, INT) else -EINVAL


def sys_getcpu(thread: Thread, processor: int, node: int) -> int:
    memory = thread.process.memory
    result = call(309, thread.scratch.address, thread.scratch.address + 4, 0)
    if result < 0:
        return result
    data = thread.scratch.get(8)
    if processor:
        memory.write(processor, data[:4])
    if node:
        memory.write(node, data[4:])
    return 0


def sys_sched_getaffinity(thread: Thread, pid: int, size: int, address: int) -> int:
    size &= INT
    return call(204, signed(pid), size, buffer(thread, address, min(size, 1 << 16), 2))


def sys_getgroups(thread: Thread, count: int, address: int) -> int:
    size = signed(count)
    if size < 0:
        return -EINVAL
    return call(115, size, buffer(thread, address, 4 * min(size, 65536), 2) if size else 0)


def sys_setgroups(thread: Thread, count: int, address: int) -> int:
    size = signed(count)
    if not 0 <= size <= 65536:
        return -EINVAL
    return call(116, size, buffer(thread, address, 4 * size, 1) if size else 0)


def _capabilities(thread: Thread, number: int, header: int, data: int, prot: int) -> int:
    """The header says how large the data is, so the kernel reads the copy that was looked at."""
    memory = thread.process.memory
    copy = memory.read(header, 8)
    size = 12 if copy[:4] == CAPABILITY_VERSION_1 else 24
    place = thread.scratch.put(copy, 1024)
    result = call(number, place, buffer(thread, data, size, prot) if data else 0)
    after = thread.scratch.get(8, 1024)
    if after != copy:
        # An unknown version is answered with the preferred one.
        memory.write(header, after)
    return result


def sys_capget(thread: Thread, header: int, data: int) -> int:
    return _capabilities(thread, 125, header, data, 2)


def sys_capset(thread: Thread, header: int, data: int) -> int:
    return _capabilities(thread, 126, header, data, 1)


def sys_pidfd_open(thread: Thread, pid: int, flags: int) -> int:
    result = call(434, signed(pid), flags)
    return within(thread, result) if result >= 0 else result
