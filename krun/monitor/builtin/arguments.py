"""Arguments of system calls: from a payload's registers to what the host kernel may be given.

Each function takes what the payload gave and returns a value for the host's call, or raises
Refused (or Fault) where the call ends before it is made.
"""

from __future__ import annotations

import struct

from krun.monitor.builtin import hostcall, procfs
from krun.monitor.builtin.areas import Fault
from krun.monitor.builtin.space import TASK_SIZE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from krun.monitor.builtin.thread import Thread

EBADF, EINVAL, EMFILE, ENAMETOOLONG = 9, 22, 24, 36
INT = 0xFFFFFFFF
WORD = (1 << 64) - 1
AT_FDCWD = 0xFFFFFF9C
SECOND = 1000000000

# What one read or write moves at the most (linux/fs.h).
MAX_RW_COUNT = 0x7FFFF000
# Kernel lengths are size_t cut to less than 2 GiB, or unsigned ints.
MAX_COUNT = 1 << 32
# An address that the kernel takes from nobody.
KERNEL_ADDRESS = 0xFFFFFFFFFFFFF000

# Where in a thread's scratch memory the strings of one call lie.
STRINGS = 8192
STRING_ROOM = 4352


class Refused(Exception):
    """An argument ends the call before it is made, with this errno."""

    def __init__(self, errno: int) -> None:
        super().__init__()
        self.errno = errno


def signed(value: int) -> int:
    """A register as C's int."""
    value &= INT
    return value - (1 << 32) if value & 1 << 31 else value


def descriptor(thread: Thread, value: int) -> int:
    """A descriptor of the payload; raises Refused for any other."""
    fd = value & INT
    if fd >= thread.process.floor:
        raise Refused(EBADF)
    return fd


def directory(thread: Thread, value: int) -> int:
    """A directory descriptor of the payload, or AT_FDCWD; raises Refused for any other."""
    fd = value & 0xFFFFFFFF
    if fd >= thread.process.floor:
        if fd == AT_FDCWD:
            return -100
        raise Refused(EBADF)
    return fd


def path(thread: Thread, address: int, place: int = 0) -> int:
    """Host address of a copy of a path; `place` counts the strings of one call."""
    text = thread.process.memory.string(address)
    if len(text) > 4095:
        raise Refused(ENAMETOOLONG)
    if text.startswith(b"/proc/"):
        text = procfs.rename(thread.process, text)
    return thread.scratch.put(text + b"\0", STRINGS + place * STRING_ROOM)


def string(thread: Thread, address: int, place: int = 0) -> int:
    """The same for a string that is no path."""
    text = thread.process.memory.string(address, 4096)
    if len(text) > 4095:
        raise Refused(ENAMETOOLONG)
    return thread.scratch.put(text + b"\0", STRINGS + place * STRING_ROOM)


def buffer(thread: Thread, address: int, size: int, prot: int) -> int:
    """Host address of a buffer of the payload.

    Where its pages do not lie together on the host, a bounce buffer stands for it until `settle`.
    What of it is not accessible is not accessible at the host address either, so the kernel goes
    as far as it would, and fails with EFAULT where it would.
    """
    if not size:
        return 0
    if address >= TASK_SIZE:
        return KERNEL_ADDRESS
    size = min(size, MAX_COUNT)
    memory = thread.process.memory
    try:
        place = memory.host(address, size, prot)
    except Fault:
        place = 0
    if place:
        return place
    good = sum(length for _, length in memory.reach(address, size, prot))
    if not good:
        return memory.hole()
    # The good part ends with a page, and so does the bounce buffer's.
    skip = address & 4095
    data = memory.read(address, good)
    bounce = hostcall.Scratch((skip + good + 4095) & -4096, (skip + size + 4095) & -4096)
    bounce.view[skip : skip + good] = data
    thread.bounces.append((address, good, prot, bounce))
    return bounce.address + skip


def whole(thread: Thread, address: int, size: int, prot: int) -> int:
    """The same for calls that look at the range first: all of it must be in user space."""
    return KERNEL_ADDRESS if address + size > TASK_SIZE else buffer(thread, address, size, prot)


def settle(thread: Thread, keep: bool = True) -> None:
    """Copy bounce buffers back to where they belong, if `keep`, and drop them."""
    bounces, thread.bounces = thread.bounces, []
    for address, size, prot, bounce in bounces:
        skip = address & 4095
        try:
            if keep and prot & 2:
                thread.process.memory.write(address, bounce.view[skip : skip + size])
        except Fault:
            # Another thread unmapped it meanwhile.
            pass
        bounce.release()


def timespec(thread: Thread, address: int) -> int | None:
    """Nanoseconds of a struct timespec; None for NULL; raises Fault or Refused(EINVAL)."""
    if not address:
        return None
    seconds, nanoseconds = struct.unpack("<qq", thread.process.memory.read(address, 16))
    if seconds < 0 or not 0 <= nanoseconds < SECOND:
        raise Refused(EINVAL)
    return min(int(seconds) * SECOND + int(nanoseconds), 1 << 62)


def within(thread: Thread, fd: int) -> int:
    """A call's new descriptor, or its error; EMFILE where it lies among the monitor's."""
    if fd >= thread.process.floor:
        hostcall.call(3, fd)
        return -EMFILE
    return fd
