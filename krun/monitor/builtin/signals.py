"""Signals: host masks, taking a pending one, the frame on the payload's stack, and sigreturn.

Host signals stay pending, never handled by Python: every thread of the monitor blocks

    what its payload thread blocks | what the payload has a handler for | SIGSTKFLT, SIGCHLD
                                   | all, once there is more than one thread

and takes them with rt_sigtimedwait.  KVM_RUN unblocks them for its own duration
(KVM_SET_SIGNAL_MASK), and blocking calls poll a signalfd beside their descriptor, so no wake-up
is lost between a check and a wait.  A signal whose action is the default one is not blocked while
there is one thread: the kernel itself then kills, stops or ignores, with pid 1's rules too.

SIGSTKFLT, which no kernel sends, is the monitor's own kick between its threads.
"""

from __future__ import annotations

import os
import struct

from krun.monitor.builtin import cpu, hostcall
from krun.monitor.builtin.areas import Fault

TYPE_CHECKING = False
if TYPE_CHECKING:
    from krun.monitor.builtin.thread import Thread

SIGHUP, SIGINT, SIGQUIT, SIGILL, SIGTRAP, SIGABRT, SIGBUS, SIGFPE, SIGKILL = range(1, 10)
SIGSEGV, SIGPIPE, SIGTERM, SIGSTKFLT, SIGCHLD, SIGCONT, SIGSTOP = 11, 13, 15, 16, 17, 18, 19
SIGTSTP, SIGTTIN, SIGTTOU, SIGURG, SIGWINCH, SIGSYS = 20, 21, 22, 23, 28, 31
KICK = SIGSTKFLT

SA_NOCLDSTOP, SA_SIGINFO, SA_RESTORER, SA_ONSTACK, SA_RESTART, SA_NODEFER, SA_RESETHAND = (
    1,
    4,
    0x04000000,
    0x08000000,
    0x10000000,
    0x40000000,
    0x80000000,
)
SIG_DFL, SIG_IGN = 0, 1
SS_ONSTACK, SS_DISABLE, SS_AUTODISARM = 1, 2, 1 << 31
SI_KERNEL, SI_USER, SI_TKILL = 0x80, 0, -6

ALL = (1 << 64) - 1


def bit(signal: int) -> int:
    """The bit of a signal in a 64-bit set."""
    return 1 << (signal - 1)


NEVER = bit(SIGKILL) | bit(SIGSTOP)
IGNORED_BY_DEFAULT = frozenset((SIGCHLD, SIGCONT, SIGURG, SIGWINCH))
STOPS = frozenset((SIGTSTP, SIGTTIN, SIGTTOU))
STOP_BITS = bit(SIGTSTP) | bit(SIGTTIN) | bit(SIGTTOU)
ALWAYS = bit(KICK) | bit(SIGCHLD)
DUMPS = frozenset((SIGQUIT, SIGILL, SIGTRAP, SIGABRT, SIGBUS, SIGFPE, SIGSEGV, SIGSYS, 24, 25))

SYS_rt_sigaction, SYS_rt_sigprocmask, SYS_rt_sigtimedwait, SYS_signalfd4 = 13, 14, 128, 289
SYS_gettid, SYS_tgkill = 186, 234

FRAME = 440
# From %rsp at sigreturn (the frame without its return address).
UC_STACK, UC_REGS, UC_MASK, INFO = 16, 40, 296, 304
FP_MAGIC1, FP_MAGIC2 = 0x46505853, 0x46505845

_ORDER = (8, 9, 10, 11, 12, 13, 14, 15, 5, 4, 7, 1, 3, 0, 2, 6, 16, 17)
"""Index in kvm_regs of each register of struct sigcontext, in its order."""


class Interrupted(Exception):
    """A signal ends a blocking call; with `restart` SA_RESTART starts it anew.

    With `always` it starts anew whatever the handler's flags are.
    """

    def __init__(self, restart: bool = True) -> None:
        super().__init__()
        self.restart = restart
        self.always = False


class Action:
    """What the payload wants done on a signal."""

    __slots__ = ("flags", "handler", "mask", "restorer")

    def __init__(self, handler: int, flags: int, restorer: int, mask: int) -> None:
        self.handler = handler
        self.flags = flags
        self.restorer = restorer
        self.mask = mask


DEFAULT = Action(SIG_DFL, 0, 0, 0)


def set_host_action(signal: int, handler: int) -> None:
    """SIG_DFL or SIG_IGN for the monitor's own process, so that the kernel acts on it."""
    data = bytearray(struct.pack("<QQQQ", handler, 0, 0, 0))
    hostcall.call(SYS_rt_sigaction, signal, hostcall.address_of(data), 0, 8)


def host_ignores(signal: int) -> bool:
    """Whether the process was started with the signal ignored."""
    data = bytearray(32)
    hostcall.call(SYS_rt_sigaction, signal, 0, hostcall.address_of(data), 8)
    return int(struct.unpack_from("<Q", data)[0]) == SIG_IGN


def take(thread: Thread, mask: int) -> tuple[int, bytes] | None:
    """Take a pending signal of the set, with its siginfo; None when there is none."""
    scratch = thread.scratch
    view = scratch.view
    view[0:24] = mask.to_bytes(8, "little") + bytes(16)
    address = scratch.address
    signal = hostcall.call(SYS_rt_sigtimedwait, address, address + 64, address + 8, 8)
    if signal <= 0:
        return None
    info = bytes(view[64:192])
    if signal == SIGCHLD:
        process = thread.process
        for other in list(process.child_waiters):
            if other is not thread:
                other.woken = True
                process.kick(other)
    return signal, info


def fault_info(signal: int, code: int, address: int) -> bytes:
    """siginfo of a fault."""
    return struct.pack("<iiiiQ", signal, 0, code, 0, address).ljust(128, b"\0")


def push_frame(
    thread: Thread, signal: int, info: bytes, action: Action, context: list[int]
) -> bool:
    """Make the payload thread enter its handler; False when its stack has no room.

    `context` are the 18 words of kvm_regs it returns to.
    """
    process = thread.process
    memory = process.memory
    stack = context[6]
    top = stack - 128
    base, flags, size = thread.altstack
    on_stack = base <= stack < base + size
    if action.flags & SA_ONSTACK and size and not flags & SS_DISABLE and not on_stack:
        top = base + size
    machine = thread.processor.machine
    fp_size = machine.xsave_size + (4 if machine.xcr0 else 0)
    fp_address = (top - fp_size) & -64
    frame = ((fp_address - FRAME) & -16) - 8
    if frame < 0 or frame >= 1 << 47:
        return False
    state = thread.processor.xsave()[: machine.xsave_size]
    if machine.xcr0:
        struct.pack_into("<IIQI", state, 464, FP_MAGIC1, fp_size, machine.xcr0, len(state))
        state += struct.pack("<I", FP_MAGIC2)
    else:
        state[464:512] = bytes(48)
    words = [context[index] for index in _ORDER]
    words.append(cpu.USER_CS | cpu.USER_DS << 48)
    words += [thread.fault_error, thread.fault_vector, 0, thread.fault_address, fp_address]
    saved = thread.saved_mask
    mask = thread.mask if saved is None else saved
    uc_flags = (1 if machine.xcr0 else 0) | 2 | 4
    stack_flags = (SS_DISABLE if not size else SS_ONSTACK if on_stack else 0) | (
        flags & SS_AUTODISARM
    )
    data = struct.pack("<QQQQII", action.restorer, uc_flags, 0, base, stack_flags, 0)
    data += struct.pack("<Q", size) + struct.pack("<24Q", *words) + bytes(64)
    data += struct.pack("<Q", mask) + info
    try:
        memory.write(fp_address, state)
        memory.write(frame, data)
    except Fault:
        return False
    if size and flags & SS_AUTODISARM:
        thread.altstack = (0, SS_DISABLE, 0)
    thread.saved_mask = None
    blocked = thread.mask | action.mask
    if not action.flags & SA_NODEFER:
        blocked |= bit(signal)
    thread.set_mask(blocked)
    context[0] = 0
    context[5] = signal
    context[4] = frame + 8 + INFO
    context[3] = frame + 8
    context[6] = frame
    context[16] = action.handler
    context[17] &= ~0x40500 | cpu.FLAGS
    if action.flags & SA_RESETHAND:
        process.set_action(signal, Action(SIG_DFL, action.flags, action.restorer, action.mask))
    return True


def sigreturn(thread: Thread, stack: int) -> list[int]:
    """rt_sigreturn(2): the words of kvm_regs to go back to; raises Fault."""
    memory = thread.process.memory
    data = memory.read(stack, UC_MASK + 8)
    words = struct.unpack_from("<18Q", data, UC_REGS)
    fp_address = struct.unpack_from("<Q", data, UC_REGS + 23 * 8)[0]
    context = [0] * 18
    for index, word in zip(_ORDER, words, strict=True):
        context[index] = word
    context[17] = (context[17] & cpu.FLAGS_USER) | cpu.FLAGS
    machine = thread.processor.machine
    if fp_address:
        state = thread.processor.xsave()
        given = memory.read(fp_address, machine.xsave_size)
        state[0 : len(given)] = given
        # The kernel refuses reserved MXCSR bits and unknown state components.
        mxcsr = struct.unpack_from("<I", state, 24)[0]
        struct.pack_into("<I", state, 24, mxcsr & 0xFFFF)
        state[464:512] = bytes(48)
        if machine.xcr0:
            features = struct.unpack_from("<Q", state, 512)[0]
            struct.pack_into("<Q", state, 512, features & machine.xcr0)
            state[520:576] = bytes(56)
        try:
            thread.processor.set_xsave(state)
        except OSError as error:
            raise Fault from error
    base, flags, size = struct.unpack_from("<QI4xQ", data, UC_STACK)
    thread.altstack = (base, flags & SS_AUTODISARM, size) if size else (0, SS_DISABLE, 0)
    thread.set_mask(struct.unpack_from("<Q", data, UC_MASK)[0])
    return context


def die(signal: int) -> None:
    """End the process by a signal, as its default action does.

    As pid 1 the kernel ignores a signal that init sends to itself: then the status is 128 + n.
    """
    if hostcall.call(39) == 1:
        os._exit(128 + signal)
    set_host_action(signal, SIG_DFL)
    # To this thread: another one that waits for signals would take one to the process.
    hostcall.call(SYS_tgkill, hostcall.call(39), hostcall.call(SYS_gettid), signal)
    unblocked = bytearray(bit(signal).to_bytes(8, "little"))
    hostcall.call(SYS_rt_sigprocmask, 1, hostcall.address_of(unblocked), 0, 8)
    os._exit(128 + signal)
