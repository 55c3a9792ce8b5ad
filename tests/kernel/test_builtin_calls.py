"""Every system call of the built-in monitor's table, compared with the same program run natively.

tests/payloads/calls.c makes each with good arguments, and then with one argument after the other
replaced by values that are no good.  A call that is not in it fails the first test.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from kernel.builtin_host import MONITOR, NEEDS_KVM
from km import build

from krun.monitor.builtin import table

pytestmark = NEEDS_KVM

NOT_COMPARED = {334: "rseq(2) is ENOSYS by design: C libraries do without"}
# They wait for a signal, or go on with nothing; Linux refuses a copy from one file system to
# another and a symbolic link's mode.
ONLY_FAIL = {"pause", "rt_sigsuspend", "restart_syscall", "copy_file_range", "fchmodat2"}

# A bad argument may mean every process of the machine, the whole disk, or a file of the host's: so
# namespaces of its own, a root file system that is read only but for one directory, a bound on
# files, and no capability to do more.
SAFELY = """
set -e
mount --bind "$0" "$0"
mount -o remount,bind,ro /
ulimit -f 2048
cd "$0"
set +e
setpriv --bounding-set -sys_admin,-sys_boot,-sys_time,-sys_module,-mac_admin -- "$@"
echo status $?
"""
ISOLATED = ("unshare", "--pid", "--ipc", "--uts", "--fork", "--kill-child", "--mount-proc")
ISOLATED += ("sh", "-c", SAFELY)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("calls") / "calls"
    return build.compile_static(build.TESTS / "payloads" / "calls.c", target, *build.FREESTANDING)


def said(words: tuple[str, ...], program: Path, mode: str, directory: Path) -> list[str]:
    directory.mkdir()
    # Not /dev/null: descriptor 0 is changed, too (fchown, fchmod, futimens).
    with directory.with_suffix(".input").open("w+b") as empty:
        done = subprocess.run(
            [*ISOLATED, directory.parent, *words, program, mode, directory, program],
            stdin=empty,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=100,
        )
    return done.stdout.decode("utf-8", "replace").splitlines()


def results(lines: list[str]) -> dict[int, list[str]]:
    """What each call said with good arguments."""
    found: dict[int, list[str]] = {}
    for line in lines:
        words = line.split()
        if len(words) > 1 and words[0].isdigit() and not line.startswith(" "):
            found.setdefault(int(words[0]), []).append(words[1])
    return found


def test_good_arguments(program: Path, tmp_path: Path) -> None:
    here = said((), program, "good", tmp_path / "native")
    assert said(MONITOR, program, "good", tmp_path / "monitor") == here
    assert here[-1] == "status 7"
    table.load()
    found = results(here)
    assert set(table.NAMES) - set(found) == set(NOT_COMPARED), "without a comparison"
    failing = {
        table.NAMES[number]
        for number, each in found.items()
        if number in table.NAMES and all(result.startswith("-") for result in each)
    }
    assert failing <= ONLY_FAIL


@pytest.mark.parametrize("seed", ["11"])
def test_random_arguments_leave_the_monitor_whole(program: Path, tmp_path: Path, seed: str) -> None:
    lines = said(MONITOR, program, seed, tmp_path / "monitor")
    assert lines[-1] == "status 7"
    assert not [line for line in lines if "krun" in line or "Error" in line]


def test_bad_arguments(program: Path, tmp_path: Path) -> None:
    here = said((), program, "bad", tmp_path / "native")
    assert said(MONITOR, program, "bad", tmp_path / "monitor") == here
    assert here[-1] == "status 7"
    varied = {int(line.split()[1]) for line in here if line.startswith(" bad ")}
    assert len(varied) > 190
