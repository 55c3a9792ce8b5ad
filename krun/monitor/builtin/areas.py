"""Areas of the payload's address space, and the KVM slots that are the memory behind them.

    guest-virtual          guest-physical              the monitor's own address space
    area [start, end) ───▶ slot at gpa + offset ─────▶ slot at hva + offset

Every area lies in one slot, contiguous in all three address spaces; PROT_NONE areas that were
never accessible have no slot.
"""

from __future__ import annotations

from _bisect import bisect_right

from krun.monitor.builtin import hostcall
from krun.monitor.builtin.hostcall import (
    MAP_ANONYMOUS,
    MAP_NORESERVE,
    MAP_PRIVATE,
    MAP_SHARED,
    PROT_READ,
    PROT_WRITE,
)

PAGE = 4096
LARGE = 2 << 20


class Fault(Exception):
    """A pointer of the payload leads nowhere, or where it may not read or write: EFAULT."""


class OutOfMemory(Exception):
    """The guest-physical space, or the host's memory, is used up: ENOMEM."""


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

    # Of struct kvm_userspace_memory_region.
    flags = 0

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


class Lent(Slot):
    """Pages of the host's that the guest may read, and that no area can be put in."""

    __slots__ = ()
    flags = 2  # KVM_MEM_READONLY

    def __init__(self, gpa: int, size: int, hva: int) -> None:
        self.gpa = gpa
        self.size = self.reserved = size
        self.hva = hva
        self.free = []

    def release(self) -> None:
        """They stay where they are."""
