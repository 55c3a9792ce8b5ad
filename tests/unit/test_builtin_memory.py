"""The built-in monitor's memory: areas, slots and page tables agree, whatever a payload maps."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from krun.monitor.builtin import space
from krun.monitor.builtin.areas import LARGE, PAGE, Fault
from krun.monitor.builtin.memory import KERNEL, Memory
from krun.monitor.builtin.pagetables import page_bits
from krun.monitor.builtin.space import MMAP_TOP

PRIVATE, SHARED, FIXED, ANONYMOUS = 2, 1, 0x10, 0x20
ADDRESS = 0x000FFFFFFFFFF000


def make(limit: int = 1 << 30) -> Memory:
    slots: list[tuple[int, int, int, int]] = []
    return Memory(limit, lambda *slot: slots.append(slot), lambda: None)


@pytest.fixture
def memory() -> Iterator[Memory]:
    found = make()
    yield found
    found.release()


def check(memory: Memory) -> None:
    """Areas are sorted and apart, and the page tables say of each page what its area says."""
    end = 0
    ranges: list[tuple[int, int]] = []
    for start, area in zip(memory.starts, memory.areas, strict=True):
        assert start == area.start >= end
        assert area.end > area.start
        end = area.end
        if area.slot is None:
            assert not area.prot
            continue
        ranges.append((area.gpa, area.gpa + area.end - area.start))
        for address in {area.start, area.end - PAGE}:
            entry = memory.tables.lookup(address)
            if not area.prot:
                assert not entry & 1
                continue
            assert entry & 7 == page_bits(area.prot) & 7
            assert bool(entry >> 63) == (not area.prot & 4)
            inside = address & (LARGE - 1) if entry & 0x80 else 0
            assert (entry & ADDRESS & ~(LARGE - 1 if entry & 0x80 else 0)) + inside == (
                area.gpa + address - area.start
            )
    ranges.sort()
    for before, after in itertools.pairwise(ranges):
        assert before[1] <= after[0], "two areas share memory"
    for slot in memory.slots[1:]:
        used = sum(area.end - area.start for area in memory.areas if area.slot is slot)
        assert used + sum(size for _, size in slot.free) == slot.size, "memory is lost"


def test_read_and_write(memory: Memory) -> None:
    address = memory.map(0, 3 * PAGE, 3, PRIVATE | ANONYMOUS)
    memory.write(address + PAGE - 2, b"hello\0")
    assert memory.read(address + PAGE - 2, 5) == b"hello"
    assert memory.string(address + PAGE - 2) == b"hello"
    assert memory.read(address + 2 * PAGE, 8) == bytes(8)
    check(memory)


@pytest.mark.parametrize(
    "address", [0, 8, KERNEL, KERNEL + 0x2000, 1 << 64, MMAP_TOP, -1 % (1 << 64)]
)
def test_no_pointer_leads_out(memory: Memory, address: int) -> None:
    memory.map(0, PAGE, 3, PRIVATE | ANONYMOUS)
    for attempt in (
        lambda: memory.read(address, 1),
        lambda: memory.write(address, b"x"),
        lambda: memory.host(address, 8, 1),
        lambda: memory.string(address),
        lambda: memory.pieces(address, 1, 2),
    ):
        with pytest.raises(Fault):
            attempt()


def test_protection_holds_for_the_monitor_too(memory: Memory) -> None:
    address = memory.map(0, 4 * PAGE, 3, PRIVATE | ANONYMOUS)
    assert memory.protect(address + PAGE, PAGE, 1) == 0
    assert memory.protect(address + 2 * PAGE, PAGE, 0) == 0
    assert memory.read(address + PAGE, 4) == bytes(4)
    for attempt in (
        lambda: memory.write(address + PAGE - 1, b"xy"),
        lambda: memory.host(address, 2 * PAGE, 2),
        lambda: memory.read(address + 2 * PAGE - 1, 2),
    ):
        with pytest.raises(Fault):
            attempt()
    assert memory.read(address + PAGE - 1, 1) == b"\0", "nothing of it was written"
    check(memory)


def test_large_pages_split_and_join(memory: Memory) -> None:
    address = memory.map(0, 4 * LARGE, 3, PRIVATE | ANONYMOUS)
    assert address % LARGE == 0
    assert memory.tables.lookup(address) & 0x80
    memory.protect(address + PAGE, PAGE, 0)
    assert not memory.tables.lookup(address) & 0x80
    assert memory.tables.lookup(address + LARGE) & 0x80
    check(memory)
    memory.protect(address + PAGE, PAGE, 3)
    assert len([area for area in memory.areas if area.start >= address]) == 1
    check(memory)


def test_reservations_cost_nothing(memory: Memory) -> None:
    assert memory.map(0, 1 << 40, 0, PRIVATE | ANONYMOUS) > 0
    assert len(memory.slots) == 1
    assert memory.map(0, 2 << 30, 3, PRIVATE | ANONYMOUS) == -12, "over the limit"
    check(memory)


def test_files(memory: Memory) -> None:
    fd = os.memfd_create("file")
    os.write(fd, b"a" * PAGE)
    shared = memory.map(0, PAGE, 3, SHARED, fd)
    private = memory.map(0, PAGE, 3, PRIVATE, fd)
    memory.write(shared, b"new")
    assert os.pread(fd, 3, 0) == b"new"
    memory.write(private, b"own")
    assert os.pread(fd, 3, 0) == b"new"
    os.ftruncate(fd, 0)
    with pytest.raises(Fault):
        memory.read(shared, 1)
    with pytest.raises(Fault):
        memory.write(shared, b"x")
    memory.unmap(shared, PAGE)
    again = memory.map(shared, PAGE, 3, PRIVATE | ANONYMOUS)
    assert memory.read(again, 4) == bytes(4)
    os.close(fd)
    check(memory)


def test_copies_without_process_vm_calls(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    fd = os.memfd_create("file")
    os.write(fd, b"a" * PAGE)
    address = memory.map(0, PAGE, 3, PRIVATE, fd)
    # The numbers of calls that do not exist: ENOSYS, as a seccomp profile would say.
    monkeypatch.setattr(space, "SYS_process_vm_readv", 998)
    monkeypatch.setattr(space, "SYS_process_vm_writev", 999)
    memory.write(address + 5, b"hello")
    assert memory.read(address + 4, 7) == b"ahelloa"
    os.ftruncate(fd, 0)
    os.close(fd)
    other = os.memfd_create("short")
    empty = memory.map(0, PAGE, 3, SHARED, other)
    os.close(other)
    with pytest.raises(Fault):
        memory.read(empty, 1)
    with pytest.raises(Fault):
        memory.write(empty, b"x")


def test_brk(memory: Memory) -> None:
    memory.brk_start = memory.brk_end = 0x10000000
    assert memory.brk(0) == 0x10000000
    assert memory.brk(0x10000000 + 5000) == 0x10000000 + 5000
    memory.write(0x10000000 + 4090, b"across pages")
    assert memory.brk(0x10000000 + (64 << 20)) == 0x10000000 + (64 << 20)
    assert memory.read(0x10000000 + 4090, 12) == b"across pages"
    assert memory.brk(0x10000000) == 0x10000000
    assert not memory.areas
    check(memory)


def test_freed_memory_comes_back_empty(memory: Memory) -> None:
    for _ in range(200):
        address = memory.map(0, 1 << 20, 3, PRIVATE | ANONYMOUS)
        assert memory.read(address, 8) == bytes(8)
        memory.write(address, b"secret!!")
        memory.unmap(address, 1 << 20)
    assert len(memory.slots) == 2
    assert memory.tables.used < 1 << 20
    check(memory)


pages = st.integers(0, 40)
steps = st.lists(
    st.tuples(
        st.sampled_from(("map", "fixed", "unmap", "protect", "remap", "advise")),
        pages,
        st.integers(1, 1100),
        st.sampled_from((0, 1, 3, 5, 7)),
    ),
    max_size=25,
)


@settings(max_examples=60, deadline=None)
@given(steps)
def test_any_sequence_keeps_it_consistent(sequence: list[tuple[str, int, int, int]]) -> None:
    memory = make()
    base = 0x200000000
    try:
        for word, page, count, prot in sequence:
            address, size = base + page * 50 * PAGE, count * PAGE
            if word == "map":
                memory.map(0, size, prot, PRIVATE | ANONYMOUS)
            elif word == "fixed":
                assert memory.map(address, size, prot, PRIVATE | ANONYMOUS | FIXED) == address
            elif word == "unmap":
                memory.unmap(address, size)
                assert memory.find(address) is None
            elif word == "protect":
                memory.protect(address, size, prot)
            elif word == "remap":
                memory.remap(address, PAGE, size, 1, 0)
            else:
                memory.advise(address, size, 4)
        check(memory)
    finally:
        memory.release()
