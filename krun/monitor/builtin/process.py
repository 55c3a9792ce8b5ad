"""The payload's process: its threads as a whole, signal actions, exec, the end."""

from __future__ import annotations

import _signal
import _thread
import fcntl
import os
import struct

from krun.monitor.builtin import cpu, hostcall, kvm, procfs, signals
from krun.monitor.builtin.areas import PAGE, Fault
from krun.monitor.builtin.kvm import Machine, Processor
from krun.monitor.builtin.memory import Memory
from krun.monitor.builtin.program import Program, load
from krun.monitor.builtin.signals import ALL, KICK, SIG_DFL, SIG_IGN, SIGCHLD, Action, bit
from krun.monitor.builtin.thread import ProcessExit, Renewed, Thread, ThreadExit

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

    from krun.monitor.builtin.futex import Waiter
    from krun.monitor.builtin.syscalls import Handlers
    from krun.monitor.builtin.vdso import Vdso

VFORK_STACK = 32 << 10


class Settings:
    """What the monitor was told: the options of `krun monitor`, or the container's extension."""

    __slots__ = (
        "coredump",
        "device",
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
        # Stands for an init in front of the payload: signals end it even as pid 1.
        self.init = bool(given.get("init"))
        self.statistics = bool(given.get("statistics"))
        self.ring = int(str(given.get("ring", 3)))
        self.coredump = str(given["coredump"]) if given.get("coredump") else None
        self.kill_unimplemented = bool(given.get("kill_unimplemented"))
        self.log_to = str(given["log_to"]) if given.get("log_to") else None
        self.verbose = bool(given.get("verbose"))
        self.seccomp = bool(given.get("seccomp", True))


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
        self.vfork_waits: set[int] = set()
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
        self.no_new_privs = hostcall.call(157, 39, 0, 0, 0, 0) == 1
        self.titles = (0, 0, 0, 0)
        self.vdso: Vdso | None = None
        self.log_fd = -1
        try:
            self.log_fd = kvm.high(os.dup(2), floor)
        except OSError:
            pass
        self.ending = False
        self.unimplemented: dict[int, int] = {}
        self.statistics: dict[int, list[float]] = {}
        self.gs_pages = 0
        self.gs_free: list[int] = []
        self.limits: dict[int, tuple[int, int]] = {}
        self.machine: Machine
        self.memory: Memory
        for signal in range(1, 32):
            if signals.host_ignores(signal) and signal not in (signals.SIGPIPE, 25):
                self.actions[signal] = Action(SIG_IGN, 0, 0, 0)
        # So that a kick ends a call that has it unblocked (blocking.py).
        _signal.signal(KICK, lambda number, frame: None)
        # Python itself ignores SIGPIPE and SIGXFSZ and handles SIGINT.
        for signal in (signals.SIGPIPE, 25, signals.SIGINT):
            if signal not in self.actions:
                signals.set_host_action(signal, SIG_DFL)

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
            me = _thread.get_native_id()
            if self.handled & ~before and me in self.threads:
                # Blocked before it is not ignored any more: else it would end the process.
                self.threads[me].settle_masks()
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
                    # Nobody waits for a SIGCHLD that nobody handles.
                    if signal == SIGCHLD and thread.tid != me:
                        self.kick(thread)

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
                with self.handlers.lock:
                    from krun.monitor.builtin import coredump

                coredump.write(self, thread, signal, context)
        self.finish()
        signals.die(signal)
        raise ProcessExit(128 + signal)

    def finish(self) -> None:
        """Say at the end what was asked for."""
        if self.settings.statistics:
            with self.handlers.lock:
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
        for thread in list(self.threads.values()):
            self._abandon(thread)
        self.end_vfork()
        if self.child or len(self.threads) > 1 or _thread.get_native_id() != self.memory.pid:
            os._exit(status)
        return status

    def _leave(self, thread: Thread) -> bool:
        """Take a thread out of the process; whether the process ends with it."""
        with self.handlers.lock:
            from krun.monitor.builtin import futex

        self._abandon(thread)
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
                self.spare(thread)
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

    def spare(self, thread: Thread) -> None:
        """Keep what an ended thread leaves for the next one; with the lock."""
        self.idle.append(thread.processor)
        self.gs_free.append(thread.gs)

    def _abandon(self, thread: Thread) -> None:
        """Let go of the robust futexes that an ending thread holds; mostly it holds none."""
        if not thread.robust_list:
            return
        try:
            first, _, pending = struct.unpack("<QqQ", self.memory.read(thread.robust_list, 24))
        except Fault:
            return
        if first != thread.robust_list or pending:
            with self.handlers.lock:
                from krun.monitor.builtin import futex

            futex.abandon(thread)

    def _park(self) -> tuple[Program, Program | None, list[bytes], list[bytes], bytes, int]:
        """Keep the process's first host thread while others run, until one of them executes."""
        scratch = hostcall.Scratch(PAGE)
        scratch.view[0:8] = ALL.to_bytes(8, "little")
        hostcall.call(signals.SYS_rt_sigprocmask, 2, scratch.address, 0, 8)
        scratch.view[0:8] = bit(KICK).to_bytes(8, "little")
        while True:
            # With the lock: a thread on its way out still asks whether there is a successor.
            with self.lock:
                successor = self.successor
                if successor is not None and not self.threads:
                    break
            hostcall.call(signals.SYS_rt_sigtimedwait, scratch.address, 0, 0, 8)
        hostcall.munmap(scratch.address, scratch.size)
        return successor

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
        processor, regs = load(self, program, interpreter, argv, environ, name)
        thread = Thread(self, processor)
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
