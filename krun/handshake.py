"""How create, the init process and start talk; nothing is told by timing.

    create                         init (python)                 start
      | -- b"G" on down -------------->|   ids mapped, cgroup joined
      |<-- b"H" on up -----------------|   mounts are made; runtime hooks may run
      | -- b"G" ---------------------->|
      |<-- b"L<fd>\\n" ----------------|   seccomp listener (pidfd_getfd)
      |<-- b"R", end of file ----------|   became hold(1 page), which waits on exec.fifo
      |        or b"F<code> text"      |
                                       |<---- one byte in exec.fifo ------|
                                       |----- fifo closed by execve ----->|  POLLERR: it runs
                                       |----- errno or text in exec.error |  it does not

The waiting process holds exec.fifo open (read and write, so that a start that dies between open
and write changes nothing) with a shared flock.  The lock is the truth about "created": it ends
with the execve or with the process, whoever was killed meanwhile.
"""

from __future__ import annotations

import os

from krun.errors import BadState, CannotExecute, KrunError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

FIFO = "exec.fifo"
NEW_FIFO = "creating.fifo"
REPORT = "exec.error"

LOCK_SH, LOCK_EX, LOCK_NB = 1, 2, 4

GO = b"G"
HOOKS = b"H"
LISTENER = b"L"
READY = b"R"
FAILED = b"F"


def flock(fd: int, operation: int) -> None:
    """flock(2)."""
    import fcntl

    fcntl.flock(fd, operation)


def make_fifo(directory: str) -> tuple[int, int]:
    """Make the fifo and the report file; returns descriptors for the init process."""
    path = f"{directory}/{NEW_FIFO}"
    os.mkfifo(path, 0o600)
    fifo = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    flock(fifo, LOCK_SH)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
    return fifo, os.open(f"{directory}/{REPORT}", flags, 0o600)


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
    """
    import select

    path = f"{directory}/{FIFO}"
    try:
        fd = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        # ENXIO: nobody holds the other end.
        raise BadState("cannot start a container whose init process is gone") from error
    try:
        os.write(fd, GO)
        poll = select.poll()
        poll.register(fd, select.POLLERR)
        poll.register(init, select.POLLIN)
        while not poll.poll(seconds * 1000):
            look()
    finally:
        os.close(fd)
    report = read_report(directory)
    os.unlink(path)
    return report


def read_report(directory: str) -> bytes:
    """Return what init said about its failure, b"" for nothing."""
    try:
        fd = os.open(f"{directory}/{REPORT}", os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return b""
    try:
        return os.read(fd, 65536)
    finally:
        os.close(fd)


def raise_report(report: bytes, name: str) -> None:
    """Raise what a report says: a negative errno of execve from hold, or b"F<code> text"."""
    if len(report) == 4:
        raise cannot_execute(name, -int.from_bytes(report, "little", signed=True))
    code, _, text = report[1:].decode("utf-8", "replace").partition(" ")
    if code in ("126", "127"):
        raise CannotExecute(text, int(code))
    raise KrunError(text)


def cannot_execute(name: str, errno: int) -> CannotExecute:
    """Return the error of a failed execve, in the words that podman and docker look for."""
    text = os.strerror(errno).lower()
    said = f'exec: "{name}": {text}' if name else f"exec: {text}"
    return CannotExecute(said, 127 if errno == 2 else 126)


def failure(error: BaseException) -> bytes:
    """Return an error as the message that raise_report understands."""
    code = error.exit_code if isinstance(error, KrunError) else 1
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        text = f"{where}{error.strerror or error}"
    else:
        text = str(error)
    return FAILED + f"{code} {text}".encode("utf-8", "backslashreplace")[:4000]
