"""The log file: made at once, and a verb fails where it cannot be opened, as with runc and crun."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


def krun(*argv: object) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "krun", *map(str, argv)]
    return subprocess.run(words, capture_output=True, text=True, timeout=30)


@pytest.mark.parametrize("prefix", ["", "file:"])
def test_unopenable(tmp_path: Path, prefix: str) -> None:
    path = f"{tmp_path}/none/log"
    done = krun(f"--log={prefix}{path}", "--root", tmp_path, "list")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"krun: open log file {path}: No such file or directory\n"
    done = krun("--log", path, "--log-format", "json", "--root", tmp_path, "list")
    assert json.loads(done.stderr)["msg"] == f"open log file {path}: No such file or directory"


@pytest.mark.parametrize("prefix", ["", "file:"])
def test_made_at_once(tmp_path: Path, prefix: str) -> None:
    assert krun("--log", f"{prefix}{tmp_path}/log", "--root", tmp_path, "list").returncode == 0
    assert (tmp_path / "log").read_text() == ""


def test_beside_a_log_file_standard_error_is_plain(tmp_path: Path) -> None:
    path = tmp_path / "log"
    for words, status in ((["state", "none"], 1), (["state"], 2)):
        path.unlink(missing_ok=True)
        done = krun("--root", tmp_path, "--log", path, "--log-format", "json", *words)
        [line] = path.read_text().splitlines()
        message = json.loads(line)["msg"]
        assert (done.returncode, done.stderr) == (status, f"krun: {message}\n")
        alone = krun("--root", tmp_path, "--log-format", "json", *words)
        assert json.loads(alone.stderr)["msg"] == message


def test_a_mistake_in_the_line_comes_first(tmp_path: Path) -> None:
    done = krun("--log", tmp_path / "none/log", "list", "--wrong")
    assert done.returncode == 2
    assert "--wrong" in done.stderr
    assert "log file" not in done.stderr
