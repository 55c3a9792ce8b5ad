"""Running a payload twice: natively, and in the built-in monitor."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import needs
import pytest

ROOT = Path(__file__).resolve().parents[2]
MAIN = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from krun.__main__ import main; "
MAIN += "sys.exit(main(sys.argv[1:]))"
MONITOR = (sys.executable, "-I", "-S", "-c", MAIN, "monitor")

NEEDS_KVM = pytest.mark.skipif(not needs.KVM, reason=needs.NO_KVM)


def run(*argv: object, **keywords: Any) -> subprocess.CompletedProcess[str]:
    keywords.setdefault("timeout", 60)
    keywords.setdefault("stdin", subprocess.DEVNULL)
    return subprocess.run([str(word) for word in argv], capture_output=True, text=True, **keywords)


def both(program: Path, *words: object, options: tuple[str, ...] = ()) -> str:
    """Run a case natively and in the monitor, expect the same, return what it said."""
    here = run(program, *words, env={"A": "b", "C": "d e"})
    there = run(*MONITOR, *options, program, *words, env={"A": "b", "C": "d e"})
    assert there.stdout == here.stdout
    assert (there.returncode, there.stderr) == (here.returncode, here.stderr)
    return there.stdout
