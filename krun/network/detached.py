"""Processes that outlive the one that starts them, and hold nothing of it."""

from __future__ import annotations

import _signal
import os

# The signals that CPython ignores from its start, which a program it starts would ignore too.
PYTHONS_OWN = (_signal.SIGPIPE, _signal.SIGXFSZ)


def spawn(argv: list[str], output: int = -1, third: int = -1) -> int:
    """Start argv in a session of its own; return its pid.

    Its standard output and error go to the descriptor `output` (by default nowhere), and it gets
    the descriptor `third` as number 3.  Nothing else is inherited: a descriptor left open would
    keep the pipes open by which conmon and containerd-shim learn that the runtime has ended.
    """
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    said = null if output == -1 else output
    actions: list[tuple[int, ...]] = [(os.POSIX_SPAWN_DUP2, null, 0)]
    actions += [(os.POSIX_SPAWN_DUP2, said, number) for number in (1, 2)]
    if third != -1:
        actions.append((os.POSIX_SPAWN_DUP2, third, 3))
    for name in os.listdir("/proc/self/fd"):
        number = int(name)
        if number > (3 if third != -1 else 2):
            try:
                if os.get_inheritable(number):
                    actions.append((os.POSIX_SPAWN_CLOSE, number))
            except OSError:
                # The descriptor of the listing itself.
                continue
    try:
        return os.posix_spawn(
            argv[0],
            argv,
            {"PATH": os.defpath},
            file_actions=actions,
            setsid=True,
            setsigdef=PYTHONS_OWN,
        )
    finally:
        os.close(null)
