"""The payload's memory: its areas, the guest-physical slots behind them, and its page tables.

    guest-virtual          guest-physical              the monitor's own address space
    area [start, end) ───▶ slot at gpa + offset ─────▶ slot at hva + offset

Every area lies in one slot, contiguous in all three address spaces; PROT_NONE areas that were
never accessible have no slot.  Slots are anonymous, lazily populated host memory; a file mapping
is laid over its part of a slot with MAP_FIXED.  Slot 0 holds what the guest's ring 3 can't reach:
page tables, descriptor tables, entry stubs, exception stacks.
"""

from __future__ import annotations

import _thread
import struct
from _bisect import bisect_right

from krun.monitor.builtin import hostcall
from krun.monitor.builtin.hostcall import (
    MAP_ANONYMOUS,
    MAP_FIXED,
    MAP_NORESERVE,
    MAP_PRIVATE,
    MAP_SHARED,
    PROT_READ,
    PROT_WRITE,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PAGE = 4096
LARGE = 2 << 20
TASK_SIZE = 0x7FFFFFFFF000
STACK_TOP = 0x7FFFFFC00000
MMAP_TOP = 0x7FFFF0000000
MMAP_MIN = 0x10000
KERNEL = 0xFFFFFF8000000000
KERNEL_PAGES = 2048
SYSTEM_SIZE = 64 << 20
USER_GPA = 1 << 32
PROT_EXEC = 4
MAP_GROWSDOWN = 0x100
MAP_FIXED_NOREPLACE = 0x100000

EPERM, EACCES, EFAULT, EBUSY, EINVAL, ENOMEM, EEXIST = 1, 13, 14, 16, 22, 12, 17
ENOSYS = 38

_P, _W, _U, _ACCESSED, _DIRTY, _PS, _NX = 1, 2, 4, 0x20, 0x40, 0x80, 1 << 63
_ADDRESS = 0x000FFFFFFFFFF000
_TABLE = _P | _W | _U | _ACCESSED

MADV_DONTNEED = 4
SYS_pread64, SYS_pwrite64, SYS_memfd_create = 17, 18, 319
SYS_mprotect, SYS_mremap, SYS_madvise, SYS_process_vm_readv, SYS_process_vm_writev = (
    10,
    25,
    28,
    310,
    311,
)


class Fault(Exception):
    """A pointer of the payload leads nowhere, or where it may not read or write: EFAULT."""


class OutOfMemory(Exception):
    """The guest-physical space, or the host's memory, is used up: ENOMEM."""


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


class Area:
    """A run of pages with one protection.

    `special` says that the host mapping is not the slot's own (a file's, or shared memory);
    `file` that touching it may raise SIGBUS, so the monitor lets the kernel copy.
    """

    __slots__ = ("end", "file", "flags", "name", "offset", "prot", "slot", "slot_offset", "start")

    def __init__(
        self,
        start: int,
        end: int,
        prot: int,
        flags: int,
        slot: Slot | None = None,
        slot_offset: int = 0,
        name: str = "",
        offset: int = 0,
        file: bool = False,
    ) -> None:
        self.start = start
        self.end = end
        self.prot = prot
        self.flags = flags
        self.slot = slot
        self.slot_offset = slot_offset
        self.name = name
        self.offset = offset
        self.file = file

    @property
    def shared(self) -> bool:
        """Whether fork shares it."""
        return bool(self.flags & MAP_SHARED)

    @property
    def special(self) -> bool:
        """Whether the host's mapping is other than the slot's anonymous memory."""
        return self.file or bool(self.flags & MAP_SHARED)

    @property
    def hva(self) -> int:
        """Host address of its first byte."""
        assert self.slot is not None
        return self.slot.hva + self.slot_offset

    @property
    def gpa(self) -> int:
        """Guest-physical address of its first byte."""
        assert self.slot is not None
        return self.slot.gpa + self.slot_offset

    def part(self, start: int, end: int) -> Area:
        """The piece of it between start and end."""
        skip = start - self.start
        return Area(
            start,
            end,
            self.prot,
            self.flags,
            self.slot,
            self.slot_offset + skip,
            self.name,
            self.offset + skip,
            self.file,
        )

    def continues(self, before: Area) -> bool:
        """Whether it is the same thing as the area right before it."""
        return (
            before.end == self.start
            and before.prot == self.prot
            and before.flags == self.flags
            and before.slot is self.slot
            and not before.file
            and not self.file
            and before.name == self.name
            and (
                self.slot is None
                or before.slot_offset + before.end - before.start == self.slot_offset
            )
        )


class Slot:
    """A KVM memory slot: guest-physical [gpa, gpa + size) is host memory at hva."""

    __slots__ = ("free", "gpa", "hva", "reserved", "size", "view")

    def __init__(self, gpa: int, size: int) -> None:
        self.gpa = gpa
        self.size = size
        self.reserved = size + LARGE
        try:
            address = hostcall.mmap(
                0,
                self.reserved,
                PROT_READ | PROT_WRITE,
                MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
            )
        except OSError as error:
            raise OutOfMemory from error
        # KVM uses large pages where both addresses are congruent.
        self.hva = (address + LARGE - 1) & -LARGE
        hostcall.munmap(self.hva + size, address + self.reserved - self.hva - size)
        if self.hva != address:
            hostcall.munmap(address, self.hva - address)
        self.view = hostcall.view(self.hva, size)
        self.free = [(0, size)]

    def release(self) -> None:
        """Give the host memory back."""
        hostcall.munmap(self.hva, self.size)

    def take(self, size: int, address: int) -> int:
        """First fit of size bytes; congruent with address for large ones; -1 when there is none."""
        for index, (start, length) in enumerate(self.free):
            pad = (address - start) % LARGE if size >= LARGE else 0
            if length >= size + pad:
                self._cut(index, start + pad, size)
                return start + pad
        return -1

    def take_at(self, offset: int, size: int) -> bool:
        """Take exactly [offset, offset + size) if it is free."""
        index = bisect_right(self.free, (offset, self.size + 1)) - 1
        if index < 0:
            return False
        start, length = self.free[index]
        if start <= offset and offset + size <= start + length:
            self._cut(index, offset, size)
            return True
        return False

    def _cut(self, index: int, offset: int, size: int) -> None:
        start, length = self.free[index]
        pieces = []
        if offset > start:
            pieces.append((start, offset - start))
        if offset + size < start + length:
            pieces.append((offset + size, start + length - offset - size))
        self.free[index : index + 1] = pieces

    def give(self, offset: int, size: int) -> None:
        """Put a range back, joined with its free neighbours."""
        free = self.free
        index = bisect_right(free, (offset, 0))
        if index < len(free) and offset + size == free[index][0]:
            size += free[index][1]
            del free[index]
        if index and free[index - 1][0] + free[index - 1][1] == offset:
            offset, before = free[index - 1][0], free[index - 1][1]
            size += before
            index -= 1
            del free[index]
        free.insert(index, (offset, size))


class PageTables:
    """Four-level page tables in slot 0, written as 64-bit words."""

    ROOT = 0x1000

    def __init__(self, system: Slot) -> None:
        self.words = system.view.cast("Q")
        self.system = system
        self.next = self.first = self.ROOT + PAGE
        # The page directory of each GiB, to skip two levels.
        self.directories: dict[int, int] = {}
        self.spare: list[int] = []

    @property
    def used(self) -> int:
        """Bytes of tables ever made."""
        return self.next - self.first

    def table(self) -> int:
        """Guest-physical address of a fresh, empty table."""
        if self.spare:
            address = self.spare.pop()
            self.words[address >> 3 : (address >> 3) + 512] = _EMPTY
            return address
        address = self.next
        if address + PAGE > self.system.size:
            raise OutOfMemory
        self.next = address + PAGE
        return address

    def _below(self, table: int, index: int) -> int:
        entry = self.words[(table >> 3) + index]
        if not entry & _P:
            entry = self.table() | _TABLE
            self.words[(table >> 3) + index] = entry
        return entry & _ADDRESS

    def directory(self, address: int) -> int:
        """Index of the first word of the page directory for an address."""
        key = address >> 30
        found = self.directories.get(key)
        if found is None:
            upper = self._below(self.ROOT, address >> 39 & 511)
            found = self._below(upper, address >> 30 & 511) >> 3
            self.directories[key] = found
        return found

    def set(self, start: int, end: int, gpa: int, bits: int) -> bool:
        """Map [start, end) to gpa with entry bits (0 unmaps); whether old entries were changed."""
        words = self.words
        changed = False
        while start < end:
            slot = self.directory(start) + (start >> 21 & 511)
            stop = min((start | (LARGE - 1)) + 1, end)
            entry = words[slot]
            if stop - start == LARGE and (not bits or not (gpa | start) & (LARGE - 1)):
                words[slot] = (gpa | bits | _PS) if bits else 0
                changed = changed or bool(entry & _P)
                if entry & _P and not entry & _PS:
                    self.spare.append(entry & _ADDRESS)
            elif bits or entry & _P:
                if not entry & _P:
                    table = self.table()
                    entry = table | _TABLE
                    words[slot] = entry
                elif entry & _PS:
                    table = self.table()
                    base = entry & ~_PS
                    words[table >> 3 : (table >> 3) + 512] = _entries(base, 512)
                    words[slot] = table | _TABLE
                    changed = True
                else:
                    table = entry & _ADDRESS
                    changed = True
                first = (table >> 3) + (start >> 12 & 511)
                count = (stop - start) >> 12
                if bits:
                    base = gpa | bits
                    words[first : first + count] = _entries(base, count)
                else:
                    words[first : first + count] = _EMPTY[:count]
            gpa += stop - start
            start = stop
        return changed

    def lookup(self, address: int) -> int:
        """The entry that maps an address, 0 when none does."""
        words = self.words
        table = self.ROOT
        for shift in (39, 30):
            entry = words[(table >> 3) + (address >> shift & 511)]
            if not entry & _P:
                return 0
            table = entry & _ADDRESS
        entry = words[(table >> 3) + (address >> 21 & 511)]
        if not entry & _P or entry & _PS:
            return entry
        return words[((entry & _ADDRESS) >> 3) + (address >> 12 & 511)]


_EMPTY = memoryview(bytes(PAGE)).cast("Q")


def _entries(first: int, count: int) -> memoryview:
    """Consecutive page table entries.  (The array module would import collections: 4 ms.)"""
    pages = range(first, first + count * PAGE, PAGE)
    return memoryview(struct.pack(f"<{count}Q", *pages)).cast("Q")


def _readable(prot: int) -> int:
    """The protection that the processor makes of one: what can be written or run can be read."""
    prot &= 7
    return prot | PROT_READ if prot else 0


def page_bits(prot: int) -> int:
    """Entry bits of a protection; 0 for PROT_NONE."""
    if not prot & 7:
        return 0
    bits = _P | _U | _ACCESSED | _DIRTY
    if prot & PROT_WRITE:
        bits |= _W
    if not prot & PROT_EXEC:
        bits |= _NX
    return bits


class Memory:
    """One payload's address space.

    `register(index, gpa, size, hva)` tells KVM of a new slot; `flushed` is called after entries
    that a processor may have cached were changed.
    """

    def __init__(
        self,
        limit: int,
        register: Callable[[int, int, int, int], None],
        flushed: Callable[[], None],
    ) -> None:
        self.limit = limit
        self.register = register
        self.flushed = flushed
        self.lock = _thread.RLock()
        self.starts: list[int] = []
        self.areas: list[Area] = []
        self.system = Slot(0, SYSTEM_SIZE)
        self.slots = [self.system]
        self.tables = PageTables(self.system)
        self.next_gpa = USER_GPA
        self.next_size = 16 << 20
        self.search = MMAP_TOP
        self.brk_start = self.brk_end = 0
        self.tables.next += KERNEL_PAGES * PAGE
        self.tables.first = self.tables.next
        self.kernel_next = self.tables.ROOT + PAGE
        self.pid = hostcall.call(39)
        register(0, 0, self.system.size, self.system.hva)

    def release(self) -> None:
        """Give all host memory back; the object is dead afterwards."""
        for slot in self.slots:
            slot.release()

    def kernel_page(self, user: bool = False, executable: bool = False) -> tuple[int, int]:
        """A page only the monitor and ring 0 (or everybody, with user) see: address, gpa."""
        gpa = self.kernel_next
        self.kernel_next += PAGE
        if self.kernel_next > self.tables.ROOT + PAGE + KERNEL_PAGES * PAGE:
            raise OutOfMemory
        address = KERNEL + gpa
        self.show_kernel_page(address, gpa, user, executable)
        return address, gpa

    def show_kernel_page(
        self, address: int, gpa: int, user: bool = False, executable: bool = False
    ) -> None:
        """Map a page of slot 0 at an address of the upper half."""
        bits = _P | _ACCESSED | _DIRTY | (0 if executable else _NX)
        bits |= _U if user else _W
        self.tables.set(address, address + PAGE, gpa, bits)

    # What the areas are.

    def find(self, address: int) -> Area | None:
        """The area an address lies in."""
        index = bisect_right(self.starts, address) - 1
        if index >= 0:
            area = self.areas[index]
            if address < area.end:
                return area
        return None

    def overlapping(self, start: int, end: int) -> Iterator[Area]:
        """The areas that have a page in [start, end), lowest first."""
        index = max(bisect_right(self.starts, start) - 1, 0)
        for area in self.areas[index:]:
            if area.start >= end:
                return
            if area.end > start:
                yield area

    def _insert(self, area: Area) -> None:
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

    # What backs them.

    def _back(self, area: Area, near: Area | None = None) -> None:
        """Give an area its guest-physical memory."""
        size = area.end - area.start
        if near is not None and near.slot is not None:
            offset = near.slot_offset + near.end - near.start
            if near.slot.take_at(offset, size):
                area.slot, area.slot_offset = near.slot, offset
                return
        for slot in self.slots[1:]:
            offset = slot.take(size, area.start)
            if offset >= 0:
                area.slot, area.slot_offset = slot, offset
                return
        wanted = max(self.next_size, (size + 2 * LARGE - 1) & -LARGE)
        used = self.next_gpa - USER_GPA
        if used + wanted > self.limit:
            wanted = (size + 2 * LARGE - 1) & -LARGE
            if used + wanted > self.limit:
                raise OutOfMemory
        slot = Slot(self.next_gpa, wanted)
        try:
            self.register(len(self.slots), slot.gpa, slot.size, slot.hva)
        except OSError as error:
            slot.release()
            raise OutOfMemory from error
        self.next_gpa += wanted
        self.next_size = min(self.next_size * 2, 1 << 30)
        self.slots.append(slot)
        area.slot, area.slot_offset = slot, slot.take(size, area.start)

    def _discard(self, area: Area) -> None:
        """Take the memory of a carved area back, emptied."""
        if area.slot is None:
            return
        size = area.end - area.start
        if area.special:
            hostcall.mmap(
                area.hva,
                size,
                PROT_READ | PROT_WRITE,
                MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED,
            )
        else:
            hostcall.call(SYS_madvise, area.hva, size, MADV_DONTNEED)
        area.slot.give(area.slot_offset, size)

    def _show(self, area: Area) -> None:
        """Write the page table entries of an area."""
        if area.slot is None:
            return
        if self.tables.set(area.start, area.end, area.gpa, page_bits(area.prot)):
            self.flushed()

    # The system calls.

    def map(
        self,
        address: int,
        size: int,
        prot: int,
        flags: int,
        fd: int = -1,
        offset: int = 0,
        name: str = "",
    ) -> int:
        """mmap(2): the address, or a negative errno."""
        if not size or offset & 4095:
            return -EINVAL
        kind = flags & 0xF
        if kind not in (1, 2, 3):
            return -EINVAL
        if kind == 3:
            flags = (flags & ~0xF) | MAP_SHARED
        size = (size + PAGE - 1) & -PAGE
        prot = _readable(prot)
        fixed = flags & (MAP_FIXED | MAP_FIXED_NOREPLACE)
        if size > TASK_SIZE:
            return -ENOMEM
        with self.lock:
            if fixed:
                if address & 4095:
                    return -EINVAL
                if address < MMAP_MIN:
                    return -EPERM
                if address + size > TASK_SIZE:
                    return -ENOMEM
                if flags & MAP_FIXED_NOREPLACE and any(self.overlapping(address, address + size)):
                    return -EEXIST
            else:
                address = (address + PAGE - 1) & -PAGE
                if (
                    address < MMAP_MIN
                    or address + size > MMAP_TOP
                    or any(self.overlapping(address, address + size))
                ):
                    address = self.gap(size)
                    if not address:
                        return -ENOMEM
            area = Area(
                address,
                address + size,
                prot,
                flags & (MAP_SHARED | MAP_PRIVATE | MAP_GROWSDOWN),
                None,
                0,
                name,
                offset,
                not flags & MAP_ANONYMOUS,
            )
            try:
                if area.special or prot:
                    self._back(area)
                if area.special:
                    result = self._overlay(area, fd, offset)
                    if result < 0:
                        assert area.slot is not None
                        area.slot.give(area.slot_offset, size)
                        return result
                if fixed:
                    self.unmap(address, size)
                self._show(area)
            except OutOfMemory:
                return -ENOMEM
            self._insert(area)
            return address

    def _overlay(self, area: Area, fd: int, offset: int) -> int:
        """Lay a file, or shared memory, over an area's host memory."""
        if not area.file:
            flags = MAP_SHARED | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE
            prot = PROT_READ | PROT_WRITE
            fd, offset = -1, 0
        elif area.shared:
            flags = MAP_SHARED | MAP_FIXED
            prot = PROT_READ | (area.prot & PROT_WRITE)
        else:
            flags = MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE
            prot = PROT_READ | PROT_WRITE
        result = hostcall.call(9, area.hva, area.end - area.start, prot, flags, fd, offset)
        return result if -4096 < result < 0 else 0

    def unmap(self, address: int, size: int) -> int:
        """munmap(2)."""
        size = (size + PAGE - 1) & -PAGE
        if address & 4095 or not size or address + size > TASK_SIZE:
            return -EINVAL
        with self.lock:
            end = address + size
            pieces = self._carve(address, end)
            changed = False
            for area in pieces:
                if area.slot is not None:
                    changed |= self.tables.set(area.start, area.end, 0, 0)
            if changed:
                self.flushed()
            for area in pieces:
                self._discard(area)
            if pieces and end <= MMAP_TOP:
                self.search = max(self.search, end)
            return 0

    def protect(self, address: int, size: int, prot: int) -> int:
        """mprotect(2)."""
        size = (size + PAGE - 1) & -PAGE
        if address & 4095:
            return -EINVAL
        if not size:
            return 0
        prot = _readable(prot)
        with self.lock:
            reach = address
            for area in self.overlapping(address, address + size):
                if area.start > reach:
                    return -ENOMEM
                if area.file and area.shared and prot & PROT_WRITE:
                    part = area.part(max(area.start, address), min(area.end, address + size))
                    result = hostcall.call(
                        SYS_mprotect, part.hva, part.end - part.start, PROT_READ | PROT_WRITE
                    )
                    if result < 0:
                        return result
                reach = area.end
            if reach < address + size:
                return -ENOMEM
            changed = False
            result = 0
            for area in self._carve(address, address + size):
                before = area.prot
                area.prot = prot
                if area.slot is None and prot:
                    try:
                        self._back(area)
                    except OutOfMemory:
                        area.prot = before
                        result = -ENOMEM
                if area.slot is not None:
                    changed |= self.tables.set(area.start, area.end, area.gpa, page_bits(area.prot))
                self._insert(area)
            if changed:
                self.flushed()
            return result

    def remap(self, old: int, old_size: int, size: int, flags: int, new: int) -> int:
        """mremap(2) with MREMAP_MAYMOVE (1) and MREMAP_FIXED (2)."""
        old_size = (old_size + PAGE - 1) & -PAGE
        size = (size + PAGE - 1) & -PAGE
        if old & 4095 or not size or flags & ~3 or (flags & 2 and (not flags & 1 or new & 4095)):
            return -EINVAL
        if not old_size:
            return -EINVAL
        with self.lock:
            area = self.find(old)
            if area is None or old + old_size > area.end:
                return -EFAULT
            if flags & 2:
                if new + size > TASK_SIZE or (new < old + old_size and old < new + size):
                    return -EINVAL
                self.unmap(new, size)
            elif size <= old_size:
                if size < old_size:
                    self.unmap(old + size, old_size - size)
                return old
            elif old + old_size == area.end and not any(self.overlapping(area.end, old + size)):
                result = self._grow(area, old + size)
                if result == 0:
                    return old
            if not flags & 1:
                return -ENOMEM
            return self._move(old, old_size, size, new if flags & 2 else 0)

    def _grow(self, area: Area, end: int) -> int:
        if end > TASK_SIZE or area.special:
            return -ENOMEM
        more = Area(area.end, end, area.prot, area.flags, None, 0, area.name)
        if area.slot is not None:
            offset = area.slot_offset + area.end - area.start
            if not area.slot.take_at(offset, end - area.end):
                return -ENOMEM
            more.slot, more.slot_offset = area.slot, offset
            try:
                self._show(more)
            except OutOfMemory:
                area.slot.give(offset, end - area.end)
                return -ENOMEM
        self._insert(more)
        return 0

    def _move(self, old: int, old_size: int, size: int, new: int) -> int:
        area = self.find(old)
        assert area is not None
        source = area.part(old, old + old_size)
        if not new:
            new = self.gap(size)
            if not new:
                return -ENOMEM
        target = Area(
            new, new + size, area.prot, area.flags, None, 0, area.name, source.offset, area.file
        )
        if source.slot is not None:
            try:
                self._back(target)
            except OutOfMemory:
                return -ENOMEM
            assert target.slot is not None
            keep = min(old_size, size)
            # MREMAP_MAYMOVE | MREMAP_FIXED moves the pages; the hole left gets fresh memory.
            if area.special or keep >= LARGE:
                moved = hostcall.call(
                    SYS_mremap,
                    source.hva,
                    keep,
                    size if area.special else keep,
                    3,
                    target.hva,
                )
                if -4096 < moved < 0:
                    target.slot.give(target.slot_offset, size)
                    return moved
                hostcall.mmap(
                    source.hva,
                    keep,
                    PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED,
                )
            else:
                here, there = source.slot_offset, target.slot_offset
                target.slot.view[there : there + keep] = source.slot.view[here : here + keep]
        self.unmap(old, old_size)
        try:
            self._show(target)
        except OutOfMemory:
            self._discard(target)
            return -ENOMEM
        self._insert(target)
        return new

    def brk(self, address: int) -> int:
        """brk(2): the break there is afterwards."""
        with self.lock:
            if address < self.brk_start:
                return self.brk_end
            before = (self.brk_end + PAGE - 1) & -PAGE
            after = (address + PAGE - 1) & -PAGE
            if after > before:
                if after > MMAP_TOP or any(self.overlapping(before, after)):
                    return self.brk_end
                near = self.find(before - 1) if before > self.brk_start else None
                area = Area(before, after, 3, MAP_PRIVATE, None, 0, "[heap]")
                try:
                    self._back(area, near)
                    self._show(area)
                except OutOfMemory:
                    return self.brk_end
                self._insert(area)
            elif after < before:
                self.unmap(after, before - after)
            self.brk_end = address
            return address

    def advise(self, address: int, size: int, advice: int) -> int:
        """madvise(2): MADV_DONTNEED and its kin act, hints succeed."""
        size = (size + PAGE - 1) & -PAGE
        if address & 4095:
            return -EINVAL
        with self.lock:
            reach = address
            for area in self.overlapping(address, address + size):
                if area.start > reach:
                    return -ENOMEM
                reach = area.end
                if area.slot is None or advice not in (4, 8, 9, 14, 15, 20, 21, 22, 23):
                    continue
                part = area.part(max(area.start, address), min(area.end, address + size))
                result = hostcall.call(SYS_madvise, part.hva, part.end - part.start, advice)
                if result < 0 and advice in (4, 8, 9):
                    return result
            return 0 if reach >= address + size else -ENOMEM

    def grow_down(self, address: int) -> bool:
        """Extend a MAP_GROWSDOWN area to a faulting address; whether it did."""
        with self.lock:
            page = address & -PAGE
            index = bisect_right(self.starts, address)
            if index >= len(self.areas):
                return False
            area = self.areas[index]
            if not area.flags & MAP_GROWSDOWN or area.start - page > (8 << 20):
                return False
            if index and page - self.areas[index - 1].end < 256 * PAGE:
                return False
            more = Area(page, area.start, area.prot, area.flags, None, 0, area.name)
            try:
                self._back(more)
                self._show(more)
            except OutOfMemory:
                return False
            self._insert(more)
            return True

    # The monitor's access to it.

    def host(self, address: int, size: int, prot: int) -> int:
        """Host address of [address, address + size), 0 when it is not contiguous there.

        Raises Fault unless every byte of it may be read (prot 1) or written (prot 2).
        """
        starts = self.starts
        index = bisect_right(starts, address) - 1
        if index < 0:
            raise Fault
        area = self.areas[index]
        if address >= area.end or not area.prot & prot:
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

    def pieces(self, address: int, size: int, prot: int) -> list[tuple[int, int]]:
        """(host address, length) of each part of [address, address + size); raises Fault."""
        pieces = []
        while size > 0:
            area = self.find(address)
            if area is None or not area.prot & prot or area.slot is None:
                raise Fault
            length = min(size, area.end - address)
            pieces.append((area.hva + address - area.start, length))
            address += length
            size -= length
        return pieces

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
