"""The system calls that Python's os module lacks, through the bare `_ctypes` C module.

The `ctypes` package costs another millisecond and a half; only its C half is needed to call
syscall(2) with integers and buffers.
"""

from __future__ import annotations

import os
from _ctypes import (
    FUNCFLAG_CDECL,
    FUNCFLAG_USE_ERRNO,
    CFuncPtr,
    _SimpleCData,
    addressof,
    dlopen,
    dlsym,
    get_errno,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class _c_long(_SimpleCData):  # type: ignore[type-arg]
    _type_ = "l"


class _c_char(_SimpleCData):  # type: ignore[type-arg]
    _type_ = "c"


class _Long(CFuncPtr):
    """A C function that returns long and keeps errno."""

    _flags_ = FUNCFLAG_CDECL | FUNCFLAG_USE_ERRNO
    _restype_ = _c_long


_SELF = dlopen(None, os.RTLD_NOW)  # type: ignore[arg-type]
_SYSCALL = _Long(dlsym(_SELF, "syscall"))

SYS_openat2 = 437


def syscall(number: int, *arguments: int | bytes | Any | None, path: str = "") -> int:
    """Make a system call; raises OSError with the path.

    Integers pass as long, bytes as a pointer to them (read only for the kernel), None as NULL,
    and a `buffer` as a pointer the kernel may write to.
    """
    result: int = _SYSCALL(*[_c_long(a) if isinstance(a, int) else a for a in (number, *arguments)])
    if result == -1:
        errno = get_errno()
        if path:
            raise OSError(errno, os.strerror(errno), path)
        raise OSError(errno, os.strerror(errno))
    return result


def buffer(size: int) -> Any:
    """Return size zero bytes that a system call may fill; `bytes(buffer)` reads them."""
    return (_c_char * size)()


def pinned(data: bytes) -> tuple[Any, int]:
    """Return an object that holds a copy of data, and the copy's address while it lives."""
    holder = (_c_char * len(data)).from_buffer_copy(data)
    return holder, addressof(holder)


class _c_char_p(_SimpleCData):  # type: ignore[type-arg]
    _type_ = "z"


def pointers(strings: list[bytes]) -> Any:
    """Return a NULL-terminated array of C strings, as execve(2) takes it."""
    return (_c_char_p * (len(strings) + 1))(*strings, None)


class Library:
    """A shared library whose functions take and return longs, pointers and bytes."""

    def __init__(self, name: str) -> None:
        self._handle = dlopen(name, os.RTLD_NOW)

    def __getattr__(self, name: str) -> Any:
        function = _Long(dlsym(self._handle, name))

        def call(*arguments: int | bytes | Any | None) -> int:
            result: int = function(*[_c_long(a) if isinstance(a, int) else a for a in arguments])
            return result

        setattr(self, name, call)
        return call


RESOLVE_NO_XDEV = 0x01
RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_NO_SYMLINKS = 0x04
RESOLVE_BENEATH = 0x08
RESOLVE_IN_ROOT = 0x10


def openat2(dirfd: int, path: str, flags: int, resolve: int, mode: int = 0) -> int:
    """Open path relative to dirfd under the resolve rules (openat2(2)); O_CLOEXEC is added.

    Retries EAGAIN, which a concurrent rename causes with RESOLVE_IN_ROOT.
    """
    how = (
        (flags | os.O_CLOEXEC).to_bytes(8, "little")
        + mode.to_bytes(8, "little")
        + resolve.to_bytes(8, "little")
    )
    for _ in range(128):
        try:
            return syscall(SYS_openat2, dirfd, os.fsencode(path), how, 24, path=path)
        except BlockingIOError:
            continue
    raise OSError(11, "too many concurrent renames", path)
