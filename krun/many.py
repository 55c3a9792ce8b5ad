"""Verbs on several containers at once: --regex, and the listing of a state directory."""

from __future__ import annotations

import os
import re
import subprocess
import sys

from krun import engine
from krun.errors import KrunError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from krun.grammar import Call


def containers(root: str) -> list[str]:
    """Return the ids of a state directory, sorted; none where there is no directory."""
    try:
        with os.scandir(root) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
    except FileNotFoundError:
        return []


def each(call: Call) -> int:
    """Run a verb on every container whose id matches the expression in arguments[0].

    Each runs in a process of its own, so that one that fails leaves the others; the status is
    that of the first failure.
    """
    try:
        pattern = re.compile(call.arguments[0])
    except re.error as error:
        raise KrunError(f"--regex {call.arguments[0]!r}: {error}") from error
    root = engine.root_of(call)
    status = 0
    for container in containers(root):
        if not pattern.search(container):
            continue
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                one = call._replace(
                    options={**call.options, "regex": False},
                    arguments=[container, *call.arguments[1:]],
                )
                from krun.__main__ import guarded

                code = guarded(one)
            finally:
                os._exit(code)
        _, end = os.waitpid(pid, 0)
        status = status or os.waitstatus_to_exitcode(end)
    return status


def crun_output(call: Call, words: list[str]) -> str:
    """Return what crun prints; raises KrunError with its own words when it fails."""
    done = subprocess.run([engine.crun_path(call), *words], capture_output=True, text=True)
    if done.returncode:
        raise KrunError(done.stderr.strip() or f"crun {words[0]}: status {done.returncode}")
    return done.stdout
