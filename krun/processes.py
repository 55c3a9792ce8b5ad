"""The processes of a crun container, with the columns of ps(1)."""

from __future__ import annotations

import subprocess
import sys

from krun import many

TYPE_CHECKING = False
if TYPE_CHECKING:
    from krun.grammar import Call


def columns(call: Call, root: str, container: str, options: list[str]) -> int:
    """Print the lines of ps(1) that are the container's; raises KrunError."""
    from krun.errors import KrunError

    listed = many.crun_output(call, ["--root", root, "ps", container]).split()[1:]
    done = subprocess.run(["ps", *(options or ["-ef"])], capture_output=True, text=True)
    if done.returncode:
        raise KrunError(f"ps: {done.stderr.strip()}")
    lines = done.stdout.splitlines()
    header = lines[0].split()
    if "PID" not in header:
        raise KrunError("ps: the columns chosen lack PID", "add pid to them")
    at = header.index("PID")
    for line in lines[:1] + [row for row in lines[1:] if row.split()[at] in listed]:
        sys.stdout.write(line + "\n")
    return 0
