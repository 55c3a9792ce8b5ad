"""What a resting process's memory is made of, and what must change for another one to live in it.

Every mapping becomes a segment at its own address, except for those that the kernel makes in each
process.  The first stack and the vDSO (vdso(7)) are among these, wherever the kernel likes, and
are pointed to: copies of them move, and the pointers with them.
"""

from __future__ import annotations

import re
import struct

from krun.errors import KrunError
from krun.install import wake
from krun.install.seed import ROOM
from krun.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

# Above it the kernel may put a new process's stack, wherever else it puts the rest
# (arch/x86/mm/mmap.c: 16 GiB of random places and a gap below the end of the address space).
HIGHEST = 0x7FFB_F800_0000
# struct pthread, in bytes: more than glibc has had so far.
_THREAD = 2560
# Mappings that the kernel makes in every process, and those that move.
_KERNELS = ("[vvar]", "[vvar_vclock]", "[vsyscall]", "[uprobes]")
_MOVED = ("[vdso]", "[stack]")


class Unfit(KrunError):
    """No file can be made here; says why."""


class Mapping(Record):
    """A line of /proc/PID/maps (proc_pid_maps(5)): addresses, rwx flags as in elf(5), the name."""

    start: int
    end: int
    flags: int
    name: str


class Segment(Record):
    """A part of the new process's memory: its address, flags and content."""

    start: int
    flags: int
    content: bytearray


def mappings(text: str) -> list[Mapping]:
    """Return the mappings of /proc/PID/maps."""
    found = []
    for line in text.splitlines():
        fields = line.split(None, 5)
        start, _, end = fields[0].partition("-")
        flags = sum(bit for bit, letter in ((4, "r"), (2, "w"), (1, "x")) if letter in fields[1])
        name = fields[5] if len(fields) > 5 else ""
        found.append(Mapping(int(start, 16), int(end, 16), flags, name))
    return found


def functions(vdso: bytes) -> dict[int, str]:
    """Return the names of a vDSO's functions by their offset; __vdso_ is left out."""
    table = struct.unpack_from("<Q", vdso, 40)[0]
    count = struct.unpack_from("<H", vdso, 60)[0]
    sections = [struct.unpack_from("<IIQQQQIIQQ", vdso, table + 64 * i) for i in range(count)]
    found = {}
    for _, kind, _, _, offset, size, link, _, _, _ in sections:
        if kind != 11:  # SHT_DYNSYM
            continue
        names = sections[link][4]
        for place in range(offset, offset + size, 24):
            name, info, _, _, value, _ = struct.unpack_from("<IBBHQQ", vdso, place)
            if info & 15 == 2:  # STT_FUNC
                end = vdso.index(b"\0", names + name)
                found[value] = vdso[names + name : end].decode().removeprefix("__vdso_")
    return found


def pointers(content: bytes | bytearray, start: int, end: int) -> list[int]:
    """Return where in memory there are aligned words that point into [start, end)."""
    found = []
    # All but the lowest two bytes are the same in each stretch of 64 KiB.
    for high in range(start >> 16, (end - 1 >> 16) + 1):
        for match in re.finditer(re.escape(high.to_bytes(6, "little")), content):
            place = match.start() - 2
            if (
                place % 8 == 0
                and start <= int.from_bytes(content[place : place + 8], "little") < end
            ):
                found.append(place)
    return found


class Memory:
    """The segments of the file to be."""

    def __init__(self, segments: list[Segment]) -> None:
        self.segments = segments

    def _find(self, address: int) -> tuple[bytearray, int]:
        for segment in self.segments:
            if segment.start <= address < segment.start + len(segment.content):
                return segment.content, address - segment.start
        raise Unfit(f"the seed has no memory at {address:#x}")

    def read(self, address: int, size: int) -> bytes:
        """Return bytes at an address."""
        content, place = self._find(address)
        return bytes(content[place : place + size])

    def write(self, address: int, data: bytes) -> None:
        """Put bytes at an address."""
        content, place = self._find(address)
        content[place : place + len(data)] = data

    def word(self, address: int) -> int:
        """Return the 8-byte word at an address."""
        return int.from_bytes(self.read(address, 8), "little")

    def set_word(self, address: int, value: int) -> None:
        """Put an 8-byte word at an address."""
        self.write(address, value.to_bytes(8, "little"))

    def move(self, start: int, content: bytes, place: int, known: dict[int, int]) -> None:
        """Put content that was at `start` elsewhere; pointers to it follow.

        A pointer to an offset in `known` becomes the address there instead.
        """
        self.write(place, content)
        end = start + len(content)
        for segment in self.segments:
            if segment.flags & 1:
                continue
            for at in pointers(segment.content, start, end):
                offset = int.from_bytes(segment.content[at : at + 8], "little") - start
                target = known.get(offset, place + offset)
                segment.content[at : at + 8] = target.to_bytes(8, "little")


def copied(pid: int, base: int, found: Sequence[Mapping]) -> Memory:
    """Return the memory of a resting process, such that another one can live in it."""
    segments = []
    moved: dict[str, tuple[int, bytes]] = {}
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for one in found:
            # What nobody can read is a guard page.
            if one.name in _KERNELS or not one.flags & 4:
                continue
            memory.seek(one.start)
            content = memory.read(one.end - one.start)
            if one.name in _MOVED:
                moved[one.name] = (one.start, content)
                continue
            if one.end > HIGHEST:
                raise Unfit("this process's address space is not laid out at random (setarch -R)")
            segments.append(Segment(one.start, one.flags, bytearray(content)))
    result = Memory(segments)
    place = base + wake.SIZE
    labels = wake.labels()
    for name, (start, content) in moved.items():
        named = functions(content).items() if name == "[vdso]" else ()
        known = {offset: base + labels[word] for offset, word in named if word in labels}
        result.move(start, content, place, known)
        place += len(content)
    if place > base + ROOM:
        raise Unfit("the first stack is larger than the room for it")
    return result


def settle(memory: Memory, pid: int, base: int, break_: int, rseq: int) -> None:
    """Set what the kernel knows of a process and the C library remembers."""
    thread = memory.word(base + wake.THREAD)
    content = memory.read(thread, _THREAD)
    places = [
        i for i in range(0, len(content), 4) if content[i : i + 4] == pid.to_bytes(4, "little")
    ]
    if len(places) != 1:
        raise Unfit("the C library does not keep the thread's id as glibc does")
    memory.set_word(base + wake.TID, thread + places[0])
    # brk(2) begins elsewhere: the C library shall ask.
    memory.set_word(break_, 0)
    if rseq:
        # Not registered (rseq(2)): cpu_id_start, cpu_id = RSEQ_CPU_ID_REGISTRATION_FAILED.
        offset = struct.unpack("<q", memory.read(rseq, 8))[0]
        memory.write(thread + offset, struct.pack("<Ii", 0, -2))
