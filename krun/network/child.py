"""Run the engine's binary as a child, so that the network can be released when it ends.

Without a network krun becomes crun by execve; with one, somebody has to be there when crun could
not make the container, or when `run` ends.
"""

from __future__ import annotations

# The C half of the signal module, which imports enum (3 ms).
import _signal
import os

from krun.errors import KrunError
from krun.network.detached import PYTHONS_OWN

# Those that cannot be blocked, and those that a fault of this process raises.
_NOT_PASSED_ON = {
    _signal.SIGKILL,
    _signal.SIGSTOP,
    _signal.SIGSEGV,
    _signal.SIGBUS,
    _signal.SIGFPE,
    _signal.SIGILL,
    _signal.SIGTRAP,
    _signal.SIGSYS,
}


def run(path: str, argv: list[str]) -> int:
    """Run a program to its end, passing on every signal; return its status as a shell does.

    Raises KrunError when it cannot be executed.
    """
    awaited = set(_signal.valid_signals()) - _NOT_PASSED_ON
    # A caller that ignores SIGCHLD would have the kernel reap the child unseen.
    _signal.signal(_signal.SIGCHLD, _signal.SIG_DFL)
    before = _signal.pthread_sigmask(_signal.SIG_BLOCK, awaited)
    try:
        try:
            pid = os.posix_spawn(path, argv, os.environ, setsigmask=before, setsigdef=PYTHONS_OWN)
        except OSError as error:
            raise KrunError(f"{path}: {error.strerror}", "see krun check") from error
        while True:
            number = _signal.sigwaitinfo(awaited)
            if number.si_signo != _signal.SIGCHLD:
                os.kill(pid, number.si_signo)
                continue
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended == pid:
                code = os.waitstatus_to_exitcode(status)
                return 128 - code if code < 0 else code
    finally:
        _signal.pthread_sigmask(_signal.SIG_SETMASK, before)
