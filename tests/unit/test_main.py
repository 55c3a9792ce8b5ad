"""What krun says when something goes wrong that nobody thought of."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from krun import __main__ as main
from krun import log
from krun.commands import state as verb


@pytest.fixture(autouse=True)
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(call: object) -> int:
        raise IndexError("nobody thought of it")

    monkeypatch.setattr(verb, "run", run)
    monkeypatch.setattr(log, "_path", None)
    monkeypatch.setattr(log, "_json", False)
    monkeypatch.setattr(log, "_level", log.LEVELS.index("warning"))


def test_a_defect_is_one_line(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main.main(["state", "x"]) == 1
    said = capfd.readouterr().err
    assert said.startswith("krun: IndexError: nobody thought of it (a defect of krun's")
    assert said.count("\n") == 1
    file = tmp_path / "log"
    assert main.main(["--log", str(file), "--log-format", "json", "state", "x"]) == 1
    assert "IndexError" in json.loads(file.read_text())["msg"]


def test_debug_shows_where() -> None:
    with pytest.raises(IndexError):
        main.main(["--debug", "state", "x"])


@pytest.mark.parametrize(
    "line", ["list", "--help", "--version", "run --help", "completion bash", "network --help"]
)
def test_output_that_cannot_be_written(line: str) -> None:
    command = [sys.executable, "-m", "krun", *line.split()]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert done.stderr.endswith("No space left on device\n")
