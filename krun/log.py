"""Log lines in runc's form, to stderr and to the --log file.

Text: `time="2026-01-02T03:04:05Z" level=error msg="…"`; JSON: `{"level":…,"msg":…,"time":…}`.
podman's conmon and containerd's shim show the last error line of the file to their users.
Nothing here imports the logging package.
"""

from __future__ import annotations

import os
import sys
import time

from krun import jsontext
from krun.errors import KrunError

LEVELS = ("error", "warning", "info", "debug")
NAME = "krun: "

_path: str | None = None
_json = False
_level = LEVELS.index("warning")


def configure(path: str | None, form: str, level: str | None, debug: bool) -> None:
    """Set where lines go: `path` of the log file, form text or json, least level.

    crun writes the destination as file:PATH too; journald: and syslog: are crun's alone.  Makes
    the file, so that none stands for nothing to tell; raises KrunError when it cannot be opened.
    """
    global _path, _json, _level
    if path is not None and path.startswith("file:"):
        path = path[5:]
    _path = None
    _json = form == "json"
    _level = LEVELS.index("debug" if debug else level or "warning")
    if path and not path.startswith(("journald:", "syslog:")):
        try:
            os.close(_open(path))
        except OSError as error:
            raise KrunError(f"open log file {path}: {error.strerror}") from error
        _path = path


def _open(path: str) -> int:
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)


def _line(level: str, text: str) -> str:
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    if _json:
        return jsontext.dumps({"level": level, "msg": text, "time": stamp}) + "\n"
    return f'time="{stamp}" level={level} msg={jsontext.dumps(text)}\n'


def _append(path: str, line: str) -> None:
    try:
        fd = _open(path)
    except OSError as error:
        text = f"log {path}: {error.strerror}"
        _stderr(_line("warning", text) if _json else f"krun: warning: {text}\n")
        return
    try:
        os.write(fd, line.encode("utf-8", "backslashreplace"))
    finally:
        os.close(fd)


def _stderr(line: str) -> None:
    try:
        os.write(2, line.encode("utf-8", "backslashreplace"))
    except OSError:
        # Nobody listens; the exit status still tells.
        pass


def _printable(text: str) -> str:
    """Return text without what would steer a terminal: names in a bundle can hold anything."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else f"\\x{ord(c):02x}" for c in text)


def emit(level: str, text: str, name: str = NAME) -> None:
    """Log one line of a level; beside a log file standard error has plain text.

    The name is what it begins with there.
    """
    if LEVELS.index(level) > _level:
        return
    if _path is not None:
        _append(_path, _line(level, text))
        if level != "error":
            return
    if (_json and _path is None) or _level == LEVELS.index("debug"):
        # As runc's debugging does; who reads it wants the time.
        _stderr(_line(level, text))
    else:
        shown = _printable(text)
        _stderr(f"{name}{shown}\n" if level == "error" else f"{name}{level}: {shown}\n")


def error(text: str, name: str = NAME) -> None:
    """Log why krun fails; also on stderr."""
    emit("error", text, name)


def warning(text: str) -> None:
    """Log what its user should know although krun goes on."""
    emit("warning", text)


def info(text: str) -> None:
    """Log what krun did."""
    emit("info", text)


def debug(text: str) -> None:
    """Log how krun decided."""
    emit("debug", text)


def timing(name: str, start: float) -> None:
    """Log the milliseconds since start (time.monotonic()), where debugging is on."""
    if _level >= LEVELS.index("debug"):
        debug(f"{name}: {(time.monotonic() - start) * 1000:.1f} ms")


def flush() -> None:
    """Write what Python still holds of stdout; a closed pipe is not an error.

    Raises OSError, as on a device that is full.
    """
    try:
        sys.stdout.flush()
    except (BrokenPipeError, ValueError):
        pass
    except OSError as error:
        raise OSError(error.errno, error.strerror, "standard output") from None
