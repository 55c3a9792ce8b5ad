"""Signals noted for a payload, and not by the child that becomes it."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import _signal, os, sys
sys.path.insert(0, sys.argv[1])
from krun import wait
before = [_signal.getsignal(n) for n in range(1, 32)]
reader = wait.listen()
os.kill(os.getpid(), _signal.SIGTERM)
assert os.read(reader, 9) == bytes([_signal.SIGTERM])
wait.unlisten()
assert _signal.set_wakeup_fd(-1) == -1
after = [_signal.getsignal(n) for n in range(1, 32)]
changed = {n for n in range(1, 32) if after[n - 1] != before[n - 1]}
# What Python handles or ignores by itself; whoever listens has taken them over.
assert changed <= {_signal.SIGINT, _signal.SIGXFSZ}, changed
assert {after[n - 1] for n in changed} <= {_signal.SIG_DFL}
os.kill(os.getpid(), _signal.SIGTERM)
"""


def test_a_child_that_does_not_listen_dies_of_a_signal() -> None:
    words = [sys.executable, "-c", PROGRAM, sys.path[0] or "."]
    done = subprocess.run(words, capture_output=True, text=True, cwd=".")
    assert done.stderr == ""
    assert done.returncode == -15
