"""Files: those of the state directory whole or not at all, and one writer at a time."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from krun.errors import KrunError


def read(path: str, what: str, hint: str, kind: type[KrunError] = KrunError) -> bytes:
    """Return the content of a file that the host's owner named; raises `kind` with the hint."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise kind(f"{what}: {path}: {error.strerror}", hint) from error


def write_atomically(path: str, data: bytes, mode: int = 0o600) -> None:
    """Replace a file so that a reader, or a crash, sees the old or the new one whole."""
    write_all([(path, data, mode)])


def write_all(files: Sequence[tuple[str, bytes, int]]) -> None:
    """Replace several files (path, content, mode): on an error, such as a full disk, none of them.

    Everything is on the disk under another name before the first is renamed; a crash between two
    renames leaves each file whole, the later ones old.  Raises OSError.
    """
    temporary = [f"{os.path.dirname(path)}/.{os.path.basename(path)}.{os.getpid()}.tmp"
                 for path, _, _ in files]  # fmt: skip
    try:
        for name, (_, data, mode) in zip(temporary, files, strict=True):
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
            with open(os.open(name, flags, mode), "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        for name, (path, _, _) in zip(temporary, files, strict=True):
            os.replace(name, path)
    except BaseException:
        for name in temporary:
            with suppress(FileNotFoundError):
                os.unlink(name)
        raise
    for directory in {os.path.dirname(path) for path, _, _ in files}:
        sync_directory(directory)


def sync_directory(directory: str) -> None:
    """Make a rename or removal last through a crash."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def _lock_file(path: str) -> Iterator[int]:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def locked(path: str) -> Iterator[None]:
    """Hold an exclusive flock(2) on a file; the kernel drops it with the process."""
    with _lock_file(path) as fd:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield


@contextmanager
def try_locked(path: str) -> Iterator[bool]:
    """Like locked, but yields False at once when another process holds it."""
    with _lock_file(path) as fd:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
