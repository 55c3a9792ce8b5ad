"""The built-in monitor's table of system calls, and the seccomp filter made from it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from krun.monitor.builtin import confine, cpu, run, syscalls, table
from krun.monitor.builtin.statistics import lines

HEADER = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")

table.load()


def test_names_have_their_numbers() -> None:
    if not HEADER.exists():
        pytest.skip(f"{HEADER} is not there (Debian: linux-libc-dev)")
    real = {
        int(number): name
        for name, number in re.findall(r"#define __NR_(\w+) (\d+)", HEADER.read_text())
    }
    known = table.NAMES.keys() & real.keys()
    assert {number: table.NAMES[number] for number in known} == {n: real[n] for n in known}
    assert len(known) > 230
    assert len(table.NAMES) == len(set(table.NAMES.values()))


@pytest.mark.parametrize("number", sorted(table.NAMES))
def test_every_call_has_its_handler(number: int) -> None:
    kinds = table.KINDS[number]
    if kinds and kinds[0].startswith("@"):
        assert kinds[0][1:] in run.LATER, "it is imported before there are no files left"
        assert callable(syscalls.special(table.NAMES[number], kinds[0][1:]))
    else:
        assert len(kinds) <= 6
        for kind in kinds:
            convert, extra = syscalls.converter(kind)
            assert callable(convert)
            if kind[0] in "io":
                assert extra < len(kinds)
                assert kinds[extra] in "uv", "a length is a value"
    assert callable(syscalls.Handlers()[number])


@pytest.mark.parametrize(
    "name",
    [
        "ptrace",
        "process_vm_readv",
        "process_vm_writev",
        "pidfd_getfd",
        "io_uring_setup",
        "bpf",
        "mount",
        "unshare",
        "setns",
        "init_module",
        "userfaultfd",
        "perf_event_open",
        "seccomp",
    ],
)
def test_what_could_reach_the_monitor_is_not_there(name: str) -> None:
    assert name not in table.NAMES.values()


def test_filter_allows_exactly_the_table() -> None:
    allowed = set(confine.numbers())
    program = confine.program(sorted(allowed))
    assert len(program) < 4096
    for number in range(600):
        expected = confine.RET_ALLOW if number in allowed else confine.RET_ENOSYS
        assert confine.decide(program, number) == expected, number
    for number in (0x40000000, 0x40000001, 0xFFFFFFFF):
        assert confine.decide(program, number) == confine.RET_ENOSYS
    for _, true, false, _ in program:
        assert true < 256
        assert false < 256
    assert set(table.NAMES) <= allowed
    assert {101, 165, 272, 308, 321} & allowed == set(), "ptrace mount unshare setns bpf"


def test_seccomp_names_are_sorted_and_whole() -> None:
    names = table.seccomp_names()
    assert names == sorted(set(names))
    assert {"read", "ioctl", "process_vm_readv", "exit_group"} <= set(names)


def test_structures_have_the_kernels_sizes() -> None:
    assert len(cpu.CODE3) == len(cpu.DATA0) == 24
    assert len(cpu.task_page(cpu.TASKS)) == 4096
    assert len(cpu.interrupt_table(0xFFFFFF8000002000)) == 512
    assert len(cpu.stubs()) <= 4096
    assert len(cpu.port_bitmap()) == 8192
    allowed = {port for port in range(65536) if not _bit(port)}
    assert allowed == {*range(4), *range(0x8000, 0x8000 + 516)}


def _bit(port: int) -> bool:
    bitmap = cpu.port_bitmap()
    return port // 8 >= len(bitmap) or bool(bitmap[port // 8] >> port % 8 & 1)


def test_statistics_table() -> None:
    shown = lines({1: [2, 1, 0.004], 999: [1, 1, 0.001]}, {"exits": 3}, {999: 1})
    assert shown[1].split() == ["write", "2", "1", "4.000", "2000.0"]
    assert "#999 (ENOSYS)" in shown[2]
    assert shown[-1] == "exits: 3"
