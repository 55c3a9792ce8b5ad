"""The monitor's way to the host kernel: system calls by number, the result as the kernel gives it.

A payload's call is passed on with its own numbers and checked addresses, so errors stay what the
kernel's ABI says they are: a negative errno, never an exception.
"""

from __future__ import annotations

import os
from _ctypes import (
    FUNCFLAG_CDECL,
    FUNCFLAG_USE_ERRNO,
    Array,
    CFuncPtr,
    _SimpleCData,
    addressof,
    dlopen,
    dlsym,
    get_errno,
)


class _Long(_SimpleCData):  # type: ignore[type-arg]
    _type_ = "l"


class _Byte(_SimpleCData):  # type: ignore[type-arg]
    _type_ = "B"


_ADDRESS = dlsym(dlopen(None, os.RTLD_NOW), "syscall")  # type: ignore[arg-type]

# One C function object per number of arguments: each argument costs 0.1 µs.
CALLS = tuple(
    type(
        "_Function",
        (CFuncPtr,),
        {
            "_flags_": FUNCFLAG_CDECL | FUNCFLAG_USE_ERRNO,
            "_restype_": _Long,
            "_argtypes_": (_Long,) * (1 + count),
        },
    )(_ADDRESS)
    for count in range(7)
)

MAP_SHARED, MAP_PRIVATE, MAP_FIXED, MAP_ANONYMOUS, MAP_NORESERVE = 0x01, 0x02, 0x10, 0x20, 0x4000
PROT_READ, PROT_WRITE, PROT_EXEC = 1, 2, 4


def call(number: int, *arguments: int) -> int:
    """Make system call `number`; the result, or the negative errno."""
    result: int = CALLS[len(arguments)](number, *arguments)
    return result if result != -1 else -get_errno()


def checked(what: str, number: int, *arguments: int) -> int:
    """Make a system call that the monitor itself needs; raises OSError naming `what`."""
    result = call(number, *arguments)
    if result < 0 and result > -4096:
        raise OSError(-result, f"{what}: {os.strerror(-result)}")
    return result


def mmap(address: int, size: int, prot: int, flags: int, fd: int = -1, offset: int = 0) -> int:
    """mmap(2): the address."""
    return checked("mmap", 9, address, size, prot, flags, fd, offset)


def munmap(address: int, size: int) -> None:
    """munmap(2)."""
    checked("munmap", 11, address, size)


def view(address: int, size: int) -> memoryview:
    """The size bytes at a host address, writable; the mapping must outlive the view."""
    kind = type("_Bytes", (Array,), {"_type_": _Byte, "_length_": size})
    array = kind.from_address(address)  # type: ignore[attr-defined]
    return memoryview(array).cast("B")


class Scratch:
    """Memory of the monitor that the kernel reads arguments from and writes results to."""

    __slots__ = ("address", "reserved", "size", "view")

    def __init__(self, size: int, reserved: int = 0) -> None:
        """Make `size` bytes; up to `reserved` nothing follows that could be touched."""
        self.size = size
        self.reserved = max(reserved, size)
        flags = MAP_PRIVATE | MAP_ANONYMOUS
        if reserved > size:
            self.address = mmap(0, reserved, 0, flags | MAP_NORESERVE)
            mmap(self.address, size, PROT_READ | PROT_WRITE, flags | MAP_FIXED)
        else:
            self.address = mmap(0, size, PROT_READ | PROT_WRITE, flags)
        self.view = view(self.address, size)

    def release(self) -> None:
        """Give the memory back; the object is dead afterwards."""
        munmap(self.address, self.reserved)

    def put(self, data: bytes | bytearray, offset: int = 0) -> int:
        """Copy data in; its address."""
        self.view[offset : offset + len(data)] = data
        return self.address + offset

    def get(self, size: int, offset: int = 0) -> bytes:
        """Copy size bytes out."""
        return bytes(self.view[offset : offset + size])


def address_of(buffer: bytearray | memoryview) -> int:
    """Host address of a writable buffer, which must stay alive while it is used."""
    return addressof(_Byte.from_buffer(buffer))
