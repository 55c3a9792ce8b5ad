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
    dlopen,
    dlsym,
    get_errno,
)


class _c_long(_SimpleCData):  # type: ignore[type-arg]
    _type_ = "l"


class _Long(CFuncPtr):
    """A C function that returns long and keeps errno."""

    _flags_ = FUNCFLAG_CDECL | FUNCFLAG_USE_ERRNO
    _restype_ = _c_long


_SELF = dlopen(None, os.RTLD_NOW)  # type: ignore[arg-type]
_SYSCALL = _Long(dlsym(_SELF, "syscall"))

SYS_openat2 = 437


def syscall(number: int, *arguments: int | bytes | bytearray | None, path: str = "") -> int:
    """Make a system call; raises OSError with the path.

    Integers pass as long, bytes as a pointer to them (read only for the kernel), None as NULL.
    """
    result: int = _SYSCALL(*[_c_long(a) if isinstance(a, int) else a for a in (number, *arguments)])
    if result == -1:
        errno = get_errno()
        if path:
            raise OSError(errno, os.strerror(errno), path)
        raise OSError(errno, os.strerror(errno))
    return result


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
