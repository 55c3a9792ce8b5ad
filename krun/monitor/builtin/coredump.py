"""A core file of the payload, for gdb: its areas, its registers, its auxiliary vector."""

from __future__ import annotations

import os
import struct

from krun.monitor.builtin import cpu
from krun.monitor.builtin.areas import Fault

TYPE_CHECKING = False
if TYPE_CHECKING:
    from krun.monitor.builtin.process import Process
    from krun.monitor.builtin.thread import Thread

NT_PRSTATUS, NT_AUXV = 1, 6
# struct user_regs_struct's order as indexes of kvm_regs; -1 is orig_rax.
USER_REGS = (15, 14, 13, 12, 7, 1, 11, 10, 9, 8, 0, 2, 3, 4, 5, -1, 16)


def _note(kind: int, data: bytes) -> bytes:
    return (
        struct.pack("<III", 5, len(data), kind)
        + b"CORE\0\0\0\0"
        + data.ljust((len(data) + 3) & -4, b"\0")
    )


def prstatus(tid: int, signal: int, regs: list[int], fs_base: int, gs_base: int) -> bytes:
    """struct elf_prstatus of a thread."""
    words = [regs[index] if index >= 0 else (1 << 64) - 1 for index in USER_REGS]
    words += [cpu.USER_CS, regs[17], regs[6], cpu.USER_DS, fs_base, gs_base, 0, 0, 0, 0]
    head = struct.pack("<iiihxxQQiiii", signal, 0, 0, signal, 0, 0, tid, 0, 0, 0) + bytes(64)
    return head + struct.pack("<27Q", *words) + struct.pack("<i4x", 0)


def write(process: Process, thread: Thread, signal: int, context: list[int]) -> None:
    """Write the core file that was asked for; a failure is a log line, and leaves no file."""
    path = str(process.settings.coredump)
    if os.path.exists(path) and not os.path.isfile(path):
        # /dev/null, by which km is told to write none, must not be replaced by a file.
        return
    partial = f"{path}.{process.memory.pid}.partial"
    try:
        fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        process.say(f"core file {path}: {error.strerror}")
        return
    try:
        with os.fdopen(fd, "wb") as file:
            _write(process, thread, signal, context, file.write)
            file.flush()
            os.fsync(file.fileno())
        os.rename(partial, path)
    except OSError as error:
        process.say(f"core file {path}: {error.strerror}")
        try:
            os.unlink(partial)
        except OSError:
            return


def _write(process, thread, signal, context, put) -> None:  # type: ignore[no-untyped-def]
    memory = process.memory
    areas = [area for area in memory.areas if area.prot and area.slot is not None]
    fs_base, gs_base = thread.base(cpu.S_FS), thread.base(cpu.S_GS)
    notes = _note(NT_PRSTATUS, prstatus(thread.tid, signal, context, fs_base, gs_base))
    vector = b"".join(struct.pack("<QQ", *pair) for pair in (*process.auxiliary, (0, 0)))
    notes += _note(NT_AUXV, vector)
    start = 64 + 56 * (len(areas) + 1)
    put(
        b"\x7fELF\x02\x01\x01"
        + bytes(9)
        + struct.pack("<HHIQQQIHHHHHH", 4, 62, 1, 0, 64, 0, 0, 64, 56, len(areas) + 1, 0, 0, 0)
    )
    put(struct.pack("<IIQQQQQQ", 4, 0, start, 0, 0, len(notes), 0, 4))
    offset = (start + len(notes) + 4095) & -4096
    first = offset
    for area in areas:
        size = area.end - area.start
        flags = (area.prot >> 2 & 1) | (area.prot & 2) | (area.prot << 2 & 4)
        put(struct.pack("<IIQQQQQQ", 1, flags, offset, area.start, 0, size, size, 4096))
        offset += size
    put(notes + bytes(first - start - len(notes)))
    for area in areas:
        for address in range(area.start, area.end, 1 << 20):
            size = min(1 << 20, area.end - address)
            try:
                put(memory.read(address, size))
            except Fault:
                put(bytes(size))
