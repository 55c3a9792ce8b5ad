"""krun as it is on a user's machine: installed once for a run of the tests."""

from __future__ import annotations

import atexit
import functools
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent


def install(prefix: Path, *options: str) -> str:
    """Install this checkout below a prefix; returns what krun install prints."""
    command = [sys.executable, "-m", "krun", "install", "--prefix", str(prefix), *options]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


def prefix() -> Path:
    """The prefix of this run's copy, which every user may enter; it goes when the tests end."""
    return _copy()[0]


def why_cold() -> str:
    """What krun install says of the warm start that it could not make; "" where it made one."""
    return "" if starts_warm() else _copy()[1].partition("krun starts cold")[2].strip()


@functools.cache
def _copy() -> tuple[Path, str]:
    directory = Path(tempfile.mkdtemp(prefix="krun-installed-", dir="/tmp"))
    directory.chmod(0o755)
    owner = os.getpid()

    def remove() -> None:
        if os.getpid() == owner:
            shutil.rmtree(directory, ignore_errors=True)

    atexit.register(remove)
    return directory, install(directory)


def launcher() -> Path:
    """The launcher, as podman calls it."""
    return prefix() / "bin/krun"


def starts_warm() -> bool:
    """Whether krun install could make a warm start here."""
    return bool(list(prefix().glob("lib/krun/*/warm/krun")))


def words(start: str) -> list[str]:
    """What the launcher executes, up to krun's own arguments: `start` is warm or cold.

    Where there is no warm start it is cold, as for the launcher.
    """
    lines = launcher().read_text().splitlines()
    python = shlex.split(next(line for line in lines if line.startswith("set -- /")))[2:-1]
    if start == "cold" or not starts_warm():
        return python
    return [str(next(prefix().glob("lib/krun/*/warm/krun"))), *python]
