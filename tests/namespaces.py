"""Namespaces of the tests' own, and commands that run in them."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

# The name in /proc/PID/ns of what an option of unshare(1) and nsenter(1) makes and enters.
NAMES = {"--mount": "mnt", "--net": "net"}


class Namespaces:
    """They go when this process goes.

    The shell script sets them up, says "ready" and waits for the end of its input (exec cat).
    """

    def __init__(self, options: Sequence[str], script: str, *arguments: str) -> None:
        self.options = options
        self.holder = subprocess.Popen(
            ["unshare", *options, "--propagation", "private", "sh", "-c", script, "sh", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert self.holder.stdout is not None
        said = self.holder.stdout.readline()
        if said != "ready\n":
            raise RuntimeError(f"no namespaces: {said}{self.holder.stdout.read()}")

    def close(self) -> None:
        """End the namespaces."""
        assert self.holder.stdin is not None
        self.holder.stdin.close()
        self.holder.wait(10)

    def inside(self, *argv: object) -> list[str]:
        """The command line that runs argv in the namespaces."""
        files = [f"{one}=/proc/{self.holder.pid}/ns/{NAMES[one]}" for one in self.options]
        return ["nsenter", *files, "--", *map(str, argv)]
