"""Which images this node used: one JSON line a start or stop, appended by the hooks.

Part of every container's start: imports nothing but posix, the C half of os (2 ms saved), and
the JSON scanner.
"""

from __future__ import annotations

import posix

from krun import jsontext

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

# The ledger is renamed to ledger.1.jsonl at this size: some 30,000 starts are kept at least.
LIMIT = 8 << 20
NAME = "ledger.jsonl"
OLDER = "ledger.1.jsonl"


def append(state: str, entry: dict[str, Any]) -> None:
    """Add one line; O_APPEND keeps lines of starts at the same time apart (write(2))."""
    path = f"{state}/{NAME}"
    data = (jsontext.dumps(entry) + "\n").encode("utf-8", "backslashreplace")
    flags = posix.O_WRONLY | posix.O_APPEND | posix.O_CREAT | posix.O_CLOEXEC | posix.O_NOFOLLOW
    try:
        fd = posix.open(path, flags, 0o644)
    except FileNotFoundError:
        import os

        os.makedirs(state, 0o755, exist_ok=True)
        fd = posix.open(path, flags, 0o644)
    try:
        posix.write(fd, data)
        if posix.fstat(fd).st_size > LIMIT:
            _rotate(state, fd)
    finally:
        posix.close(fd)


def _rotate(state: str, fd: int) -> None:
    """Move a full ledger aside, unless another start just did."""
    try:
        if posix.stat(f"{state}/{NAME}").st_ino == posix.fstat(fd).st_ino:
            posix.rename(f"{state}/{NAME}", f"{state}/{OLDER}")
    except FileNotFoundError:
        pass


def read(state: str) -> Iterator[dict[str, Any]]:
    """Yield the entries, oldest first; a line that a crash cut short is left out."""
    for name in (OLDER, NAME):
        try:
            with open(f"{state}/{name}", "rb") as file:
                for line in file:
                    try:
                        entry = jsontext.loads(line)
                    except ValueError:
                        continue
                    if isinstance(entry, dict):
                        yield entry
        except FileNotFoundError:
            continue


def last_used(state: str) -> dict[str, float]:
    """Return when an image was last started or stopped, by its id and by its name."""
    used: dict[str, float] = {}
    for entry in read(state):
        moment = entry.get("time")
        if not isinstance(moment, int | float):
            continue
        for field in ("id", "image"):
            word = entry.get(field)
            if isinstance(word, str) and word:
                used[word] = max(moment, used.get(word, 0.0))
    return used
