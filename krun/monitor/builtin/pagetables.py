"""The guest's page tables: four levels in slot 0, written as 64-bit words.

Intel SDM volume 3, 4.5 (4-level paging).
"""

from __future__ import annotations

import struct

from krun.monitor.builtin.areas import LARGE, PAGE, OutOfMemory
from krun.monitor.builtin.hostcall import PROT_EXEC, PROT_WRITE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from krun.monitor.builtin.areas import Slot

_P, _W, _U, _ACCESSED, _DIRTY, _PS, _NX = 1, 2, 4, 0x20, 0x40, 0x80, 1 << 63
_ADDRESS = 0x000FFFFFFFFFF000
_TABLE = _P | _W | _U | _ACCESSED


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
                first = (table >> 3) + (start >> 12 & 511)
                count = (stop - start) >> 12
                # No processor keeps in mind that there was nothing.
                changed = changed or any(words[first : first + count])
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


def kernel_bits(user: bool, executable: bool) -> int:
    """Entry bits of a page of the upper half: what ring 3 sees it can only read or run."""
    bits = _P | _ACCESSED | _DIRTY | (0 if executable else _NX)
    return bits | (_U if user else _W)


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
