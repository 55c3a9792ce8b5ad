"""The directory of one pull: what killed processes have left goes with the next one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from krun.images.stores import scratch

ROOT = Path(__file__).resolve().parents[2]
HOLD = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from krun.images.stores import scratch
with scratch.directory("krun-hosts-") as path:
    open(path + "/secret", "w").close()
    print(path, flush=True)
    sys.stdin.read()
"""


def aged(path: Path) -> None:
    """Make a directory older than one that may be about to be locked."""
    os.utime(path, (0, 0))


def test_directories_of_killed_pulls_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    held = []
    for _ in range(2):
        words = [sys.executable, "-c", HOLD]
        process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        held.append((process, Path(process.stdout.readline().strip())))
    (killed, left), (living, used) = held
    killed.kill()
    killed.wait()
    others = [tmp_path / "krun-other", tmp_path / "krun-hosts-file"]
    others[0].mkdir()
    others[1].touch()
    (tmp_path / "krun-hosts-link").symlink_to(others[0])
    young = tmp_path / "krun-hosts-young"
    young.mkdir()
    for path in (left, used, others[0]):
        aged(path)
    with scratch.directory("krun-hosts-") as path:
        assert not left.exists()
        assert (used / "secret").exists()
        assert Path(path).stat().st_mode & 0o777 == 0o700
        assert all(other.exists() for other in (*others, young))
    assert not Path(path).exists()
    assert living.communicate("", 10)[0] == ""
    assert not used.exists()
