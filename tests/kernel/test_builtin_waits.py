"""The built-in monitor's waits, half-good buffers, owned futexes and System V IPC, as on Linux."""

from __future__ import annotations

from pathlib import Path

import pytest
from kernel.builtin_host import MONITOR, NEEDS_KVM, both, run
from km import build

pytestmark = NEEDS_KVM


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("waits") / "waits"
    return build.compile_static(build.TESTS / "payloads" / "waits.c", target, *build.FREESTANDING)


@pytest.mark.parametrize("case", ["partial", "priority", "ipc", "inner"])
def test_case_is_as_without_a_monitor(program: Path, case: str) -> None:
    assert len(both(program, case).splitlines()) > 10


def test_no_address_comes_from_a_payload(program: Path) -> None:
    lines = run(*MONITOR, program, "refused").stdout.splitlines()
    assert {line.split()[1] for line in lines[:-1]} == {"-92", "-95"}
    assert lines[-1] == "RDS_CMSG_RDMA_ARGS -22"


def test_a_signal_ends_calls_that_wait_in_the_kernel(program: Path, tmp_path: Path) -> None:
    said = []
    for index, words in enumerate(((), MONITOR)):
        directory = tmp_path / str(index)
        directory.mkdir()
        done = run(*words, program, "interrupted", directory, timeout=30)
        assert (done.returncode, done.stderr) == (0, "")
        said.append(done.stdout)
    assert said[0] == said[1]
    assert "full -4\nfull, restarted 0\n" in said[1]
