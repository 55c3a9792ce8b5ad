"""The last steps to execve: the environment, the program by the container's PATH, who calls it.

Inside the container's root, with the payload's credentials; the same for init and for exec.
"""

from __future__ import annotations

import errno
import os

from krun.errors import CannotExecute
from krun.linux import flags as k
from krun.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NoReturn

    from krun.plan.model import Process

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def environment(process: Process) -> list[bytes]:
    """Return the environment: the last of equal names wins, HOME is the user's."""
    variables: dict[str, str] = {}
    for one in process.env:
        name, equals, value = one.partition("=")
        if equals and name:
            variables[name] = value
    # An empty one counts as none, as with runc.
    if not variables.get("HOME"):
        variables["HOME"] = home_directory(process.uid)
    return [os.fsencode(f"{name}={value}") for name, value in variables.items()]


def home_directory(uid: int) -> str:
    """Return the home directory of uid in the container's /etc/passwd, / by default."""
    try:
        # A fifo in its place would hold the open for ever.
        fd = os.open("/etc/passwd", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return "/"
    try:
        text = os.read(fd, 1 << 20).decode("utf-8", "surrogateescape")
    except OSError:
        return "/"
    finally:
        os.close(fd)
    for line in text.splitlines():
        fields = line.split(":")
        if len(fields) >= 6 and fields[2] == str(uid):
            return fields[5] or "/"
    return "/"


def find_executable(name: str, environ: list[bytes]) -> str:
    """Return the path that execve gets; raises CannotExecute."""
    if "/" in name:
        _check_executable(name, name)
        return name
    path = DEFAULT_PATH
    for one in environ:
        if one.startswith(b"PATH="):
            path = os.fsdecode(one[5:])
    denied = False
    for directory in path.split(":"):
        candidate = os.path.join(directory or ".", name)
        try:
            _check_executable(candidate, name)
        except CannotExecute as error:
            denied = denied or error.exit_code == 126
            continue
        return candidate
    if denied:
        raise CannotExecute(f'exec: "{name}": permission denied', 126)
    raise CannotExecute(f'exec: "{name}": executable file not found in $PATH', 127)


def _check_executable(path: str, name: str) -> None:
    try:
        found = os.stat(path)
    except OSError as error:
        text = f'exec: "{name}": stat {path}: {os.strerror(error.errno or 0).lower()}'
        raise CannotExecute(text, 127 if error.errno == errno.ENOENT else 126) from error
    if found.st_mode & 0o170000 == 0o040000:
        raise CannotExecute(f'exec: "{name}": is a directory', 126)
    if not os.access(path, os.X_OK, effective_ids=True) and _denies(found, path):
        raise CannotExecute(f'exec: "{name}": permission denied', 126)


def _denies(found: os.stat_result, path: str) -> bool:
    """Tell whether mode or mount deny execution, for a filter that does not know faccessat2(2).

    The payload's own is in force by now; whatever else there is, execve finds.
    """
    uid = os.geteuid()
    bits = 0o001
    if found.st_uid == uid:
        bits = 0o100
    elif found.st_gid in (os.getegid(), *os.getgroups()):
        bits = 0o010
    if uid == 0:
        bits = 0o111
    try:
        flags = os.statvfs(path).f_flag
    except OSError:
        flags = 0
    return not found.st_mode & bits or bool(flags & os.ST_NOEXEC)


def refuse_own_interpreter(path: str) -> None:
    """Refuse to exec the file that runs this process (CVE-2019-5736), where hold cannot."""
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        mine, other = _own_file, os.fstat(fd)
    finally:
        os.close(fd)
    if (other.st_dev, other.st_ino) == mine:
        raise CannotExecute(f'exec: "{path}": permission denied', 126)


def note_own_file() -> None:
    """Look at the file that runs this process, while /proc is the host's.

    Not when this module is loaded: the warm start has loaded it as another program.
    """
    global _own_file
    if _own_file == (0, 0):
        found = os.stat("/proc/self/exe")
        _own_file = (found.st_dev, found.st_ino)


_own_file = (0, 0)


class Ending(Record):
    """How the process becomes the payload.

    program is a descriptor of hold (-1: not on this machine); go is what it waits on (-1: it
    does not), report is where failures go.  builtin, when given, is called instead of execve.
    """

    program: int
    go: int
    report: int
    builtin: Callable[[list[str], dict[str, str]], int] | None = None


def execs_by_capability(process: Process) -> bool:
    """Tell whether execve may need a capability that hold, a program of its own, would lack.

    An ordinary user's capabilities end with execve unless they are ambient.
    """
    sets = process.capabilities
    return bool(process.uid and sets.effective & ~sets.ambient & _DAC)


_DAC = 1 << k.CAPABILITIES.index("DAC_OVERRIDE") | 1 << k.CAPABILITIES.index("DAC_READ_SEARCH")


def run_builtin(process: Process, environ: list[bytes], ending: Ending) -> NoReturn:
    """Run the built-in monitor in this process, with the descriptors of the payload alone."""
    assert ending.builtin is not None
    for fd in (ending.go, ending.report, ending.program):
        if fd != -1:
            os.close(fd)
    variables = dict(one.decode("utf-8", "surrogateescape").split("=", 1) for one in environ)
    os._exit(ending.builtin(list(process.args), variables) & 0xFF)
