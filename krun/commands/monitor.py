"""krun monitor: run a program in the built-in monitor, as km does."""

from __future__ import annotations

import os

from krun.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

    from krun.grammar import Call


def run(call: Call) -> NoReturn:
    """Run the program and end with its status, or by the signal that ended it."""
    from krun.monitor.builtin import run as builtin

    options = call.options
    width = options["membus_width"]
    if width is not None and not 32 <= width <= 52:
        raise UsageError("--membus-width must be from 32 to 52")
    if options["ring"] not in (0, 3):
        raise UsageError("--ring must be 3 or 0")
    settings = {
        "memory": 1 << width if width else 0,
        "device": options["virt_device"],
        "coredump": options["coredump"],
        "log_to": options["km_log_to"],
        "statistics": options["hcall_stats"],
        "verbose": options["verbose"],
        "kill_unimplemented": options["kill_unimpl_scall"],
        "ring": options["ring"],
        "seccomp": not options["no_seccomp"],
    }
    # The payload may have closed or replaced fd 1, which Python would flush at its end.
    os._exit(builtin.run(call.arguments, environment(call), settings))


def environment(call: Call) -> list[str]:
    """The program's variables, by --putenv or --copyenv; raises UsageError."""
    given = call.options["putenv"]
    dropped = call.options["copyenv"]
    if given and dropped:
        raise UsageError("--putenv and --copyenv exclude each other")
    if given:
        for word in given:
            if "=" not in word:
                raise UsageError(f"--putenv {word}: must be NAME=VALUE")
        return list(given)
    prefixes = tuple(word for word in (dropped or "").split("=") if word)
    return [word for word in inherited() if not (prefixes and word.startswith(prefixes))]


def inherited() -> list[str]:
    """The variables krun was started with; in the C locale Python adds LC_CTYPE to its own."""
    try:
        with open("/proc/self/environ", "rb") as file:
            words = file.read().split(b"\0")
    except OSError:
        return [f"{name}={value}" for name, value in os.environ.items()]
    return [os.fsdecode(word) for word in words if word]
