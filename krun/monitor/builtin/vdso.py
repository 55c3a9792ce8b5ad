"""The host's vDSO in the guest, so that asking for the time is no system call (vdso(7)).

    guest-virtual     AREA: [vvar, read only][the image, copied and patched]
    host              the monitor's own vvar pages

Its code reads the time stamp counter, which is the host's own in the guest (KVM_VCPU_TSC_OFFSET),
and the kernel's data in the vvar pages, so the clocks are exactly the host's.  Whether all of this
holds on a host is tried out with the first processor: one call of clock_gettime must give a time
between two of the monitor's.
"""

from __future__ import annotations

import fcntl
import struct
import time

from krun.monitor.builtin import cpu, hostcall, kvm
from krun.monitor.builtin.areas import PAGE
from krun.monitor.builtin.memory import STACK_TOP

TYPE_CHECKING = False
if TYPE_CHECKING:
    from krun.monitor.builtin.kvm import Processor
    from krun.monitor.builtin.memory import Memory

AREA = STACK_TOP + 0x100000
SHT_DYNSYM = 11
CLOCK_MONOTONIC = 1
EINTR, EAGAIN = 4, 11

# The processor's number lies in the host's descriptor table, and random numbers need a mapping
# that the kernel may drop: the one becomes a system call, the other says ENOSYS.
GETCPU = bytes.fromhex("b835010000 0f05 c3")  # mov $309, %eax; syscall; ret
GETRANDOM = bytes.fromhex("48c7c0daffffff c3")  # mov $-38, %rax; ret
REPLACED = {
    b"__vdso_getcpu": GETCPU,
    b"getcpu": GETCPU,
    b"__vdso_getrandom": GETRANDOM,
    b"getrandom": GETRANDOM,
}
CLOCK_GETTIME = b"__vdso_clock_gettime"


class Vdso:
    """Where the host's data pages are, and the image as the payload gets it.

    `tried` says that it was seen to work on this host.
    """

    def __init__(self, data: int, data_size: int, image: bytes, clock: int) -> None:
        self.data = data
        self.data_size = data_size
        self.image = image
        self.clock = clock
        self.tried = False

    def show(self, memory: Memory) -> int:
        """Map it into a new memory; the address of its ELF header.  Raises OutOfMemory."""
        gpa = memory.lend(self.data, self.data_size)
        size = (len(self.image) + PAGE - 1) & -PAGE
        _, first = memory.kernel_page()
        for _ in range(PAGE, size, PAGE):
            memory.kernel_page()
        memory.system.view[first : first + len(self.image)] = self.image
        address = AREA + self.data_size
        memory.show_user_pages(AREA, self.data_size, gpa, executable=False)
        memory.show_user_pages(address, size, first, executable=True)
        return address

    def usable(self, memory: Memory, processor: Processor, address: int) -> bool:
        """Whether it tells the time on this host, where it was mapped: tried once."""
        self.tried = self.tried or _tells_time(memory, processor, address + self.clock)
        return self.tried


def find() -> tuple[int, int, int] | None:
    """Where the kernel put it in this process: first data page, image, end; None without one."""
    data = 0
    try:
        with open("/proc/self/maps", "rb") as file:
            for line in file:
                if line.endswith(b"]\n") and b"[v" in line:
                    start, end = (int(word, 16) for word in line.split(b" ", 1)[0].split(b"-"))
                    if b"[vvar" in line:
                        data = data or start
                    elif b"[vdso]" in line and data:
                        return data, start, end
    except OSError:
        return None
    return None


def prepare() -> Vdso | None:
    """The host's vDSO; None where there is none that is understood."""
    found = find()
    if found is None:
        return None
    data, start, end = found
    image = bytearray(hostcall.view(start, end - start))
    symbols = _symbols(image)
    if CLOCK_GETTIME not in symbols:
        return None
    for name, code in REPLACED.items():
        if name in symbols:
            value, size = symbols[name]
            if size < len(code):
                return None
            image[value : value + len(code)] = code
    return Vdso(data, start - data, bytes(image), symbols[CLOCK_GETTIME][0])


def _symbols(image: bytearray) -> dict[bytes, tuple[int, int]]:
    """Offset and size of each dynamic symbol (elf(5)); its sections are in the image."""
    table = {}
    offset = struct.unpack_from("<Q", image, 40)[0]
    size, count = struct.unpack_from("<HH", image, 58)
    sections = [struct.unpack_from("<IIQQQQII", image, offset + size * n) for n in range(count)]
    for section in sections:
        if section[1] == SHT_DYNSYM:
            names = sections[section[6]][4]
            for at in range(section[4], section[4] + section[5], 24):
                name, _, _, _, value, length = struct.unpack_from("<IBBHQQ", image, at)
                start = names + name
                table[bytes(image[start : image.index(b"\0", start)])] = (value, length)
    return table


def _tells_time(memory: Memory, processor: Processor, entry: int) -> bool:
    """Whether clock_gettime at this address tells the host's time; leaves no trace in memory."""
    words = processor.words
    stack = STACK_TOP - PAGE
    machine = processor.machine
    memory.write(stack, struct.pack("<Q", machine.stub3))
    for register in range(cpu.RAX, cpu.RFLAGS + 1):
        words[register] = 0
    words[cpu.RDI], words[cpu.RSI], words[cpu.RSP] = CLOCK_MONOTONIC, stack + 64, stack
    words[cpu.RIP], words[cpu.RFLAGS], words[cpu.DIRTY] = entry, cpu.FLAGS, cpu.SYNC_REGS
    before = time.monotonic_ns()
    for _ in range(8):
        try:
            fcntl.ioctl(processor.fd, kvm.RUN, 0)
            break
        except OSError as error:
            if error.errno not in (EINTR, EAGAIN):
                return False
    after = time.monotonic_ns()
    seconds, nanoseconds = struct.unpack("<qq", memory.read(stack + 64, 16))
    memory.write(stack - PAGE, bytes(2 * PAGE))
    return (
        words[1] & 0xFFFFFFFF == kvm.EXIT_IO
        and words[cpu.RIP] - machine.stub3 in (0, 2)
        and words[cpu.RAX] == 0
        and before <= seconds * 1000000000 + nanoseconds <= after
    )
