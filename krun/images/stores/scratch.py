"""A directory for the time of one pull; what killed processes have left goes with the next one.

Such a directory may hold a credential: only its owner can read it, and it is in memory (/run).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator

# A directory younger than this, in seconds, may belong to somebody who is about to lock it.
_YOUNG = 60


@contextlib.contextmanager
def directory(prefix: str) -> Iterator[str]:
    """Make a directory below the runtime directory, and remove it in the end; raises OSError.

    A lock on it (flock(2)), which ends with the process, tells that it is in use.
    """
    base = os.environ.get("XDG_RUNTIME_DIR") or "/run"
    _remove_left(base, prefix)
    path = tempfile.mkdtemp(prefix=prefix, dir=base)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(fd)


def _remove_left(base: str, prefix: str) -> None:
    for name in os.listdir(base):
        if not name.startswith(prefix):
            continue
        path = f"{base}/{name}"
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            found = os.fstat(fd)
            if found.st_uid != os.geteuid() or time.time() - found.st_mtime < _YOUNG:
                continue
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
        except BlockingIOError:
            # Somebody's pull is under way.
            continue
        finally:
            os.close(fd)
