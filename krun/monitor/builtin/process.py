"""The payload's process and its threads: loading, the loop around KVM_RUN, faults, fork, exec."""

from __future__ import annotations

import _thread
import fcntl
import os
import struct
import time

from krun.errors import KrunError
from krun.monitor.builtin import cpu, elf, hostcall, kvm, procfs, signals
from krun.monitor.builtin.elf import BadExecutable, Image, Script
from krun.monitor.builtin.hostcall import MAP_FIXED, MAP_PRIVATE
from krun.monitor.builtin.kvm import Machine, Processor
from krun.monitor.builtin.memory import (
    KERNEL,
    MMAP_MIN,
    MMAP_TOP,
    PAGE,
    STACK_TOP,
    Fault,
    Memory,
    OutOfMemory,
)
from krun.monitor.builtin.signals import (
    ALL,
    ALWAYS,
    DEFAULT,
    KICK,
    NEVER,
    SIG_DFL,
    SIG_IGN,
    SIGCHLD,
    Action,
    Interrupted,
    bit,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

    from krun.monitor.builtin.futex import Waiter
    from krun.monitor.builtin.syscalls import Handlers

WORD = (1 << 64) - 1
# struct kvm_run's io: direction out, size 4, port 0, count 1.
SYSCALL_EXIT = 1 << 32 | 4 << 8 | 1
STACK_SIZE = 8 << 20
VFORK_STACK = 32 << 10
GS_PAGES = STACK_TOP + 0x200000
ELOOP, ENOENT, EACCES, EISDIR, ENOTDIR = 40, 2, 13, 21, 20
SYS_ppoll, SYS_prlimit64 = 271, 302
RLIMIT_CORE, RLIMIT_NOFILE = 4, 7


class ThreadExit(Exception):
    """The payload's thread is gone; its host thread must end, or wait, too."""


class ProcessExit(Exception):
    """The payload ended with a status."""

    def __init__(self, status: int) -> None:
        super().__init__()
        self.status = status


class Renewed(Exception):
    """The payload goes on with a new processor: it forked, or executed another program."""


class Entered(Exception):
    """The handler of a system call set all registers itself."""


class Program:
    """A file that was opened, read and found executable."""

    def __init__(self, path: bytes, fd: int, image: Image) -> None:
        self.path = path
        self.fd = fd
        self.image = image


def open_program(path: bytes, argv: list[bytes]) -> tuple[Program, Program | None, list[bytes]]:
    """The program at path, its interpreter, and the arguments that a script's line makes of argv.

    Raises OSError or BadExecutable, as execve(2) would fail.
    """
    for _ in range(5):
        fd, head, size = _open_executable(path)
        try:
            found = elf.parse(head, size)
        except BadExecutable:
            os.close(fd)
            raise
        if isinstance(found, Script):
            os.close(fd)
            extra = [found.argument] if found.argument else []
            argv = [found.interpreter, *extra, path, *argv[1:]]
            path = found.interpreter
            continue
        program = Program(path, fd, found)
        if not found.interpreter:
            return program, None, argv
        try:
            fd, head, size = _open_executable(found.interpreter)
            inner = elf.parse(head, size)
            if isinstance(inner, Script) or inner.interpreter:
                os.close(fd)
                raise BadExecutable("its interpreter is no plain ELF file")
        except OSError:
            os.close(program.fd)
            raise
        return program, Program(found.interpreter, fd, inner), argv
    raise OSError(ELOOP, os.strerror(ELOOP), os.fsdecode(path))


def _open_executable(path: bytes) -> tuple[int, bytes, int]:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        status = os.fstat(fd)
        if status.st_mode & 0o170000 != 0o100000:
            raise OSError(EACCES, os.strerror(EACCES), os.fsdecode(path))
        if not os.access(path, os.X_OK, effective_ids=True):
            raise OSError(EACCES, os.strerror(EACCES), os.fsdecode(path))
        return fd, os.pread(fd, PAGE, 0), status.st_size
    except BaseException:
        os.close(fd)
        raise


class Settings:
    """What the monitor was told: the options of `krun monitor`, or the container's extension."""

    __slots__ = (
        "coredump",
        "device",
        "init",
        "init",
        "kill_unimplemented",
        "log_to",
        "memory",
        "ring",
        "seccomp",
        "statistics",
        "verbose",
    )

    def __init__(self, given: dict[str, object]) -> None:
        self.memory = int(str(given.get("memory") or 0))
        self.device = str(given["device"]) if given.get("device") else None
        self.init = bool(given.get("init"))
        self.statistics = bool(given.get("statistics"))
        self.ring = int(str(given.get("ring", 3)))
        self.coredump = str(given["coredump"]) if given.get("coredump") else None
        self.kill_unimplemented = bool(given.get("kill_unimplemented"))
        self.log_to = str(given["log_to"]) if given.get("log_to") else None
        self.verbose = bool(given.get("verbose"))
        self.seccomp = bool(given.get("seccomp", True))
        # Stands for an init in front of the payload: signals end it even as pid 1.
        self.init = bool(given.get("init"))


class Process:
    """One payload process: its memory, its threads, its signal actions."""

    def __init__(self, device: int, floor: int, settings: Settings, handlers: Handlers) -> None:
        self.device = device
        self.floor = floor
        self.settings = settings
        self.handlers = handlers
        self.lock = _thread.RLock()
        self.threads: dict[int, Thread] = {}
        self.idle: list[Processor] = []
        self.actions: dict[int, Action] = {}
        self.handled = 0
        self.crowd = 0
        self.waiters: dict[int, list[Waiter]] = {}
        self.futex_lock = _thread.allocate_lock()
        self.path = b""
        self.arguments: list[bytes] = []
        self.environment: list[bytes] = []
        self.auxiliary: list[tuple[int, int]] = []
        self.vfork_pipe = -1
        self.vfork_stack = 0
        self.other_exits = 0
        self.child = False
        self.child_waiters: set[Thread] = set()
        self.hidden_file = (-1, -1)
        self.device_number = os.fstat(device).st_rdev
        self.successor: (
            tuple[Program, Program | None, list[bytes], list[bytes], bytes, int] | None
        ) = None
        self.started = False
        self.titles = (0, 0, 0, 0)
        self.log_fd = -1
        try:
            self.log_fd = kvm.high(os.dup(2), floor)
        except OSError:
            pass
        self.ending = False
        self.unimplemented: dict[int, int] = {}
        self.statistics: dict[int, list[float]] = {}
        self.gs_pages = 0
        self.limits: dict[int, tuple[int, int]] = {}
        self.machine: Machine
        self.memory: Memory
        for signal in range(1, 32):
            if signals.host_ignores(signal) and signal not in (signals.SIGPIPE, 25):
                self.actions[signal] = Action(SIG_IGN, 0, 0, 0)
        # Python itself ignores SIGPIPE and SIGXFSZ and handles SIGINT.
        for signal in (signals.SIGPIPE, 25, signals.SIGINT):
            if signal not in self.actions:
                signals.set_host_action(signal, SIG_DFL)

    # Loading.

    def load(
        self,
        program: Program,
        interpreter: Program | None,
        argv: list[bytes],
        environ: list[bytes],
        name: bytes,
    ) -> list[int]:
        """Build a new VM with the program in it; the first registers.  Raises OutOfMemory."""
        machine = Machine(self.device, self.floor, self.settings.ring)
        machine.create()
        limit = self.settings.memory or default_memory()
        limit = min(limit, machine.physical - (1 << 32))
        memory = Memory(limit, machine.register, self.flushed)
        machine.furnish(memory)
        self.machine, self.memory = machine, memory
        self.gs_pages = 0
        base = self._map_image(program, 0 if program.image.fixed else _random_base())
        image = program.image
        entry = base + image.entry
        interpreter_base = 0
        if interpreter is not None:
            size = interpreter.image.high - interpreter.image.low
            interpreter_base = self._map_image(interpreter, memory.gap(size))
            entry = interpreter_base + interpreter.image.entry
        memory.brk_start = memory.brk_end = base + image.high
        stack_area = memory.map(
            STACK_TOP - STACK_SIZE, STACK_SIZE, 3, MAP_PRIVATE | MAP_FIXED | 0x20, name="[stack]"
        )
        if stack_area < 0:
            raise OutOfMemory
        ids = os.getresuid(), os.getresgid()
        auxiliary = [
            (elf.AT_HWCAP, machine.hwcap),
            (elf.AT_PAGESZ, PAGE),
            (elf.AT_CLKTCK, 100),
            (elf.AT_PHDR, base + image.header_address),
            (elf.AT_PHENT, image.header_size),
            (elf.AT_PHNUM, image.header_count),
            (elf.AT_BASE, interpreter_base),
            (elf.AT_FLAGS, 0),
            (elf.AT_ENTRY, base + image.entry),
            (elf.AT_UID, ids[0][0]),
            (elf.AT_EUID, ids[0][1]),
            (elf.AT_GID, ids[1][0]),
            (elf.AT_EGID, ids[1][1]),
            (elf.AT_SECURE, 0),
            (elf.AT_HWCAP2, machine.hwcap2),
            (51, 1024 + machine.xsave_size),  # AT_MINSIGSTKSZ
        ]
        pointer, data = elf.stack(STACK_TOP - 16, argv, environ, auxiliary, name, os.urandom(16))
        if len(data) > STACK_SIZE // 4:
            raise OSError(7, os.strerror(7), os.fsdecode(name))
        memory.write(pointer, data)
        self.path = _canonical(program.path)
        self.arguments, self.environment, self.auxiliary = argv, environ, auxiliary
        os.close(program.fd)
        if interpreter is not None:
            os.close(interpreter.fd)
        regs = [0] * 18
        regs[6], regs[16], regs[17] = pointer, entry, cpu.FLAGS
        title = bytearray(os.path.basename(name)[:15] + b"\0")
        hostcall.call(157, 15, hostcall.address_of(title))
        return regs

    def _map_image(self, program: Program, base: int) -> int:
        """Map a program's segments; the difference between its addresses and where they are."""
        image = program.image
        memory = self.memory
        if image.fixed:
            base = 0
            if image.low < MMAP_MIN or image.high > MMAP_TOP:
                raise BadExecutable("its addresses are outside of user space")
        else:
            base = ((base + image.alignment - 1) & -image.alignment) - image.low
        for segment in image.segments:
            start = (base + segment.address) & -PAGE
            end = (base + segment.address + segment.memory_size + PAGE - 1) & -PAGE
            file_end = base + segment.address + segment.file_size
            name = os.fsdecode(program.path)
            flags = MAP_PRIVATE | MAP_FIXED
            if segment.file_size > 4 << 20 and not segment.prot & 2:
                size = (file_end - start + PAGE - 1) & -PAGE
                offset = segment.offset & -PAGE
                result = memory.map(start, size, segment.prot, flags, program.fd, offset, name)
                if result >= 0 and end > start + size:
                    result = memory.map(
                        start + size, end - start - size, segment.prot, flags | 0x20
                    )
            else:
                result = memory.map(start, end - start, segment.prot, flags | 0x20, name=name)
                area = memory.find(start)
                if result >= 0 and area is not None and area.slot is not None:
                    place = area.slot_offset + base + segment.address - area.start
                    view = area.slot.view[place : place + segment.file_size]
                    done = 0
                    while done < segment.file_size:
                        count = os.preadv(program.fd, [view[done:]], segment.offset + done)
                        if not count:
                            break
                        done += count
            if result < 0:
                raise OutOfMemory
        return base

    # Memory that changed under the processors.

    def flushed(self) -> None:
        """Let every processor forget its translations before it runs on."""
        me = _thread.get_native_id()
        for thread in list(self.threads.values()):
            if not thread.flush:
                thread.flush = thread.attention = True
                if thread.tid != me:
                    self.kick(thread)

    def kick(self, thread: Thread) -> None:
        """Make a thread leave KVM_RUN or its wait."""
        hostcall.call(signals.SYS_tgkill, self.memory.pid, thread.tid, KICK)

    # Signals.

    def set_action(self, signal: int, action: Action) -> None:
        """sigaction(2): keep it, and have the kernel do what is its part of it."""
        with self.lock:
            handler = action.handler
            if handler == SIG_DFL:
                self.actions.pop(signal, None)
            else:
                self.actions[signal] = action
            before = self.handled
            if handler in (SIG_DFL, SIG_IGN):
                self.handled &= ~bit(signal)
            else:
                self.handled |= bit(signal)
            if signal != KICK:
                if signal == SIGCHLD and handler == SIG_DFL and action.flags & 2:
                    # SA_NOCLDWAIT: children leave no zombie.
                    signals.set_host_action(signal, SIG_IGN)
                else:
                    signals.set_host_action(signal, SIG_IGN if handler == SIG_IGN else SIG_DFL)
            if before != self.handled:
                for thread in self.threads.values():
                    thread.attention = True
                    thread.masks_stale = True

    # Ends.

    def say(self, text: str) -> None:
        """Write a line of the monitor's own, not to what the payload may have made of fd 2."""
        try:
            os.write(self.log_fd if self.log_fd >= 0 else 2, f"krun monitor: {text}\n".encode())
        except OSError:
            return

    def fatal(
        self, thread: Thread, signal: int, context: list[int] | None = None, address: int = 0
    ) -> NoReturn:
        """End the process by a signal's default action."""
        if signal in signals.DUMPS:
            context = thread.context() if context is None else context
            if self.settings.verbose:
                registers = " ".join(
                    f"{name}={word:x}" for name, word in zip(cpu.NAMES, context, strict=True)
                )
                self.say(f"signal {signal}, address {address:#x}, {registers}")
            if self.settings.coredump:
                from krun.monitor.builtin import coredump

                coredump.write(self, thread, signal, context)
        self.finish()
        signals.die(signal)
        raise ProcessExit(128 + signal)

    def finish(self) -> None:
        """Say at the end what was asked for."""
        if self.settings.statistics:
            from krun.monitor.builtin import statistics

            statistics.show(self)

    # Running.

    def carry(self, thread: Thread) -> int:
        """Run a payload thread on this host thread; the process's status at its end."""
        while True:
            try:
                thread.run()
            except Renewed:
                continue
            except ThreadExit:
                leader = thread.tid == self.memory.pid
                last = self._leave(thread)
                if last:
                    return self._over(thread.status)
                if not leader:
                    return -1
                successor = self._park()
                hostcall.munmap(thread.scratch.address, thread.scratch.size)
                thread = self.become(*successor)
            except ProcessExit as ended:
                return self._over(ended.status)

    def _over(self, status: int) -> int:
        self.finish()
        self.end_vfork()
        if self.child or len(self.threads) > 1 or _thread.get_native_id() != self.memory.pid:
            os._exit(status)
        return status

    def _leave(self, thread: Thread) -> bool:
        """Take a thread out of the process; whether the process ends with it."""
        from krun.monitor.builtin import futex

        if thread.clear_tid and not self.ending:
            try:
                key = self.memory.host(thread.clear_tid, 4, 2)
                self.memory.write(thread.clear_tid, bytes(4))
                futex.wake(self, key, 1)
            except Fault:
                pass
        with self.lock:
            self.threads.pop(thread.tid, None)
            if not self.ending:
                self.idle.append(thread.processor)
            else:
                thread.processor.close()
            if thread.signal_fd >= 0:
                os.close(thread.signal_fd)
            # Read here: another program may be in place as soon as the last thread is out.
            last = not self.threads and self.successor is None
        if self.ending:
            hostcall.call(signals.SYS_tgkill, self.memory.pid, self.memory.pid, KICK)
        if thread.tid != self.memory.pid:
            hostcall.munmap(thread.scratch.address, thread.scratch.size)
        return last

    def _park(self) -> tuple[Program, Program | None, list[bytes], list[bytes], bytes, int]:
        """Keep the process's first host thread while others run, until one of them executes."""
        scratch = hostcall.Scratch(PAGE)
        scratch.view[0:8] = ALL.to_bytes(8, "little")
        hostcall.call(signals.SYS_rt_sigprocmask, 2, scratch.address, 0, 8)
        scratch.view[0:8] = bit(KICK).to_bytes(8, "little")
        while self.successor is None or self.threads:
            hostcall.call(signals.SYS_rt_sigtimedwait, scratch.address, 0, 0, 8)
        hostcall.munmap(scratch.address, scratch.size)
        return self.successor

    def become(
        self,
        program: Program,
        interpreter: Program | None,
        argv: list[bytes],
        environ: list[bytes],
        name: bytes,
        mask: int,
    ) -> Thread:
        """Put a program in the place of what there was; its first thread, on this host thread."""
        for processor in self.idle:
            processor.close()
        self.idle.clear()
        self.end_vfork()
        if self.started:
            self.machine.close()
            self.memory.release()
        self.started = True
        self.successor = None
        self.ending = False
        self.crowd = 0
        self.waiters.clear()
        self.handled = 0
        self.actions = {
            signal: action for signal, action in self.actions.items() if action.handler == SIG_IGN
        }
        procfs.retitle(self.titles, argv)
        self._close_on_exec((program.fd, interpreter.fd if interpreter else -1))
        regs = self.load(program, interpreter, argv, environ, name)
        thread = Thread(self, Processor(self.machine, self.memory))
        thread.tid = self.memory.pid
        thread.mask = mask
        self.threads = {thread.tid: thread}
        thread.start(regs, 0, thread.gs_page())
        thread.settle_masks()
        return thread

    def end_vfork(self) -> None:
        """Let the parent that called vfork go on, with what became of the stack it lent.

        glibc's posix_spawn takes the errno of a failed exec from there.
        """
        if self.vfork_pipe < 0:
            return
        try:
            area = self.memory.find(self.vfork_stack)
            if area is not None:
                size = min(area.end - self.vfork_stack, VFORK_STACK)
                os.write(self.vfork_pipe, self.memory.read(self.vfork_stack, size))
        except (Fault, OSError):
            pass
        os.close(self.vfork_pipe)
        self.vfork_pipe = -1

    def _close_on_exec(self, keep: tuple[int, int]) -> None:
        try:
            numbers = [int(name) for name in os.listdir("/proc/self/fd")]
        except OSError:
            numbers = list(range(self.floor))
        for fd in numbers:
            if fd < self.floor and fd not in keep:
                try:
                    if fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC:
                        os.close(fd)
                except OSError:
                    continue


def default_memory() -> int:
    """Guest-physical bytes without a setting: lazily populated, so room, not use."""
    pages: int = os.sysconf("SC_PHYS_PAGES")
    return max(4 * pages * PAGE, 64 << 30)


def _random_base() -> int:
    return 0x555555554000 + (int.from_bytes(os.urandom(3), "little") << 12)


def _canonical(path: bytes) -> bytes:
    try:
        return os.path.realpath(path)
    except OSError:
        return path


class Thread:
    """One payload thread on one vCPU on one host thread."""

    def __init__(self, process: Process, processor: Processor) -> None:
        self.process = process
        self.processor = processor
        self.tid = 0
        self.mask = 0
        self.saved_mask: int | None = None
        self.host_mask = -1
        self.run_mask = -1
        self.signal_fd = -1
        self.signal_fd_mask = -1
        self.altstack = (0, signals.SS_DISABLE, 0)
        self.clear_tid = 0
        self.robust_list = 0
        self.flush = False
        self.attention = False
        self.masks_stale = True
        self.woken = False
        self.caught: tuple[int, bytes] | None = None
        self.fault_error = self.fault_vector = self.fault_address = 0
        self.scratch = hostcall.Scratch(64 << 10)
        self.bounces: list[tuple[int, int, int, hostcall.Scratch]] = []
        self.retried = 0
        self.status = 0

    # Registers.

    def start(self, regs: list[int], fs_base: int = 0, gs_base: int = 0) -> None:
        """Set the first registers."""
        words = self.processor.words
        for index, value in enumerate(regs):
            words[cpu.RAX + index] = value & WORD
        words[cpu.DIRTY] = cpu.SYNC_REGS
        if fs_base or gs_base:
            sregs = self.processor.sregs()
            struct.pack_into("<Q", sregs, cpu.S_FS, fs_base)
            struct.pack_into("<Q", sregs, cpu.S_GS, gs_base)
            self.processor.set_sregs(sregs)

    def gs_page(self) -> int:
        """The page that Kontain's library expects at %gs: made once per thread."""
        process = self.process
        address = GS_PAGES + process.gs_pages * PAGE
        process.gs_pages += 1
        flags = MAP_PRIVATE | MAP_FIXED | 0x20
        if process.memory.map(address, PAGE, 3, flags, name="[gs]") < 0:
            raise OutOfMemory
        return address

    def context(self) -> list[int]:
        """The payload's registers, whatever stub the processor stands in."""
        words = self.processor.words
        regs: list[int] = words[cpu.REGS].tolist()
        if regs[16] >= KERNEL:
            # Between `syscall` and its return: %rcx and %r11 hold where it came from.
            machine = self.processor.machine
            before = machine.stub3 if machine.entry_ring3 else machine.stub
            if regs[16] == before and not self.in_call:
                regs[2] -= 2
            regs[16] = regs[2]
            regs[17] = regs[11]
        return regs

    in_call = False

    def enter(self, regs: list[int]) -> None:
        """Continue in ring 3 with these registers."""
        words = self.processor.words
        kernel = words[cpu.RIP] >= KERNEL
        for index, value in enumerate(regs):
            words[cpu.RAX + index] = value & WORD
        words[cpu.DIRTY] = cpu.SYNC_REGS
        if kernel and self.processor.machine.ring:
            sregs = self.processor.sregs()
            if sregs[cpu.S_CS + 12] & 3 == 0:
                sregs[cpu.S_CS : cpu.S_CS + 24] = cpu.CODE3
                sregs[cpu.S_SS : cpu.S_SS + 24] = cpu.DATA3
                self.processor.set_sregs(sregs)

    def set_base(self, segment: int, address: int) -> None:
        """Set the base of %fs or %gs."""
        sregs = self.processor.sregs()
        struct.pack_into("<Q", sregs, segment, address)
        self.processor.set_sregs(sregs)

    def base(self, segment: int) -> int:
        """The base of %fs or %gs."""
        value: int = struct.unpack_from("<Q", self.processor.sregs(), segment)[0]
        return value

    # Masks.

    def set_mask(self, mask: int) -> None:
        """Set the payload thread's signal mask."""
        mask &= ~NEVER
        if mask != self.mask:
            self.mask = mask
            self.attention = self.masks_stale = True

    def settle_masks(self) -> None:
        """Bring the host's masks in line; before the thread runs or waits."""
        process = self.process
        self.masks_stale = False
        host = (self.mask | process.handled | ALWAYS | process.crowd) & ~NEVER
        if host != self.host_mask:
            view = self.scratch.view
            view[0:8] = host.to_bytes(8, "little")
            hostcall.call(signals.SYS_rt_sigprocmask, 2, self.scratch.address, 0, 8)
            self.host_mask = host
        run = self.mask
        if not process.handled & bit(SIGCHLD):
            run |= bit(SIGCHLD)
        run &= ~(bit(KICK) | NEVER)
        if run != self.run_mask:
            self.processor.set_signal_mask(run)
            self.run_mask = run

    # Waiting.

    def wait(
        self, polled: list[tuple[int, int]], timeout: int | None = None, extra: int = 0
    ) -> list[int] | None:
        """Wait for one of (fd, events), or for `timeout` nanoseconds; the revents of each.

        None when time ran out.  `extra` are signals (a set) that end the wait as if polled:
        then the list is all zero.  Raises Interrupted when a signal must be handled first.
        """
        deadline = None if timeout is None else time.monotonic_ns() + timeout
        count = len(polled)
        scratch = self.scratch
        view = scratch.view
        if 8 * count + 4096 > scratch.size:
            scratch = hostcall.Scratch((8 * count + 8191) & -4096)
            view = scratch.view
        base = 4096
        try:
            while True:
                if self.attention:
                    self.attend()
                fd = self.signals_fd(extra)
                offset = base
                for number, events in polled:
                    struct.pack_into("<ihh", view, offset, number, events, 0)
                    offset += 8
                struct.pack_into("<ihh", view, offset, fd, 1, 0)
                limit = 0
                if deadline is not None:
                    left = max(deadline - time.monotonic_ns(), 0)
                    struct.pack_into("<qq", view, 2048, left // 1000000000, left % 1000000000)
                    limit = scratch.address + 2048
                result = hostcall.call(SYS_ppoll, scratch.address + base, count + 1, limit, 0, 8)
                if result == 0:
                    return None
                if result < 0:
                    if result == -4:
                        continue
                    raise OSError(-result, "ppoll")
                found = [
                    struct.unpack_from("<h", view, base + 8 * index + 6)[0]
                    for index in range(count)
                ]
                if any(found):
                    return found
                if self.woken:
                    signals.take(self, bit(KICK))
                    return found
                if self.pending(extra):
                    return found
        finally:
            if scratch is not self.scratch:
                hostcall.munmap(scratch.address, scratch.size)

    def signals_fd(self, extra: int) -> int:
        """The signalfd of what may interrupt this thread now."""
        mask = ~self.mask & ALL
        if not self.process.handled & bit(SIGCHLD):
            mask &= ~bit(SIGCHLD)
        mask |= bit(KICK) | extra
        if mask != self.signal_fd_mask:
            self.scratch.view[0:8] = mask.to_bytes(8, "little")
            fd = hostcall.call(
                signals.SYS_signalfd4, self.signal_fd, self.scratch.address, 8, 0o2004000
            )
            if fd < 0:
                raise OSError(-fd, "signalfd4")
            if self.signal_fd < 0:
                self.signal_fd = kvm.high(fd, self.process.floor)
            self.signal_fd_mask = mask
        return self.signal_fd

    def pending(self, extra: int = 0) -> bool:
        """Take what the signalfd showed; True when it is one of `extra`, which stays pending.

        Raises Interrupted with the signal in `caught` when the payload must see it.
        """
        while True:
            if extra:
                view = self.scratch.view
                hostcall.call(127, self.scratch.address, 8)
                waiting = int.from_bytes(view[0:8], "little")
                if waiting & extra & ~bit(KICK):
                    return True
            unmasked = ~self.mask & ALL & ~extra
            if not self.process.handled & bit(SIGCHLD):
                unmasked &= ~bit(SIGCHLD)
            found = signals.take(self, unmasked | bit(KICK))
            if found is None:
                return False
            if found[0] == KICK:
                if self.attention:
                    self.attend()
                if self.woken:
                    return False
                continue
            if self.wanted(found[0]):
                self.caught = found
                raise Interrupted

    def wanted(self, signal: int) -> bool:
        """Whether the payload has something to do about it; its default end happens here."""
        action = self.process.actions.get(signal, DEFAULT)
        if action.handler == SIG_IGN:
            return False
        if action.handler != SIG_DFL:
            return True
        if signal in signals.IGNORED_BY_DEFAULT:
            return False
        if hostcall.call(39) == 1 and not self.process.settings.init:
            # The kernel drops what pid 1 has no handler for.
            return False
        if signal in signals.STOPS:
            hostcall.call(62, self.process.memory.pid, signals.SIGSTOP)
            return False
        self.process.fatal(self, signal)
        return False

    def requeue(self) -> None:
        """Make the caught signal pending again: its call ended otherwise."""
        if self.caught is None:
            return
        signal, info = self.caught
        self.caught = None
        place = self.scratch.put(info, 2048)
        hostcall.call(297, self.process.memory.pid, self.tid, signal, place)

    def attend(self) -> None:
        """Do what other threads, or a call, asked for, before the thread runs on."""
        self.attention = False
        process = self.process
        if process.ending:
            raise ThreadExit
        if self.masks_stale:
            self.settle_masks()
        if self.flush:
            self.flush = False
            sregs = self.processor.sregs()
            # A changed CR3 (PWT has no meaning for guest memory) makes KVM flush.
            sregs[cpu.S_CR3] ^= 8
            self.processor.set_sregs(sregs)

    # The loop.

    def run(self) -> None:
        """Run the payload thread until it ends (ThreadExit, ProcessExit) or executes (Renewed)."""
        ioctl = fcntl.ioctl
        processor = self.processor
        words = processor.words
        handlers = self.process.handlers
        number = processor.fd
        rax, dirty, sync = cpu.RAX, cpu.DIRTY, cpu.SYNC_REGS
        run = kvm.RUN
        while True:
            if self.attention:
                self.attend()
            try:
                ioctl(number, run, 0)
            except OSError as error:
                self.stopped(error)
                continue
            if words[4] == SYSCALL_EXIT and words[1] & 0xFFFFFFFF == 2:
                self.in_call = True
                try:
                    words[rax] = handlers[words[rax]](self, words) & WORD
                except Fault:
                    words[rax] = -14 & WORD
                except Interrupted as error:
                    self.interrupt_call(error.restart)
                    self.in_call = False
                    continue
                except Entered:
                    self.in_call = False
                    continue
                words[dirty] = sync
                self.in_call = False
            else:
                self.other_exit()

    def stopped(self, error: OSError) -> None:
        """KVM_RUN failed: a signal, or memory behind a file's end."""
        if error.errno == 4:
            try:
                self.pending()
            except Interrupted:
                self.deliver(self.context())
            return
        if error.errno == 11:
            return
        if error.errno == 14:
            address = self.processor.words[6] if self._memory_fault() else 0
            self.force(signals.SIGBUS, 2, self._virtual(address))
            return
        raise KrunError(f"KVM_RUN: {error.strerror}", cpu.describe(self.processor.words)) from error

    def _memory_fault(self) -> bool:
        return self.processor.words[1] & 0xFFFFFFFF == kvm.EXIT_MEMORY_FAULT

    def _virtual(self, gpa: int) -> int:
        for area in self.process.memory.areas:
            if area.slot is not None and area.gpa <= gpa < area.gpa + area.end - area.start:
                return area.start + gpa - area.gpa
        return 0

    def deliver(self, context: list[int]) -> None:
        """Enter the handler of the caught signal."""
        assert self.caught is not None
        signal, info = self.caught
        self.caught = None
        action = self.process.actions.get(signal, DEFAULT)
        if action.handler in (SIG_DFL, SIG_IGN):
            self.enter(context)
            return
        if not signals.push_frame(self, signal, info, action, context):
            self.process.fatal(self, signals.SIGSEGV)
        self.enter(context)

    def interrupt_call(self, restart: bool) -> None:
        """A signal ended a blocking call: EINTR, or the call once more after the handler."""
        assert self.caught is not None
        context = self.context()
        action = self.process.actions.get(self.caught[0], DEFAULT)
        if restart and action.flags & signals.SA_RESTART:
            context[16] -= 2
        else:
            context[0] = -4 & WORD
        self.deliver(context)

    # Everything that is not a system call.

    def other_exit(self) -> None:
        """Handle an exit that the fast path does not know."""
        words = self.processor.words
        reason = words[1] & 0xFFFFFFFF
        self.process.other_exits += 1
        if reason == kvm.EXIT_IO:
            port = words[4] >> 16 & 0xFFFF
            if words[cpu.RIP] >= KERNEL and cpu.PORT_VECTOR <= port < cpu.PORT_VECTOR + cpu.VECTORS:
                self.exception(port - cpu.PORT_VECTOR)
            elif port >= cpu.HYPERCALL and words[4] & 0xFFFF == 0x401:
                self.hypercall(port - cpu.HYPERCALL)
            else:
                self.force(signals.SIGSEGV, signals.SI_KERNEL, 0)
            return
        if reason == kvm.EXIT_INTR:
            return
        if reason == kvm.EXIT_MMIO:
            self.force(signals.SIGBUS, 2, self._virtual(words[4]))
            return
        raise KrunError(*explain(self.processor, reason))

    def hypercall(self, number: int) -> None:
        """Kontain's own form: %gs:0 points to seven words, result first, then the arguments."""
        memory = self.process.memory
        words = self.processor.words
        keep = words[cpu.REGS].tolist()
        try:
            block = struct.unpack("<Q", memory.read(self.base(cpu.S_GS), 8))[0]
            arguments = struct.unpack("<7Q", memory.read(block, 56))[1:]
        except Fault:
            self.force(signals.SIGSEGV, 1, self.base(cpu.S_GS))
            return
        for register, value in zip(
            (cpu.RDI, cpu.RSI, cpu.RDX, cpu.R10, cpu.R8, cpu.R9), arguments, strict=True
        ):
            words[register] = value
        try:
            result = self.process.handlers[number](self, words) & WORD
        except Fault:
            result = -14 & WORD
        except Interrupted:
            result = -4 & WORD
            words[cpu.REGS] = memoryview(bytes(struct.pack("<18Q", *keep))).cast("Q")
            memory.write(block, struct.pack("<Q", result))
            self.deliver(keep)
            return
        words[cpu.REGS] = memoryview(bytes(struct.pack("<18Q", *keep))).cast("Q")
        words[cpu.DIRTY] = cpu.SYNC_REGS
        memory.write(block, struct.pack("<Q", result))

    def exception(self, vector: int) -> None:
        """A fault in ring 3: its frame lies on the processor's own stack page."""
        process = self.process
        words = self.processor.words
        offset = words[cpu.RSP] - self.processor.task + self.processor.task_gpa
        code = 0
        if vector in cpu.ERROR_CODE:
            code = struct.unpack_from("<Q", process.memory.system.view, offset)[0]
            offset += 8
        rip, selector, flags, rsp = struct.unpack_from("<QQQQ", process.memory.system.view, offset)
        regs = words[cpu.REGS].tolist()
        regs[6], regs[16], regs[17] = rsp, rip, (flags & cpu.FLAGS_USER) | cpu.FLAGS
        address = 0
        if vector == cpu.PAGE_FAULT:
            address = struct.unpack_from("<Q", self.processor.sregs(), cpu.S_CR2)[0]
        machine = self.processor.machine
        if rip in (machine.stub, machine.stub3) and selector & 3 == 3:
            # The host did not change to ring 0 on `syscall`.
            machine.entry_ring3 = True
            self.processor.set_entry()
            regs[16] = machine.stub3
            self.enter(regs)
            return
        if selector & 3 == 0 and machine.ring and rip >= KERNEL:
            # sysretq to a non-canonical address, which only the payload's %rcx can be.
            regs[16], regs[17] = regs[2], regs[11]
        self.fault_vector, self.fault_error, self.fault_address = vector, code, address
        if vector == cpu.PAGE_FAULT:
            area = process.memory.find(address)
            needed = 4 if code & 16 else 2 if code & 2 else 1
            if area is not None and area.prot & needed and self.retried != address:
                # Another thread just mapped it, or an old translation was still in use.
                self.retried = address
                self.flush = self.attention = True
                self.enter(regs)
                return
            if area is None and process.memory.grow_down(address):
                self.enter(regs)
                return
            signal, why = signals.SIGSEGV, 1 if area is None else 2
        else:
            signal, why, address = _fault_signal(vector, regs[16])
        self.retried = 0
        self.enter(regs)
        self.force(signal, why, address, regs)

    def force(self, signal: int, code: int, address: int, context: list[int] | None = None) -> None:
        """Send a signal that can't be blocked or ignored (force_sig of the kernel)."""
        context = self.context() if context is None else context
        action = self.process.actions.get(signal, DEFAULT)
        info = signals.fault_info(signal, code, address)
        if action.handler in (SIG_DFL, SIG_IGN) or self.mask & bit(signal):
            self.process.fatal(self, signal, context, address)
        if not signals.push_frame(self, signal, info, action, context):
            self.process.fatal(self, signals.SIGSEGV, context, address)
        self.enter(context)


def _fault_signal(vector: int, rip: int) -> tuple[int, int, int]:
    """Signal, si_code and address of a processor exception (arch/x86/kernel/traps.c's table)."""
    if vector == cpu.DIVIDE:
        return signals.SIGFPE, 1, rip
    if vector == cpu.DEBUG:
        return signals.SIGTRAP, 2, rip
    if vector == cpu.BREAKPOINT:
        return signals.SIGTRAP, signals.SI_KERNEL, 0
    if vector == cpu.INVALID_OPCODE:
        return signals.SIGILL, 2, rip
    if vector == cpu.X87:
        return signals.SIGFPE, 3, rip
    if vector == cpu.SIMD:
        return signals.SIGFPE, 3, rip
    if vector == cpu.ALIGNMENT:
        return signals.SIGBUS, 1, 0
    if vector in (11, 12):
        return signals.SIGBUS, signals.SI_KERNEL, 0
    return signals.SIGSEGV, signals.SI_KERNEL, 0


def explain(processor: Processor, reason: int) -> tuple[str, str]:
    """What an exit that ends the machine means, and what can be done."""
    words = processor.words
    place = cpu.describe(words)
    if reason == kvm.EXIT_INTERNAL_ERROR:
        data = bytes(words[4:10])
        suberror = struct.unpack_from("<I", data)[0]
        if suberror == 1:
            code = processor_code(data)
            return (
                f"the host cannot emulate the instruction {code} at {words[cpu.RIP]:#x}",
                "this host has no hardware virtualization for this guest; use one that has, "
                f"or a payload without that instruction ({place})",
            )
        return f"KVM internal error, suberror {suberror}", place
    if reason == kvm.EXIT_SHUTDOWN:
        return "the guest's processor shut down (triple fault)", place
    if reason == kvm.EXIT_FAIL_ENTRY:
        return f"KVM could not enter the guest, hardware reason {words[4]:#x}", place
    return f"KVM ended the guest for reason {reason}", place


def processor_code(data: bytes) -> str:
    """The instruction bytes of an emulation failure, where KVM gives them."""
    size = data[16] if struct.unpack_from("<I", data, 4)[0] >= 3 else 0
    return data[17 : 17 + min(size, 15)].hex(" ") or "(bytes unknown)"
