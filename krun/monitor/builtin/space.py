"""The list of the payload's areas, and the monitor's access to what is in them.

Every pointer of the payload is looked up here: it becomes an address in guest memory, or Fault.
"""

from __future__ import annotations

import _thread
import struct
from _bisect import bisect_right

from krun.monitor.builtin import hostcall
from krun.monitor.builtin.areas import LARGE, PAGE, Area, Fault
from krun.monitor.builtin.hostcall import (
    MAP_ANONYMOUS,
    MAP_NORESERVE,
    MAP_PRIVATE,
    PROT_WRITE,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

TASK_SIZE = 0x7FFFFFFFF000
HOLE = (1 << 32) + PAGE
MMAP_TOP = 0x7FFFF0000000
MMAP_MIN = 0x10000

EPERM, ENOSYS = 1, 38
SYS_pread64, SYS_pwrite64, SYS_memfd_create = 17, 18, 319
SYS_process_vm_readv, SYS_process_vm_writev = 310, 311


def _copy_by_file(out: bool, place: int, hva: int, size: int) -> int:
    """Copy between the monitor's memory and the payload's through a file; the bytes copied."""
    name = bytearray(b"copy\0")
    fd = hostcall.checked("memfd_create", SYS_memfd_create, hostcall.address_of(name), 1)
    try:
        source, target = (hva, place) if out else (place, hva)
        written = hostcall.call(SYS_pwrite64, fd, source, size, 0)
        return hostcall.call(SYS_pread64, fd, target, written, 0) if written > 0 else written
    finally:
        hostcall.call(3, fd)


class Space:
    """The areas of one payload, lowest first."""

    def __init__(self) -> None:
        self.lock = _thread.RLock()
        self.starts: list[int] = []
        self.areas: list[Area] = []
        self.changes = 0
        self.search = MMAP_TOP
        self.nothing = 0
        self.pid = hostcall.call(39)

    # What the areas are.

    def find(self, address: int) -> Area | None:
        """The area an address lies in.

        Another thread may be changing the list: what is found without the lock is true, and what
        is not is looked for again with it.
        """
        try:
            area = self.areas[bisect_right(self.starts, address) - 1]
            if area.start <= address < area.end:
                return area
        except IndexError:
            pass
        with self.lock:
            index = bisect_right(self.starts, address) - 1
            if index >= 0 and address < self.areas[index].end:
                return self.areas[index]
        return None

    def settled(self, address: int) -> tuple[Area | None, int]:
        """The same, and the number of changes of the list so far, when nobody is changing it."""
        with self.lock:
            return self.find(address), self.changes

    def listed(self, start: int, end: int) -> list[Area]:
        """The areas that have a page in [start, end), when nobody is changing the list."""
        with self.lock:
            return list(self.overlapping(start, end))

    def overlapping(self, start: int, end: int) -> Iterator[Area]:
        """The areas that have a page in [start, end), lowest first."""
        index = max(bisect_right(self.starts, start) - 1, 0)
        for area in self.areas[index:]:
            if area.start >= end:
                return
            if area.end > start:
                yield area

    def _insert(self, area: Area) -> None:
        self.changes += 1
        index = bisect_right(self.starts, area.start)
        if index and area.continues(self.areas[index - 1]):
            before = self.areas[index - 1]
            before.end = area.end
            area = before
            index -= 1
        else:
            self.starts.insert(index, area.start)
            self.areas.insert(index, area)
        if index + 1 < len(self.areas) and self.areas[index + 1].continues(area):
            area.end = self.areas[index + 1].end
            del self.starts[index + 1], self.areas[index + 1]

    def _carve(self, start: int, end: int) -> list[Area]:
        """Take the pieces of all areas in [start, end) out of the list."""
        pieces = []
        self.changes += 1
        for area in list(self.overlapping(start, end)):
            index = bisect_right(self.starts, area.start) - 1
            rest = []
            if area.start < start:
                rest.append(area.part(area.start, start))
            if area.end > end:
                rest.append(area.part(end, area.end))
            self.areas[index : index + 1] = rest
            self.starts[index : index + 1] = [piece.start for piece in rest]
            pieces.append(area.part(max(area.start, start), min(area.end, end)))
        return pieces

    def gap(self, size: int) -> int:
        """Where size bytes are free, top down below MMAP_TOP; 0 when nowhere."""
        alignment = LARGE if size >= LARGE else PAGE
        for top in (self.search, MMAP_TOP):
            index = bisect_right(self.starts, top - 1)
            upper = top
            while True:
                lower = self.areas[index - 1].end if index else MMAP_MIN
                place = (upper - size) & -alignment
                if place >= lower:
                    if place >= MMAP_MIN:
                        self.search = max(place, MMAP_MIN + PAGE)
                        return place
                    break
                if not index:
                    break
                upper = min(self.areas[index - 1].start, upper)
                index -= 1
        return 0

    # The monitor's access to it.

    def host(self, address: int, size: int, prot: int) -> int:
        """Host address of [address, address + size), 0 when it is not contiguous there.

        Raises Fault unless every byte of it may be read (prot 1) or written (prot 2).
        """
        area = self.find(address)
        if area is None or not area.prot & prot:
            raise Fault
        slot = area.slot
        if slot is None:
            raise Fault
        place = slot.hva + area.slot_offset + address - area.start
        if address + size <= area.end:
            return place
        contiguous = True
        for hva, length in self.pieces(address, size, prot):
            contiguous = contiguous and hva == place
            place = hva + length
        return area.hva + address - area.start if contiguous else 0

    def reach(self, address: int, size: int, prot: int) -> list[tuple[int, int]]:
        """(host address, length) of each part, up to the first byte that is not accessible."""
        pieces = []
        while size > 0:
            area = self.find(address)
            if area is None or not area.prot & prot or area.slot is None:
                break
            length = min(size, area.end - address)
            pieces.append((area.hva + address - area.start, length))
            address += length
            size -= length
        return pieces

    def pieces(self, address: int, size: int, prot: int) -> list[tuple[int, int]]:
        """(host address, length) of each part of [address, address + size); raises Fault."""
        pieces = self.reach(address, size, prot)
        if sum(length for _, length in pieces) < size:
            raise Fault
        return pieces

    def hole(self) -> int:
        """Address of HOLE bytes that nobody may touch: what the kernel finds at a bad pointer.

        Raises Fault where an address space limit leaves no room for it.
        """
        if not self.nothing:
            flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE
            try:
                self.nothing = hostcall.mmap(0, HOLE, 0, flags)
            except OSError as error:
                raise Fault from error
        return self.nothing

    def read(self, address: int, size: int) -> bytes:
        """Copy size bytes out; raises Fault."""
        area = self.find(address)
        if area is None or not area.prot & 7 or area.slot is None:
            raise Fault
        if address + size > area.end:
            head = area.end - address
            return self.read(address, head) + self.read(area.end, size - head)
        if area.file:
            return self._kernel_read(area.hva + address - area.start, size)
        offset = area.slot_offset + address - area.start
        return bytes(area.slot.view[offset : offset + size])

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        """Copy data in; raises Fault."""
        size = len(data)
        if not size:
            return
        area = self.find(address)
        if area is None or not area.prot & PROT_WRITE or area.slot is None:
            raise Fault
        if address + size > area.end:
            head = area.end - address
            self.host(address, size, PROT_WRITE)
            self.write(address, data[:head])
            self.write(area.end, data[head:])
            return
        if area.file:
            self._kernel_write(area.hva + address - area.start, data)
            return
        offset = area.slot_offset + address - area.start
        area.slot.view[offset : offset + size] = data

    def string(self, address: int, limit: int = PAGE) -> bytes:
        """The NUL-terminated string at address without its NUL; raises Fault.

        One without a NUL in its first `limit` bytes is returned `limit` bytes long.
        """
        found = b""
        while len(found) < limit:
            area = self.find(address)
            if area is None or not area.prot & 7:
                raise Fault
            chunk = self.read(address, min(256, area.end - address, limit - len(found)))
            end = chunk.find(b"\0")
            if end >= 0:
                return found + chunk[:end]
            found += chunk
            address += len(chunk)
        return found

    def word(self, address: int) -> int:
        """The 32-bit word at address; raises Fault."""
        return int.from_bytes(self.read(address, 4), "little")

    # A file may be cut short while it is mapped: touching it would raise SIGBUS in the monitor,
    # so the kernel copies, and says EFAULT.

    def _kernel_read(self, hva: int, size: int) -> bytes:
        buffer = bytearray(size)
        if not size:
            return b""
        self._kernel_copy(SYS_process_vm_readv, buffer, hva)
        return bytes(buffer)

    def _kernel_write(self, hva: int, data: bytes | bytearray | memoryview) -> None:
        self._kernel_copy(SYS_process_vm_writev, bytearray(data), hva)

    def _kernel_copy(self, number: int, buffer: bytearray, hva: int) -> None:
        size = len(buffer)
        place = hostcall.address_of(buffer)
        vectors = bytearray(struct.pack("<QQQQ", place, size, hva, size))
        address = hostcall.address_of(vectors)
        result = hostcall.call(number, self.pid, address, 1, address + 16, 1, 0)
        if result in (-EPERM, -ENOSYS):
            # A container's seccomp profile may lack these two calls; a file does it in four.
            result = _copy_by_file(number == SYS_process_vm_readv, place, hva, size)
        if result != size:
            raise Fault

    def maps(self) -> str:
        """The areas as /proc/PID/maps lists them."""
        lines = []
        with self.lock:
            for area in self.areas:
                letters = "".join(
                    letter if area.prot & bit else "-"
                    for letter, bit in (("r", 1), ("w", 2), ("x", 4))
                )
                letters += "s" if area.shared else "p"
                line = f"{area.start:x}-{area.end:x} {letters} {area.offset:08x} 00:00 0"
                lines.append(f"{line:<73}{area.name}" if area.name else line)
        return "\n".join(lines) + "\n"
