"""Put the hook programs where podman and CRI-O find them, with the few modules they import.

The copy is at a path that upgrades of krun do not move: a hooks.d file whose program is gone
would keep every container of the machine from starting.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

from krun.errors import KrunError
from krun.images.files import write_atomically

_PACKAGE = Path(__file__).resolve().parent.parent
_PROGRAMS = ("krun-image-check", "krun-image-record", "krun-image-prefetch")
_MODULES = (
    "__init__.py",
    "errors.py",
    "jsontext.py",
    "record.py",
    "images/__init__.py",
    "images/index.py",
    "images/ledger.py",
    "images/references.py",
    "images/hooks/__init__.py",
    "images/hooks/check.py",
    "images/hooks/container.py",
    "images/hooks/prefetch.py",
    "images/hooks/program.py",
    "images/hooks/record.py",
)
PYTHON = "/usr/bin/python3"


def _copy(source: Path, target: Path, mode: int) -> None:
    target.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    try:
        data = source.read_bytes()
    except FileNotFoundError:
        raise KrunError(f"{source}: not in this installation of krun") from None
    write_atomically(str(target), data, mode)


def install(prefix: str, hooks_directory: str, options: list[str]) -> list[str]:
    """Write programs, modules and hooks.d files; return the hooks.d files.

    The programs come first, so that no hooks.d file ever names one that is not there.
    """
    home = Path(prefix) / "lib" / "krun-hooks"
    for module in _MODULES:
        _copy(_PACKAGE / module, home / "krun" / module, 0o644)
    programs = _PACKAGE / "images" / "programs"
    for program in _PROGRAMS:
        _copy(programs / program, home / "hooks" / program, 0o755)
    # What is compiled now costs no start a compilation.
    compiled = subprocess.run(
        [PYTHON, "-m", "compileall", "-q", str(home / "krun")], capture_output=True, text=True
    )
    if compiled.returncode:
        raise KrunError(f"{PYTHON} -m compileall: {compiled.stdout.strip()}")
    os.makedirs(hooks_directory, mode=0o755, exist_ok=True)
    written = []
    for file in sorted((programs / "hooks.d").glob("*.json")):
        document = json.loads(file.read_text())
        name = document["hook"]["path"].rpartition("/")[2]
        document["hook"]["path"] = str(home / "hooks" / name)
        document["hook"]["args"] = [name, *options]
        target = f"{hooks_directory}/{file.name}"
        write_atomically(target, (json.dumps(document, indent=2) + "\n").encode(), 0o644)
        written.append(target)
    return written


def remove(prefix: str, hooks_directory: str) -> list[str]:
    """Undo install: the hooks.d files first; return what was removed."""
    removed = []
    for file in sorted((_PACKAGE / "images" / "programs" / "hooks.d").glob("*.json")):
        target = f"{hooks_directory}/{file.name}"
        try:
            os.unlink(target)
        except FileNotFoundError:
            continue
        removed.append(target)
    shutil.rmtree(Path(prefix) / "lib" / "krun-hooks", ignore_errors=True)
    return removed
