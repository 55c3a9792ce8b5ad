"""System calls on descriptors and paths that need more than checked arguments."""

from __future__ import annotations

import os
import struct

from krun.monitor.builtin import arguments, procfs
from krun.monitor.builtin.arguments import (
    INT,
    STRINGS,
    buffer,
    descriptor,
    settle,
    signed,
    within,
)
from krun.monitor.builtin.blocking import can_interrupt, interruptible
from krun.monitor.builtin.hostcall import call

TYPE_CHECKING = False
if TYPE_CHECKING:
    from krun.monitor.builtin.thread import Thread

EACCES, EINVAL = 13, 22
O_NONBLOCK = 0o4000


def _open(thread: Thread, directory: int, path: int, flags: int, mode: int) -> int:
    flags &= INT
    # O_LARGEFILE is implied; O_PATH of a link to the monitor's files leads nowhere useful.
    if not flags & O_NONBLOCK and can_interrupt(thread) and _is_fifo(thread, directory, path):
        fd = interruptible(thread, 257, directory, path, flags, mode)
    else:
        fd = call(257, directory, path, flags, mode)
    if fd == -EACCES:
        text = bytes(thread.scratch.view[STRINGS : STRINGS + 64]).split(b"\0", 1)[0]
        return procfs.refused(thread.process, text, flags)
    if fd < 0:
        return fd
    return procfs.opened(thread, fd, flags)


def _is_fifo(thread: Thread, directory: int, path: int) -> bool:
    result = call(262, directory, path, thread.scratch.address + 1024, 0)
    mode: int = struct.unpack_from("<I", thread.scratch.view, 1024 + 24)[0]
    return result == 0 and mode & 0o170000 == 0o010000


def sys_open(thread: Thread, path: int, flags: int, mode: int) -> int:
    return _open(thread, -100, arguments.path(thread, path), flags, mode)


def sys_creat(thread: Thread, path: int, mode: int) -> int:
    return _open(thread, -100, arguments.path(thread, path), 0o1101, mode)


def sys_openat(thread: Thread, directory: int, path: int, flags: int, mode: int) -> int:
    directory = arguments.directory(thread, directory)
    return _open(thread, directory, arguments.path(thread, path), flags, mode)


def sys_openat2(thread: Thread, directory: int, path: int, how: int, size: int) -> int:
    directory = arguments.directory(thread, directory)
    if size < 24:
        return -EINVAL
    if size > 4096:
        return -7
    data = thread.process.memory.read(how, size)
    name = arguments.path(thread, path)
    place = thread.scratch.put(data, 24576)
    fd = call(437, directory, name, place, size)
    if fd < 0:
        return fd
    return procfs.opened(thread, fd, int.from_bytes(data[:8], "little"))


def sys_close(thread: Thread, fd: int) -> int:
    return call(3, descriptor(thread, fd))


def sys_close_range(thread: Thread, first: int, last: int, flags: int) -> int:
    first &= INT
    last &= INT
    # CLOSE_RANGE_UNSHARE (2) would part this thread's descriptors from the monitor's others.
    flags &= ~2
    if first > last:
        return -EINVAL
    if first >= thread.process.floor:
        return 0
    return call(436, first, min(last, thread.process.floor - 1), flags)


def sys_dup2(thread: Thread, old: int, new: int) -> int:
    return call(33, descriptor(thread, old), descriptor(thread, new))


def sys_dup3(thread: Thread, old: int, new: int, flags: int) -> int:
    return call(292, descriptor(thread, old), descriptor(thread, new), flags)


F_DUPFD, F_DUPFD_CLOEXEC = 0, 1030
F_SIMPLE = frozenset((1, 2, 3, 4, 8, 9, 10, 11, 1024, 1025, 1026, 1031, 1032, 1033, 1034))
F_LOCKS = frozenset((5, 6, 36, 37))
F_WAITING_LOCKS = frozenset((7, 38))
LOCK_NB = 4
F_OWNER_EX = {15: 1, 16: 2}


def sys_fcntl(thread: Thread, fd: int, command: int, argument: int) -> int:
    fd = descriptor(thread, fd)
    command &= INT
    if command in (F_DUPFD, F_DUPFD_CLOEXEC):
        if argument & INT >= thread.process.floor:
            return -EINVAL
        return within(thread, call(72, fd, command, argument))
    if command in F_SIMPLE:
        return call(72, fd, command, argument)
    if command in F_WAITING_LOCKS:
        return interruptible(thread, 72, fd, command, buffer(thread, argument, 32, 3))
    if command in F_LOCKS:
        return call(72, fd, command, buffer(thread, argument, 32, 3))
    if command in F_OWNER_EX:
        return call(72, fd, command, buffer(thread, argument, 8, F_OWNER_EX[command]))
    if command in (1035, 1036, 1037, 1038):
        return call(72, fd, command, buffer(thread, argument, 8, 3))
    return -EINVAL


def sys_flock(thread: Thread, fd: int, operation: int) -> int:
    fd = descriptor(thread, fd)
    if operation & LOCK_NB:
        return call(73, fd, operation)
    return interruptible(thread, 73, fd, operation)


def sys_readlink(thread: Thread, path: int, address: int, size: int) -> int:
    return _readlink(thread, -100, path, address, size)


def sys_readlinkat(thread: Thread, directory: int, path: int, address: int, size: int) -> int:
    return _readlink(thread, arguments.directory(thread, directory), path, address, size)


def _readlink(thread: Thread, directory: int, path: int, address: int, size: int) -> int:
    size = signed(size)
    if size <= 0:
        return -EINVAL
    process = thread.process
    text = process.memory.string(path)
    answer = procfs.link(process, text)
    if answer is not None:
        answer = answer[:size]
        process.memory.write(address, answer)
        return len(answer)
    place = buffer(thread, address, size, 2)
    return call(267, directory, arguments.path(thread, path), place, size)


def sys_getdents64(thread: Thread, fd: int, address: int, size: int) -> int:
    fd = descriptor(thread, fd)
    size &= INT
    place = buffer(thread, address, size, 2)
    while True:
        result = call(217, fd, place, size)
        if result <= 0:
            return result
        # /proc/self/fd lists the monitor's descriptors too.
        if not _lists_descriptors(fd):
            return result
        if thread.bounces:
            settle(thread)
            place = buffer(thread, address, size, 2)
        kept = _payload_entries(thread.process.memory.read(address, result), thread.process.floor)
        if kept:
            thread.process.memory.write(address, kept)
            if thread.bounces:
                settle(thread, False)
            return len(kept)


def _lists_descriptors(fd: int) -> bool:
    try:
        path = os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return False
    return path.startswith("/proc/") and path.endswith(("/fd", "/fdinfo"))


def _payload_entries(data: bytes, floor: int) -> bytes:
    kept = bytearray()
    offset = 0
    while offset < len(data):
        size = struct.unpack_from("<H", data, offset + 16)[0]
        name = data[offset + 19 : data.index(b"\0", offset + 19)]
        if not (name.isdigit() and int(name) >= floor):
            kept += data[offset : offset + size]
        offset += size
    return bytes(kept)
