"""What a payload may see of /proc: its own program, never its monitor.

The monitor's process stands where the payload's would be, so /proc/self/mem is the monitor's
memory and /proc/self/exe the host's Python.  Names that are plainly meant are answered with the
payload's own facts; and whatever was opened is looked at again by descriptor, so links, relative
paths and races lead to the same answer.
"""

from __future__ import annotations

import os
import stat
import struct

from krun.monitor.builtin import hostcall

TYPE_CHECKING = False
if TYPE_CHECKING:
    from krun.monitor.builtin.process import Process
    from krun.monitor.builtin.thread import Thread

EACCES, EPERM, ENOENT = 13, 1, 2
PROC_SUPER_MAGIC = 0x9FA0
KVM_DEVICE = os.makedev(10, 232)

# They show, or change, the monitor's memory.
HIDDEN = frozenset((b"mem", b"pagemap", b"smaps", b"numa_maps", b"kcore", b"stack", b"syscall"))
ANSWERED = frozenset((b"maps", b"cmdline", b"environ", b"auxv"))

_proc_devices: dict[int, bool] = {}


def _own(process: Process, word: bytes) -> bool:
    if word in (b"self", b"thread-self"):
        return True
    if not word.isdigit():
        return False
    number = int(word)
    return number == process.memory.pid or number in process.threads


def rename(process: Process, path: bytes) -> bytes:
    """The path to use for one under /proc: /proc/self/exe is the payload's file."""
    parts = path.split(b"/")
    if len(parts) == 4 and parts[3] == b"exe" and _own(process, parts[2]):
        return process.path
    if len(parts) == 5 and parts[3] == b"fd" and parts[4].isdigit():
        number = int(parts[4])
        if number >= process.floor:
            return b"/proc/self/fd/-"
    return path


def link(process: Process, path: bytes) -> bytes | None:
    """What readlink(2) of a path tells instead of the kernel; None when the kernel may."""
    parts = path.split(b"/")
    if len(parts) == 4 and parts[1] == b"proc" and parts[3] == b"exe" and _own(process, parts[2]):
        return process.path
    return None


def titles() -> tuple[int, int, int, int]:
    """Where the process's arguments and environment lie: start, end, start, end; zeros if unknown.

    proc_pid_stat(5), fields 48 to 51.
    """
    try:
        with open("/proc/self/stat", "rb") as file:
            fields = file.read().rsplit(b")", 1)[1].split()
        first, last, start, end = (int(word) for word in fields[45:49])
    except (OSError, IndexError, ValueError):
        return (0, 0, 0, 0)
    return first, last, start, end


def retitle(places: tuple[int, int, int, int], arguments: list[bytes]) -> None:
    """Show the payload's command line to ps, as far as it fits, and krun's environment to nobody.

    No execve ever replaces them, and the environment is that of whoever called krun.
    """
    first, last, start, end = places
    if last > first:
        text = b"\0".join(arguments)[: last - first - 1]
        hostcall.view(first, last - first)[:] = text.ljust(last - first, b"\0")
    if end > start:
        hostcall.view(start, end - start)[:] = bytes(end - start)


def opened(thread: Thread, fd: int, flags: int) -> int:
    """Judge a file the payload just opened: fd, another one in its place, or a negative errno."""
    process = thread.process
    if fd >= process.floor:
        os.close(fd)
        return -24
    try:
        status = os.fstat(fd)
    except OSError:
        return fd
    mode = status.st_mode
    if stat.S_ISCHR(mode):
        if status.st_rdev in (KVM_DEVICE, process.device_number):
            os.close(fd)
            return -EPERM
        return fd
    if (status.st_dev, status.st_ino) == process.hidden_file:
        os.close(fd)
        return -EACCES
    if not stat.S_ISREG(mode):
        return fd
    known = _proc_devices.get(status.st_dev)
    if known is None:
        scratch = thread.scratch
        result = hostcall.call(138, fd, scratch.address)
        kind = struct.unpack_from("<Q", scratch.view, 0)[0] if result == 0 else 0
        known = _proc_devices[status.st_dev] = kind == PROC_SUPER_MAGIC
    if not known:
        return fd
    return _judge(process, fd, flags)


def _judge(process: Process, fd: int, flags: int) -> int:
    try:
        path = os.readlink(b"/proc/self/fd/%d" % fd)
    except OSError:
        path = b""
    name = path.rsplit(b"/", 1)[-1]
    if path.count(b"/") < 2 or name in HIDDEN:
        os.close(fd)
        return -EACCES
    if name not in ANSWERED:
        return fd
    parts = path.split(b"/")
    owner = parts[-4] if parts[-3] == b"task" else parts[-2]
    if not _own(process, owner):
        if name in (b"maps", b"auxv") and owner.isdigit():
            os.close(fd)
            return -EACCES
        return fd
    os.close(fd)
    return _answer(process, name, flags)


def refused(process: Process, path: bytes, flags: int) -> int:
    """Answer for an own file of /proc that only root may open: the monitor is not dumpable."""
    parts = path.split(b"/")
    if (
        len(parts) == 4
        and parts[1] == b"proc"
        and parts[3] in ANSWERED
        and not flags & os.O_ACCMODE
        and _own(process, parts[2])
    ):
        return _answer(process, parts[3], flags)
    return -EACCES


def _answer(process: Process, name: bytes, flags: int) -> int:
    if name == b"maps":
        content = process.memory.maps().encode("utf-8", "surrogateescape")
    elif name == b"cmdline":
        content = b"".join(word + b"\0" for word in process.arguments)
    elif name == b"environ":
        content = b"".join(word + b"\0" for word in process.environment)
    else:
        content = b"".join(struct.pack("<QQ", *pair) for pair in (*process.auxiliary, (0, 0)))
    answer = os.memfd_create(name.decode(), os.MFD_CLOEXEC if flags & os.O_CLOEXEC else 0)
    os.write(answer, content)
    os.lseek(answer, 0, os.SEEK_SET)
    return answer
