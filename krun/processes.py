"""The processes of a container, with the columns of ps(1)."""

from __future__ import annotations

import subprocess
import sys

from krun.errors import KrunError


def columns(pids: set[str], options: list[str]) -> int:
    """Print the lines of ps(1) that are of these processes; raises KrunError."""
    done = subprocess.run(["ps", *(options or ["-ef"])], capture_output=True, text=True)
    if done.returncode:
        raise KrunError(f"ps: {done.stderr.strip()}")
    lines = done.stdout.splitlines()
    header = lines[0].split()
    if "PID" not in header:
        raise KrunError("ps: the columns chosen lack PID", "add pid to them")
    at = header.index("PID")
    for line in lines[:1] + [row for row in lines[1:] if row.split()[at] in pids]:
        sys.stdout.write(line + "\n")
    return 0
