"""KVM through its ioctls: the virtual machine and its processors (Documentation/virt/kvm/api)."""

from __future__ import annotations

import fcntl
import os
import struct

from krun.errors import KrunError
from krun.monitor.builtin import cpu, hostcall

TYPE_CHECKING = False
if TYPE_CHECKING:
    from krun.monitor.builtin.memory import Memory

GET_API_VERSION, CREATE_VM, CHECK_EXTENSION, GET_VCPU_MMAP_SIZE = 0xAE00, 0xAE01, 0xAE03, 0xAE04
GET_SUPPORTED_CPUID = 0xC008AE05
SET_USER_MEMORY_REGION = 0x4020AE46
CREATE_VCPU, SET_TSS_ADDR, SET_IDENTITY_MAP_ADDR = 0xAE41, 0xAE47, 0x4008AE48
RUN, GET_SREGS, SET_SREGS, GET_REGS = 0xAE80, 0x8138AE83, 0x4138AE84, 0x8090AE81
SET_MSRS, SET_CPUID2, SET_SIGNAL_MASK = 0x4008AE89, 0x4008AE90, 0x4004AE8B
GET_XSAVE, SET_XSAVE, SET_XCRS = 0x9000AEA4, 0x5000AEA5, 0x4188AEA7
SET_VCPU_EVENTS, SET_DEVICE_ATTR = 0x4040AEA0, 0x4018AEE1

CAP_SYNC_REGS, CAP_XSAVE, CAP_IMMEDIATE_EXIT = 74, 55, 136

EXIT_IO, EXIT_HLT, EXIT_MMIO, EXIT_SHUTDOWN, EXIT_FAIL_ENTRY, EXIT_INTR = 2, 5, 6, 8, 9, 10
EXIT_INTERNAL_ERROR, EXIT_MEMORY_FAULT = 17, 39

DEVICES = ("/dev/kontain", "/dev/kvm")


def open_device(path: str | None = None) -> int:
    """A descriptor of the KVM device; raises KrunError naming the cause and the way out."""
    last: OSError | None = None
    for name in (path,) if path else DEVICES:
        try:
            fd = os.open(name, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            if last is None or last.errno == 2:
                last = error
                failed = name
            continue
        try:
            version = fcntl.ioctl(fd, GET_API_VERSION)
        except OSError:
            version = -1
        if version == 12:
            return fd
        os.close(fd)
        raise KrunError(
            f"{name} is no KVM device", "it does not answer KVM_GET_API_VERSION with 12"
        )
    assert last is not None
    hint = "load the module kvm_intel or kvm_amd, or enable nested virtualization"
    if last.errno == 13:
        hint = f"give the user read and write permission on {failed}"
    elif last.errno == 1:
        hint = f"the device cgroup has no rule that allows {failed}"
    raise KrunError(f"cannot open {failed}: {last.strerror}", hint) from last


def high(fd: int, floor: int) -> int:
    """Move a descriptor of the monitor out of the payload's range."""
    moved = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, floor)
    os.close(fd)
    return moved


class Machine:
    """A virtual machine: its slots, its tables of entries, its processors."""

    def __init__(self, device: int, floor: int, ring: int = 3) -> None:
        self.device = device
        self.floor = floor
        self.ring = ring
        # Hosts that run ring 3 without hardware virtualization keep it there on `syscall`.
        self.entry_ring3 = ring == 0
        self.cpuid = supported_cpuid(device)
        leaf1 = leaf(self.cpuid, 1)
        leaf7 = leaf(self.cpuid, 7)
        leafd = leaf(self.cpuid, 0xD)
        self.cr4 = cpu.CR4
        self.xcr0 = 0
        self.xsave_size = 512
        if leaf1[2] & 1 << 26:
            self.cr4 |= cpu.CR4_OSXSAVE
            self.xcr0 = leafd[0] & 0xE7
            self.xsave_size = leafd[2] if self.xcr0 == leafd[0] else max(leafd[1], 576)
        if leaf7[1] & 1:
            self.cr4 |= cpu.CR4_FSGSBASE
        self.hwcap = leaf1[3]
        self.hwcap2 = 2 if leaf7[1] & 1 else 0
        bits = leaf(self.cpuid, 0x80000008)[0] & 0xFF or 36
        self.physical = 1 << min(bits, 52)
        self.run_size = fcntl.ioctl(device, GET_VCPU_MMAP_SIZE)
        self.fd = -1
        self.processors = 0
        self.open: set[Processor] = set()

    def create(self) -> None:
        """Make the VM itself."""
        try:
            self.fd = high(fcntl.ioctl(self.device, CREATE_VM, 0), self.floor)
        except OSError as error:
            raise KrunError(f"cannot create a virtual machine: {error.strerror}") from error
        # Processors without unrestricted guest mode keep three pages here; others refuse.
        hostcall.call(16, self.fd, SET_TSS_ADDR, 0xFFFBD000)
        self.processors = 0

    def register(self, index: int, gpa: int, size: int, hva: int, flags: int = 0) -> None:
        """Tell KVM of a memory slot; raises OSError."""
        fcntl.ioctl(
            self.fd, SET_USER_MEMORY_REGION, struct.pack("<IIQQQ", index, flags, gpa, size, hva)
        )

    def furnish(self, memory: Memory) -> None:
        """Write the stubs and the IDT into a new memory."""
        self.stub, gpa = memory.kernel_page(executable=True)
        memory.system.view[gpa : gpa + len(cpu.stubs())] = cpu.stubs()
        self.stub3, gpa = memory.kernel_page(user=True, executable=True)
        code = cpu.STUB_SYSCALL_RING3
        memory.system.view[gpa : gpa + len(code)] = code
        self.idt, gpa = memory.kernel_page()
        _, self.ports = memory.kernel_page()
        memory.kernel_page()
        bitmap = cpu.port_bitmap()
        memory.system.view[self.ports : self.ports + len(bitmap)] = bitmap
        table = cpu.interrupt_table(self.stub)
        memory.system.view[gpa : gpa + len(table)] = table

    def close(self) -> None:
        """Drop the VM; its processors must have been closed."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def supported_cpuid(device: int) -> bytearray:
    """struct kvm_cpuid2 of what the host can give a guest."""
    count = 128
    while True:
        table = bytearray(8 + 40 * count)
        struct.pack_into("<I", table, 0, count)
        try:
            fcntl.ioctl(device, GET_SUPPORTED_CPUID, table, True)
            return table
        except OSError as error:
            if error.errno != 7 or count > 4096:
                raise
            count *= 2


def leaf(table: bytearray, function: int) -> tuple[int, int, int, int]:
    """eax, ebx, ecx, edx of a CPUID function's subleaf 0."""
    for index in range(struct.unpack_from("<I", table)[0]):
        entry = struct.unpack_from("<7I", table, 8 + 40 * index)
        if entry[0] == function and entry[1] == 0:
            return entry[3:7]
    return (0, 0, 0, 0)


class Processor:
    """A vCPU; `words` is its struct kvm_run as 64-bit words."""

    __slots__ = ("address", "fd", "machine", "task", "task_gpa", "words")

    def __init__(
        self, machine: Machine, memory: Memory, task: tuple[int, int] | None = None
    ) -> None:
        """Make the next processor of the machine; raises OSError.

        `task` is the page it had before fork; otherwise it gets a new one.
        """
        self.machine = machine
        self.fd = high(fcntl.ioctl(machine.fd, CREATE_VCPU, machine.processors), machine.floor)
        machine.processors += 1
        fcntl.ioctl(self.fd, SET_CPUID2, machine.cpuid, True)
        self.address = hostcall.mmap(0, machine.run_size, 3, hostcall.MAP_SHARED, self.fd)
        self.words = hostcall.view(self.address, machine.run_size).cast("Q")
        if task is None:
            _, self.task_gpa = memory.kernel_page()
            self.task = cpu.TASKS + (machine.processors - 1) * cpu.TASK_STRIDE
            for offset, gpa in enumerate((self.task_gpa, machine.ports, machine.ports + 4096)):
                memory.show_kernel_page(self.task + offset * 4096, gpa)
            page = cpu.task_page(self.task)
            memory.system.view[self.task_gpa : self.task_gpa + 4096] = page
        else:
            self.task, self.task_gpa = task
        sregs = fcntl.ioctl(self.fd, GET_SREGS, bytes(cpu.SREGS_SIZE))
        fresh = cpu.system_registers(
            sregs, memory.tables.ROOT, self.task, machine.idt, machine.cr4, machine.ring
        )
        fcntl.ioctl(self.fd, SET_SREGS, bytes(fresh))
        if machine.xcr0:
            fcntl.ioctl(
                self.fd, SET_XCRS, struct.pack("<IIIIQ", 1, 0, 0, 0, machine.xcr0).ljust(392, b"\0")
            )
        self._host_time()
        self.set_entry()
        self.words[cpu.VALID] = cpu.SYNC_REGS
        machine.open.add(self)

    def _host_time(self) -> None:
        """Let it read the host's time stamp counter: the vDSO's code needs it (vdso.py)."""
        offset = bytearray(8)
        address = hostcall.address_of(offset)
        # KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET; older kernels lack it, and then the try fails.
        attribute = bytearray(struct.pack("<IIQQ", 0, 0, 0, address))
        hostcall.call(16, self.fd, SET_DEVICE_ATTR, hostcall.address_of(attribute))

    def set_entry(self) -> None:
        """Point `syscall` to the stub of this kind of host."""
        machine = self.machine
        if machine.entry_ring3:
            pairs = ((cpu.MSR_STAR, cpu.STAR), (cpu.MSR_LSTAR, machine.stub3), (cpu.MSR_SFMASK, 0))
        else:
            pairs = (
                (cpu.MSR_STAR, cpu.STAR),
                (cpu.MSR_LSTAR, machine.stub),
                (cpu.MSR_SFMASK, cpu.SFMASK),
            )
        data = struct.pack("<II", len(pairs), 0)
        for index, value in pairs:
            data += struct.pack("<IIQ", index, 0, value)
        fcntl.ioctl(self.fd, SET_MSRS, data)

    def sregs(self) -> bytearray:
        """The system registers."""
        return bytearray(fcntl.ioctl(self.fd, GET_SREGS, bytes(cpu.SREGS_SIZE)))

    def set_sregs(self, sregs: bytearray) -> None:
        """Set the system registers."""
        fcntl.ioctl(self.fd, SET_SREGS, bytes(sregs))

    def xsave(self) -> bytearray:
        """The floating point and vector state."""
        state = bytearray(4096)
        fcntl.ioctl(self.fd, GET_XSAVE, state, True)
        return state

    def set_xsave(self, state: bytearray) -> None:
        """Set the floating point and vector state."""
        fcntl.ioctl(self.fd, SET_XSAVE, state, True)

    def set_signal_mask(self, mask: int) -> None:
        """The signals that stay blocked in KVM_RUN."""
        fcntl.ioctl(self.fd, SET_SIGNAL_MASK, struct.pack("<IQ", 8, mask))

    def close(self) -> None:
        """Drop it."""
        self.machine.open.discard(self)
        hostcall.munmap(self.address, self.machine.run_size)
        os.close(self.fd)
