"""How create, the init process and start talk; nothing is told by timing.

    create                         init (python)                 start
      | -- b"G" on down -------------->|   ids mapped, cgroup joined
      |<-- b"H" on up -----------------|   mounts are made; runtime hooks may run
      | -- b"G" ---------------------->|
      |<-- b"L<fd>\\n" ----------------|   seccomp listener (pidfd_getfd)
      |<-- b"R", end of file ----------|   became hold(1 page), which waits on exec.fifo
      |        or b"F<code> text"      |
                                       |<---- one byte in exec.fifo ------|
                                       |----- fifo closed by execve ----->|  POLLHUP: it runs
                                       |----- errno or text in exec.fifo  |  it does not

The waiting process holds exec.fifo open (read and write, so that a start that dies between open
and write changes nothing) with a shared flock.  The lock is the truth about "created": it ends
with the execve or with the process, whoever was killed meanwhile.
"""

from __future__ import annotations

import os

from krun.errors import BadState, CannotExecute, ExecFailed, KrunError
from krun.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

FIFO = "exec.fifo"
NEW_FIFO = "creating.fifo"

LOCK_SH, LOCK_EX, LOCK_NB = 1, 2, 4

GO = b"G"
HOOKS = b"H"
LISTENER = b"L"
READY = b"R"
FAILED = b"F"


_GONE = "cannot start a container whose init process is gone"


class Channel(Record):
    """The init process's ends of the pipes to create.

    others are create's own ends, which init closes: its end of file must mean create's death.
    """

    down: int
    up: int
    others: tuple[int, ...] = ()


def flock(fd: int, operation: int) -> None:
    """flock(2)."""
    import fcntl

    fcntl.flock(fd, operation)


def make_fifo(directory: str) -> tuple[int, int]:
    """Make the fifo; returns two descriptors for the init process: of the word, of its report."""
    path = f"{directory}/{NEW_FIFO}"
    os.mkfifo(path, 0o600)
    fifo = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    flock(fifo, LOCK_SH)
    return fifo, os.dup(fifo)


def mark(directory: str) -> None:
    """Let others see that a container without a fifo is being created."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    os.close(os.open(f"{directory}/{NEW_FIFO}", flags, 0o600))


def unmark(directory: str) -> None:
    """Let others see that it is created."""
    os.unlink(f"{directory}/{NEW_FIFO}")


def publish_fifo(directory: str) -> None:
    """Let start find the fifo: the container is created."""
    os.rename(f"{directory}/{NEW_FIFO}", f"{directory}/{FIFO}")


def waiting(directory: str) -> bool:
    """Tell whether an init process waits for start, by the lock that it holds."""
    try:
        fd = os.open(f"{directory}/{FIFO}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        flock(fd, LOCK_EX | LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def release(directory: str, init: int, look: Callable[[], None], seconds: float) -> bytes:
    """Give the word, and wait until the payload runs; init is a pidfd.

    Returns init's report, b"" when the payload runs; raises BadState when init is gone.  Each
    time that so many seconds pass without either, look is called, which may raise.
    The report comes through the fifo, as init has taken the word out of it.
    """
    import select

    path = f"{directory}/{FIFO}"
    try:
        fd = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        # ENXIO: nobody holds the other end.
        raise BadState(_GONE) from error
    try:
        answer = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        os.write(fd, GO)
    finally:
        os.close(fd)
    try:
        poll = select.poll()
        # POLLHUP alone, which comes unasked: init, the last writer, has closed it.
        poll.register(answer, 0)
        poll.register(init, select.POLLIN)
        while not poll.poll(seconds * 1000):
            look()
        report = os.read(answer, 65536)
    except BlockingIOError:
        # Init is gone, and others of its container have the fifo open.
        report = b""
    finally:
        os.close(answer)
    if report == GO:
        raise BadState(_GONE)
    try:
        os.unlink(path)
    except FileNotFoundError:
        # The payload has run, and somebody has deleted the container since.
        pass
    return report


def raise_report(report: bytes, name: str) -> None:
    """Raise what a report says: a negative errno of execve from hold, or b"F<code> text"."""
    if len(report) == 4:
        raise cannot_execute(name, -int.from_bytes(report, "little", signed=True))
    code, _, text = report[1:].decode("utf-8", "replace").partition(" ")
    if code in ("126", "127"):
        raise CannotExecute(text, int(code))
    raise KrunError(text)


def cannot_execute(name: str, errno: int) -> ExecFailed:
    """Return the error of a failed execve, in runc's words; podman and docker look for the end."""
    text = os.strerror(errno).lower()
    said = f"exec {name}: {text}" if name else f"exec: {text}"
    return ExecFailed(said, 127 if errno == 2 else 126)


def failure(error: BaseException) -> bytes:
    """Return an error as the message that raise_report understands."""
    code = error.exit_code if isinstance(error, KrunError) else 1
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        text = f"{where}{error.strerror or error}"
    else:
        text = str(error)
    return FAILED + f"{code} {text}".encode("utf-8", "backslashreplace")[:4000]


def await_go(channel: Channel) -> None:
    """Wait for create's word; its death ends the wait."""
    if os.read(channel.down, 1) != GO:
        os._exit(1)
