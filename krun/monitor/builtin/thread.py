"""A payload's thread: the loop around KVM_RUN, faults, waits, the handlers it enters."""

from __future__ import annotations

import fcntl
import struct
import time

from krun.errors import KrunError
from krun.monitor.builtin import cpu, faults, hostcall, kvm, signals
from krun.monitor.builtin.areas import PAGE, Fault, OutOfMemory
from krun.monitor.builtin.hostcall import MAP_FIXED, MAP_PRIVATE
from krun.monitor.builtin.memory import KERNEL, STACK_TOP
from krun.monitor.builtin.signals import (
    ALL,
    ALWAYS,
    DEFAULT,
    KICK,
    NEVER,
    SIG_DFL,
    SIG_IGN,
    SIGCHLD,
    Interrupted,
    bit,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from krun.monitor.builtin.kvm import Processor
    from krun.monitor.builtin.process import Process

WORD = (1 << 64) - 1
# struct kvm_run's io: direction out, size 4, port 0, count 1.
SYSCALL_EXIT = 1 << 32 | 4 << 8 | 1
# Room for as many as there can be processors, between what mmap gives out and the stack.
GS_PAGES = STACK_TOP - (64 << 20)
SYS_ppoll = 271


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


class Thread:
    """One payload thread on one vCPU on one host thread."""

    def __init__(self, process: Process, processor: Processor) -> None:
        self.process = process
        self.processor = processor
        self.tid = 0
        self.gs = 0
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
        self.retried = (0, 0)
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
        """The page that Kontain's library expects at %gs: a new one, or an ended thread's.

        Raises OutOfMemory.  The process is locked, or has no other thread.
        """
        process = self.process
        if process.gs_free:
            self.gs = process.gs_free.pop()
            return self.gs
        self.gs = GS_PAGES + process.gs_pages * PAGE
        flags = MAP_PRIVATE | MAP_FIXED | 0x20
        if process.memory.map(self.gs, PAGE, 3, flags, name="[gs]") < 0:
            raise OutOfMemory
        process.gs_pages += 1
        return self.gs

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
            if mask & ~self.mask & ~self.process.handled & bit(SIGCHLD):
                # The kernel would have dropped what came while it was neither blocked nor handled.
                signals.take(self, bit(SIGCHLD))
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
                if self.woken:
                    # Its kick may have been taken together with another one.
                    signals.take(self, bit(KICK))
                    return [0] * count
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
                if not self.woken and self.pending(extra):
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
                    self.interrupt_call(error)
                    self.in_call = False
                    continue
                except Entered:
                    self.in_call = False
                    continue
                words[dirty] = sync
                self.in_call = False
            else:
                faults.other_exit(self)

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
            self.force(signals.SIGBUS, 2, self.virtual(address))
            return
        raise KrunError(f"KVM_RUN: {error.strerror}", cpu.describe(self.processor.words)) from error

    def _memory_fault(self) -> bool:
        return self.processor.words[1] & 0xFFFFFFFF == kvm.EXIT_MEMORY_FAULT

    def virtual(self, gpa: int) -> int:
        """Where in the payload's address space guest-physical memory lies, 0 when nowhere."""
        for area in self.process.memory.listed(0, 1 << 64):
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

    def interrupt_call(self, error: Interrupted) -> None:
        """A signal ended a blocking call: EINTR, or the call once more after the handler."""
        assert self.caught is not None
        context = self.context()
        action = self.process.actions.get(self.caught[0], DEFAULT)
        if error.always or (error.restart and action.flags & signals.SA_RESTART):
            context[16] -= 2
        else:
            context[0] = -4 & WORD
        self.deliver(context)

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
