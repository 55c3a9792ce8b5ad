"""The payload's memory: what mmap(2) and its kin do to its areas, slots and page tables.

Slots are anonymous, lazily populated host memory; a file mapping is laid over its part of a slot
with MAP_FIXED.  Slot 0 holds what the guest's ring 3 can't reach: page tables, descriptor tables,
entry stubs, exception stacks.
"""

from __future__ import annotations

from _bisect import bisect_right

from krun.monitor.builtin import hostcall
from krun.monitor.builtin.areas import LARGE, PAGE, Area, Lent, OutOfMemory, Slot
from krun.monitor.builtin.hostcall import (
    MAP_ANONYMOUS,
    MAP_FIXED,
    MAP_NORESERVE,
    MAP_PRIVATE,
    MAP_SHARED,
    PROT_EXEC,
    PROT_READ,
    PROT_WRITE,
)
from krun.monitor.builtin.pagetables import PageTables, kernel_bits, page_bits
from krun.monitor.builtin.space import HOLE, MMAP_MIN, MMAP_TOP, TASK_SIZE, Space

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

STACK_TOP = 0x7FFFFFC00000
KERNEL = 0xFFFFFF8000000000
KERNEL_PAGES = 2048
SYSTEM_SIZE = 64 << 20
USER_GPA = 1 << 32
MAP_GROWSDOWN = 0x100
WORD = (1 << 64) - 1
MAP_FIXED_NOREPLACE = 0x100000
SHM_RDONLY, SHM_REMAP = 0o10000, 0o40000
SEGMENT = "/SYSV"

EPERM, EFAULT, EINVAL, ENOMEM, EEXIST = 1, 14, 22, 12, 17

MADV_DONTNEED = 4
SYS_mprotect, SYS_mremap, SYS_madvise, SYS_shmat = 10, 25, 28, 30


def _readable(prot: int) -> int:
    """The protection that the processor makes of one: what can be written or run can be read."""
    prot &= 7
    return prot | PROT_READ if prot else 0


def _map_fresh(hva: int, size: int) -> None:
    """Put empty pages in the place of what is mapped there."""
    flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED
    hostcall.mmap(hva, size, PROT_READ | PROT_WRITE, flags)


class Memory(Space):
    """One payload's address space.

    `register(index, gpa, size, hva, flags)` tells KVM of a new slot; `flushed` is called after
    entries that a processor may have cached were changed.
    """

    def __init__(
        self,
        limit: int,
        register: Callable[..., None],
        flushed: Callable[[], None],
    ) -> None:
        super().__init__()
        self.limit = limit
        self.register = register
        self.flushed = flushed
        self.system = Slot(0, SYSTEM_SIZE)
        self.slots = [self.system]
        self.tables = PageTables(self.system)
        self.next_gpa = USER_GPA
        self.next_size = 16 << 20
        self.brk_start = self.brk_end = 0
        self.tables.next += KERNEL_PAGES * PAGE
        self.tables.first = self.tables.next
        self.kernel_next = self.tables.ROOT + PAGE
        register(0, 0, self.system.size, self.system.hva)

    def release(self) -> None:
        """Give all host memory back; the object is dead afterwards."""
        for slot in self.slots:
            slot.release()
        if self.nothing:
            hostcall.munmap(self.nothing, HOLE)

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
        self.tables.set(address, address + PAGE, gpa, kernel_bits(user, executable))

    def show_user_pages(self, address: int, size: int, gpa: int, *, executable: bool) -> None:
        """Map pages that the payload may read, or run, outside of all areas."""
        self.tables.set(address, address + size, gpa, kernel_bits(True, executable))

    def lend(self, hva: int, size: int) -> int:
        """Make pages of the host's readable at the guest-physical address returned.

        Raises OutOfMemory where KVM does not take them.
        """
        slot = Lent(self.next_gpa, size, hva)
        try:
            self.register(len(self.slots), slot.gpa, size, hva, slot.flags)
        except OSError as error:
            raise OutOfMemory from error
        self.slots.append(slot)
        self.next_gpa += LARGE
        return slot.gpa

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
            _map_fresh(area.hva, size)
        else:
            hostcall.call(SYS_madvise, area.hva, size, MADV_DONTNEED)
        area.slot.give(area.slot_offset, size)

    def _show(self, area: Area) -> None:
        """Write the page table entries of an area."""
        if area.slot is None:
            return
        if self.tables.set(area.start, area.end, area.gpa, page_bits(area.prot)):
            self.flushed()

    def _revoke(self, area: Area, before: int) -> None:
        """Have KVM forget what it made of entries that allowed more, on every processor at once.

        It looks anew at what lies behind host pages whose protection changes.  The tables are
        not enough: where it shadows them it does not see the monitor write them.
        """
        host = PROT_READ
        if before & PROT_WRITE or not (area.file and area.shared):
            host |= PROT_WRITE
        size = area.end - area.start
        # Nothing is taken away meanwhile that another thread could miss.
        if hostcall.call(SYS_mprotect, area.hva, size, host | PROT_EXEC) == 0:
            hostcall.call(SYS_mprotect, area.hva, size, host)

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
        segment: int = -1,
    ) -> int:
        """mmap(2), or shmat(2) of a segment: the address, or a negative errno."""
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
                not flags & MAP_ANONYMOUS or segment >= 0,
            )
            try:
                if area.special or prot:
                    self._back(area)
                if area.special:
                    result = self._overlay(area, fd, offset, segment)
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

    def _overlay(self, area: Area, fd: int, offset: int, segment: int) -> int:
        """Lay a file, a System V segment, or shared memory over an area's host memory."""
        if segment >= 0:
            mode = SHM_REMAP | (0 if area.prot & PROT_WRITE else SHM_RDONLY)
            return min(hostcall.call(SYS_shmat, segment, area.hva, mode), 0)
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

    def attach(self, segment: int, size: int, address: int, prot: int, remap: bool) -> int:
        """shmat(2) of a segment of this size; the address, or a negative errno."""
        flags = MAP_SHARED | MAP_ANONYMOUS
        if address:
            flags |= MAP_FIXED if remap else MAP_FIXED_NOREPLACE
        result = self.map(address, size, prot, flags, name=f"{SEGMENT}{segment}", segment=segment)
        return -EINVAL if result == -EEXIST else result

    def detach(self, address: int) -> int:
        """shmdt(2) of the segment attached at an address."""
        with self.lock:
            end = address
            area = self.find(address)
            name = area.name if area is not None else ""
            if not name.startswith(SEGMENT):
                return -EINVAL
            while area is not None and area.name == name and area.offset == area.start - address:
                end = area.end
                area = self.find(end)
            return self.unmap(address, end - address) if end > address else -EINVAL

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
                    if before & ~prot:
                        self._revoke(area, before)
                self._insert(area)
            if changed:
                self.flushed()
            return result

    def remap(self, old: int, old_size: int, size: int, flags: int, new: int) -> int:
        """mremap(2) with MREMAP_MAYMOVE (1) and MREMAP_FIXED (2)."""
        old_size = (old_size + PAGE - 1) & -PAGE & WORD
        size = (size + PAGE - 1) & -PAGE & WORD
        if (
            old & 4095
            or not 0 < size <= TASK_SIZE
            or flags & ~3
            or (flags & 2 and (not flags & 1 or new & 4095))
        ):
            return -EINVAL
        if not old_size:
            return -EINVAL
        with self.lock:
            area = self.find(old)
            if area is not None and size <= old_size and not flags & 2:
                # Only the rest goes, whatever it is part of.
                if size < old_size:
                    self.unmap(old + size, old_size - size)
                return old
            if area is None or old + old_size > area.end:
                return -EFAULT
            if flags & 2:
                if new + size > TASK_SIZE or (new < old + old_size and old < new + size):
                    return -EINVAL
                self.unmap(new, size)
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
                _map_fresh(source.hva, keep)
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
