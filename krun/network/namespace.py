"""Network namespaces that live without a process: created, bind-mounted to a file, unmounted."""

from __future__ import annotations

import errno
import os

from krun.linux.libc import syscall

CLONE_NEWNET = 0x40000000
MS_BIND = 0x1000
MS_PRIVATE = 1 << 18
MNT_DETACH = 2

_NUMBERS = {
    "x86_64": {"mount": 165, "umount2": 166, "unshare": 272, "setns": 308},
    "aarch64": {"mount": 40, "umount2": 39, "unshare": 97, "setns": 268},
}
_SYS = _NUMBERS.get(os.uname().machine, _NUMBERS["x86_64"])
_SELF = "/proc/thread-self/ns/net"


class Inside:
    """A visit to a network namespace: this thread is inside until the `with` block ends."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._outside = -1

    def __enter__(self) -> None:
        self._outside = os.open(_SELF, os.O_RDONLY | os.O_CLOEXEC)
        syscall(_SYS["setns"], self._fd, CLONE_NEWNET)

    def __exit__(self, *_: object) -> None:
        syscall(_SYS["setns"], self._outside, CLONE_NEWNET)
        os.close(self._outside)


def _make_file(path: str) -> None:
    os.makedirs(os.path.dirname(path), 0o755, exist_ok=True)
    os.close(os.open(path, os.O_RDONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444))


def keep(pid: int, path: str) -> None:
    """Mount the network namespace of a process on the file path."""
    _make_file(path)
    source = f"/proc/{pid}/ns/net".encode()
    syscall(_SYS["mount"], source, os.fsencode(path), None, MS_BIND, None, path=path)


def create(path: str) -> int:
    """Make a new network namespace, keep it mounted on the file path; return its descriptor."""
    _make_file(path)
    outside = os.open(_SELF, os.O_RDONLY | os.O_CLOEXEC)
    try:
        syscall(_SYS["unshare"], CLONE_NEWNET, path="new network namespace")
        try:
            source = _SELF.encode()
            syscall(_SYS["mount"], source, os.fsencode(path), None, MS_BIND, None, path=path)
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        finally:
            syscall(_SYS["setns"], outside, CLONE_NEWNET)
    finally:
        os.close(outside)


def remove(path: str) -> None:
    """Let go of the namespace; the kernel ends it, and its interfaces, with the last process."""
    try:
        syscall(_SYS["umount2"], os.fsencode(path), MNT_DETACH, path=path)
    except FileNotFoundError:
        return
    except OSError as error:
        # Not mounted: killed before the mount, or the mount belongs to another mount namespace.
        if error.errno != errno.EINVAL:
            raise
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
