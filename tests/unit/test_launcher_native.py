"""The launcher answers state and kill of a running native container as Python does, or asks it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from krun import store
from krun.install import launcher
from krun.linux import cgroupfs, proc
from krun.policy import Policy

SHELLS = [["dash"], ["bash"], ["busybox", "sh"]]
PYTHON = "#!/bin/sh\necho python\n"
NEWPID = store.CLONE_NEWPID


class Box:
    """A container with a real init process and files for its freezer."""

    def __init__(self, directory: Path) -> None:
        python = directory / "python"
        python.write_text(PYTHON)
        python.chmod(0o755)
        rules = Policy(crun="/bin/false")
        self.launcher = directory / "krun"
        self.launcher.write_text(
            launcher.text(str(self.launcher), [str(python)], rules, str(directory / "etc"))
        )
        self.init = subprocess.Popen(["sleep", "60"])
        found = proc.stat(self.init.pid)
        assert found is not None
        self.root = directory / "root"
        self.place = self.root / "box"
        self.place.mkdir(parents=True)
        self.freezer = self.place / "freezer.state"
        self.freezer.write_text("THAWED\n")
        self.state = store.State(
            "box",
            self.init.pid,
            found.start_time,
            "/bundle \\n%s",
            "/bundle/rootfs",
            "2026-01-01T00:00:00Z",
            {"a": "\\ %d \t é", "b": "x"},
            0,
            NEWPID,
            (cgroupfs.Directory("freezer", str(self.place), 1),),
            False,
        )
        self.save(self.state)

    def save(self, state: store.State) -> None:
        (self.place / store.LAUNCHER).unlink(missing_ok=True)
        store.save(str(self.place), state)
        store.save_for_launcher(str(self.place), state)

    def ask(self, shell: list[str], *words: str) -> str:
        argv = [*shell, str(self.launcher), "--root", str(self.root), *words]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=10)
        assert done.stderr == ""
        assert done.returncode == 0
        return done.stdout


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Box]:
    made = Box(tmp_path)
    yield made
    made.init.kill()
    made.init.wait()


@pytest.mark.parametrize("shell", SHELLS, ids=lambda words: words[0])
def test_state_is_what_python_prints(box: Box, shell: list[str]) -> None:
    assert box.ask(shell, "state", "box") == store.text(store.document(box.state, "running"))
    assert store.status(str(box.root), box.state) == "running"


@pytest.mark.parametrize("shell", SHELLS, ids=lambda words: words[0])
@pytest.mark.parametrize("words", [[], ["TERM"], ["SIGKILL"], ["15"], ["9"], ["1"]])
def test_kill_sends_the_signal(box: Box, shell: list[str], words: list[str]) -> None:
    assert box.ask(shell, "kill", "box", *words) == ""
    name = words[0].removeprefix("SIG") if words else "TERM"
    expected = int(name) if name.isdigit() else signal.Signals[f"SIG{name}"]
    assert box.init.wait(10) == -expected


def doubts(box: Box) -> None:
    """Python is asked, and the process lives."""
    for shell in SHELLS:
        for words in (["state", "box"], ["kill", "box", "KILL"]):
            assert box.ask(shell, *words) == "python\n", (shell, words)
    assert proc.alive(box.state.pid, box.state.start_time)


@pytest.mark.parametrize("text", ["FROZEN\n", "FREEZING\n", "1\n", "", "nonsense\n"])
def test_frozen_is_pythons(box: Box, text: str) -> None:
    box.freezer.write_text(text)
    doubts(box)


def test_missing_freezer_is_pythons(box: Box) -> None:
    box.freezer.unlink()
    doubts(box)


@pytest.mark.parametrize("fifo", ["exec.fifo", "creating.fifo"])
def test_created_is_pythons(box: Box, fifo: str) -> None:
    os.mkfifo(box.place / fifo)
    doubts(box)


def test_another_process_of_that_number_is_pythons(box: Box) -> None:
    box.save(box.state._replace(start_time=box.state.start_time + 1))
    for shell in SHELLS:
        assert box.ask(shell, "kill", "box", "KILL") == "python\n"
    assert box.init.poll() is None


def test_shared_pid_namespace_is_pythons(box: Box) -> None:
    box.save(box.state._replace(namespaces=0))
    doubts(box)


def test_long_annotations_are_pythons(box: Box) -> None:
    box.save(box.state._replace(annotations={"a": "x" * 5000}))
    doubts(box)


@pytest.mark.parametrize("shell", SHELLS, ids=lambda words: words[0])
def test_dead_init_is_pythons(box: Box, shell: list[str]) -> None:
    box.init.kill()
    # A zombie first, then nothing.
    os.waitid(os.P_PID, box.init.pid, os.WEXITED | os.WNOWAIT)
    assert box.ask(shell, "state", "box") == "python\n"
    box.init.wait()
    assert box.ask(shell, "kill", "box", "9") == "python\n"


@pytest.mark.parametrize(
    "words",
    [
        ["kill", "--all", "box", "TERM"],
        ["kill", "box", "RTMIN+3"],
        ["kill", "box", "0"],
        ["kill", "box", "32"],
        ["kill", "box", "nonsense"],
        ["kill", "box", "term"],
        ["state", "--all", "box"],
        ["--debug", "state", "box"],
        ["--debug", "kill", "box"],
    ],
    ids=" ".join,
)
def test_unusual_lines_are_pythons(box: Box, words: list[str]) -> None:
    for shell in SHELLS:
        index = next(n for n, word in enumerate(words) if word in ("kill", "state"))
        assert box.ask([*shell], *words[:index], *words[index:]) == "python\n"
    assert box.init.poll() is None


@pytest.mark.parametrize("text", ["", "x\n", "1 2\n", "a b c\n", "-1 0 -\n"])
def test_damaged_file_is_pythons(box: Box, text: str) -> None:
    (box.place / store.LAUNCHER).write_text(text)
    doubts(box)


def test_strange_command_name_is_read_past(box: Box, tmp_path: Path) -> None:
    program = tmp_path / "a) S 1 1 (b"
    shutil.copy(shutil.which("sleep") or "", program)
    with subprocess.Popen([str(program), "60"]) as other:
        found = proc.stat(other.pid)
        assert found is not None
        box.save(box.state._replace(pid=other.pid, start_time=found.start_time))
        try:
            for shell in SHELLS:
                assert '"running"' in box.ask(shell, "state", "box")
        finally:
            other.kill()


def test_a_log_that_cannot_be_opened_is_pythons(box: Box, tmp_path: Path) -> None:
    for shell in SHELLS:
        for log in (f"{tmp_path}/none/log", f"file:{tmp_path}/log"):
            assert box.ask(shell, "--log", log, "state", "box") == "python\n"
        log = f"{tmp_path}/a log"
        said = store.text(store.document(box.state, "running"))
        assert box.ask(shell, "--log", log, "state", "box") == said
        assert Path(log).read_text() == ""
