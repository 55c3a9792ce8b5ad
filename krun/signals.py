"""Signals by name and number, as kill takes them."""

from __future__ import annotations

import _signal

from krun.errors import KrunError

# What clients send; every crun knows these, and the launcher passes them on.
_CRUNS = ("HUP", "INT", "QUIT", "KILL", "USR1", "USR2", "TERM", "CONT", "STOP", "WINCH")


def number_of(text: str) -> int:
    """Return the number of a signal's name or number; raises KrunError."""
    if text.isascii() and text.isdigit() and len(text) < 4 and int(text) <= 64:
        return int(text)
    name = text.upper().removeprefix("SIG")
    found = getattr(_signal, f"SIG{name}", None)
    if isinstance(found, int) and name[:1] != "_":
        return int(found)
    first, last = int(_signal.SIGRTMIN), int(_signal.SIGRTMAX)
    digits = name[6:]
    if name[:6] in ("RTMIN+", "RTMAX-") and digits.isascii() and digits.isdigit():
        away = int(digits[:3])
        if away <= last - first:
            return first + away if name[:6] == "RTMIN+" else last - away
    raise KrunError(f"unknown signal {text!r}", "use a name such as TERM or a number")


def for_crun(text: str) -> str:
    """Return the word that crun reads as that signal; raises KrunError.

    What crun does not know it takes for signal 0, and reports success.
    """
    number = str(number_of(text))
    return text if text == number or text.removeprefix("SIG") in _CRUNS else number
