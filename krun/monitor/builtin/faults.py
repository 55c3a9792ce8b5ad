"""What ends KVM_RUN besides a system call: faults, Kontain's hypercalls, what cannot go on."""

from __future__ import annotations

import struct

from krun.errors import KrunError
from krun.monitor.builtin import cpu, kvm, signals
from krun.monitor.builtin.areas import Fault
from krun.monitor.builtin.memory import KERNEL
from krun.monitor.builtin.signals import Interrupted

TYPE_CHECKING = False
if TYPE_CHECKING:
    from krun.monitor.builtin.kvm import Processor
    from krun.monitor.builtin.thread import Thread

WORD = (1 << 64) - 1


def other_exit(thread: Thread) -> None:
    """Handle an exit that the fast path does not know."""
    words = thread.processor.words
    reason = words[1] & 0xFFFFFFFF
    thread.process.other_exits += 1
    if reason == kvm.EXIT_IO:
        port = words[4] >> 16 & 0xFFFF
        if words[cpu.RIP] >= KERNEL and cpu.PORT_VECTOR <= port < cpu.PORT_VECTOR + cpu.VECTORS:
            exception(thread, port - cpu.PORT_VECTOR)
        elif port >= cpu.HYPERCALL and words[4] & 0xFFFF == 0x401:
            hypercall(thread, port - cpu.HYPERCALL)
        else:
            thread.force(signals.SIGSEGV, signals.SI_KERNEL, 0)
        return
    if reason == kvm.EXIT_INTR:
        return
    if reason == kvm.EXIT_MMIO:
        thread.force(signals.SIGBUS, 2, thread.virtual(words[4]))
        return
    raise KrunError(*explain(thread.processor, reason))


def hypercall(thread: Thread, number: int) -> None:
    """Kontain's own form: %gs:0 points to seven words, result first, then the arguments."""
    memory = thread.process.memory
    words = thread.processor.words
    keep = words[cpu.REGS].tolist()
    try:
        block = struct.unpack("<Q", memory.read(thread.base(cpu.S_GS), 8))[0]
        arguments = struct.unpack("<7Q", memory.read(block, 56))[1:]
    except Fault:
        thread.force(signals.SIGSEGV, 1, thread.base(cpu.S_GS))
        return
    for register, value in zip(
        (cpu.RDI, cpu.RSI, cpu.RDX, cpu.R10, cpu.R8, cpu.R9), arguments, strict=True
    ):
        words[register] = value
    try:
        result = thread.process.handlers[number](thread, words) & WORD
    except Fault:
        result = -14 & WORD
    except Interrupted:
        result = -4 & WORD
        words[cpu.REGS] = memoryview(bytes(struct.pack("<18Q", *keep))).cast("Q")
        memory.write(block, struct.pack("<Q", result))
        thread.deliver(keep)
        return
    words[cpu.REGS] = memoryview(bytes(struct.pack("<18Q", *keep))).cast("Q")
    words[cpu.DIRTY] = cpu.SYNC_REGS
    memory.write(block, struct.pack("<Q", result))


def exception(thread: Thread, vector: int) -> None:
    """A fault in ring 3: its frame lies on the processor's own stack page."""
    process = thread.process
    words = thread.processor.words
    offset = words[cpu.RSP] - thread.processor.task + thread.processor.task_gpa
    code = 0
    if vector in cpu.ERROR_CODE:
        code = struct.unpack_from("<Q", process.memory.system.view, offset)[0]
        offset += 8
    rip, selector, flags, rsp = struct.unpack_from("<QQQQ", process.memory.system.view, offset)
    regs = words[cpu.REGS].tolist()
    regs[6], regs[16], regs[17] = rsp, rip, (flags & cpu.FLAGS_USER) | cpu.FLAGS
    address = 0
    if vector == cpu.PAGE_FAULT:
        address = struct.unpack_from("<Q", thread.processor.sregs(), cpu.S_CR2)[0]
    machine = thread.processor.machine
    if rip in (machine.stub, machine.stub3) and selector & 3 == 3:
        # The host did not change to ring 0 on `syscall`.
        machine.entry_ring3 = True
        thread.processor.set_entry()
        regs[16] = machine.stub3
        thread.enter(regs)
        return
    if selector & 3 == 0 and machine.ring and rip >= KERNEL:
        # sysretq to a non-canonical address, which only the payload's %rcx can be.
        regs[16], regs[17] = regs[2], regs[11]
    thread.fault_vector, thread.fault_error, thread.fault_address = vector, code, address
    if vector == cpu.PAGE_FAULT:
        area, change = process.memory.settled(address)
        needed = 4 if code & 16 else 2 if code & 2 else 1
        if area is not None and area.prot & needed and thread.retried != (address, change):
            # Another thread just mapped it, or an old translation was still in use.
            thread.retried = address, change
            thread.flush = thread.attention = True
            thread.enter(regs)
            return
        if area is None and process.memory.grow_down(address):
            thread.enter(regs)
            return
        signal, why = signals.SIGSEGV, 1 if area is None else 2
    else:
        signal, why, address = _fault_signal(vector, regs[16])
    thread.retried = (0, 0)
    thread.enter(regs)
    thread.force(signal, why, address, regs)


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
