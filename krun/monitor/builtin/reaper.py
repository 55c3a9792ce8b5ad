"""Pid 1 for a payload that wants an init in front of it (podman run --init).

It forwards signals, reaps what is orphaned, and ends as its child ends, as tini and catatonit do.
"""

from __future__ import annotations

import os

from krun.monitor.builtin import hostcall, signals
from krun.monitor.builtin.signals import ALL, SIGCHLD

SYS_getpid = 39


def needed() -> bool:
    """Whether this process is pid 1, whose signals and orphans need an init."""
    return hostcall.call(SYS_getpid) == 1


def split(mask: int) -> int:
    """Fork: returns in the child, which is to run the payload; the parent ends with its status.

    `mask` are the signals that are blocked in the child, as they were here.
    """
    scratch = hostcall.Scratch(4096)
    _set_mask(scratch, ALL)
    child = os.fork()
    if child == 0:
        _foreground()
        _set_mask(scratch, mask)
        return hostcall.call(SYS_getpid)
    os._exit(_stand(scratch, child))


def _set_mask(scratch: hostcall.Scratch, mask: int) -> None:
    scratch.view[0:8] = mask.to_bytes(8, "little")
    hostcall.call(signals.SYS_rt_sigprocmask, 2, scratch.address, 0, 8)


def _foreground() -> None:
    """A process group of its own, and the terminal's keys for it."""
    os.setpgid(0, 0)
    try:
        # SIGTTOU is blocked still, so a background group may do this.
        os.tcsetpgrp(0, os.getpgrp())
    except OSError:
        return


def _stand(scratch: hostcall.Scratch, child: int) -> int:
    scratch.view[0:8] = ALL.to_bytes(8, "little")
    while True:
        number = hostcall.call(signals.SYS_rt_sigtimedwait, scratch.address, 0, 0, 8)
        if number != SIGCHLD:
            if number > 0:
                hostcall.call(62, child, number)
            continue
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if pid == child:
                code = os.waitstatus_to_exitcode(status)
                return code if code >= 0 else 128 - code
            if not pid:
                break
