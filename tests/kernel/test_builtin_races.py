"""Threads of a payload in the built-in monitor that do things at once: as on Linux, every time."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest
from kernel.builtin_host import MONITOR, NEEDS_KVM, both
from km import build

pytestmark = NEEDS_KVM


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("races") / "races"
    return build.compile_static(build.TESTS / "payloads" / "races.c", target, *build.FREESTANDING)


@pytest.mark.parametrize(
    "words",
    [
        # Sixty threads are made while one executes, twenty times.
        ("executing", 20 * "."),
        ("many", 600),
        ("crowd", 600),
        ("handler",),
        ("vforks",),
        ("left behind",),
        ("replaced", 300),
        ("switched", 1000),
        ("unwanted",),
        ("masked",),
        ("by descriptor", 50),
        ("forgotten",),
        ("limits",),
        ("chance",),
        ("leader",),
    ],
    ids=lambda words: words[0],
)
def test_case_is_as_without_a_monitor(program: Path, words: tuple[object, ...]) -> None:
    both(program, *words)


def test_a_child_has_no_processor_of_its_parents(program: Path) -> None:
    with subprocess.Popen(
        [*MONITOR, str(program), "beside", "20"], stdout=subprocess.PIPE, process_group=0
    ) as parent:
        try:
            assert parent.stdout is not None
            for _ in range(20):
                assert parent.stdout.readline() == b"made\n"
            children = [
                child
                for path in Path(f"/proc/{parent.pid}/task").glob("*/children")
                for child in path.read_text().split()
            ]
            assert len(children) == 20
            for child in children:
                held = [os.readlink(fd) for fd in Path(f"/proc/{child}/fd").iterdir()]
                assert len([name for name in held if "kvm-vcpu" in name]) == 1, held
        finally:
            os.killpg(parent.pid, signal.SIGKILL)


# What shows now and then where the monitor is wrong.
@pytest.mark.parametrize("case", ["fresh", "readers", "writers", "acceptors"])
def test_case_is_so_each_time(program: Path, case: str) -> None:
    for _ in range(10):
        both(program, case)
