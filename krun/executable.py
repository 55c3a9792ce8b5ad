"""What a program file is, from its first bytes: ELF, script, snapshot, or nothing that runs."""

from __future__ import annotations

import os

from krun.record import Record

# Linux reads this much to decide (BINPRM_BUF_SIZE, execve(2)).
HEAD_SIZE = 256
# Interpreters of interpreters that Linux follows.
DEPTH_MAX = 5

ET_EXEC, ET_DYN, ET_CORE = 2, 3, 4
EM_X86_64 = 62
PT_INTERP = 3


class Program(Record):
    """`kind`: elf, snapshot (ET_CORE), script or unknown; `why` explains unknown."""

    kind: str
    why: str = ""
    interpreter: str = ""
    argument: str = ""
    dynamic: bool = False


def _elf(fd: int, head: bytes) -> Program:
    if len(head) < 64:
        return Program("unknown", "its ELF header is cut short")
    if head[4] != 2 or head[5] != 1:
        return Program("unknown", "it is not a 64-bit little-endian ELF file")
    machine = int.from_bytes(head[18:20], "little")
    if machine != EM_X86_64:
        return Program("unknown", f"it is for another processor (ELF machine {machine})")
    elf_type = int.from_bytes(head[16:18], "little")
    if elf_type == ET_CORE:
        return Program("snapshot")
    if elf_type not in (ET_EXEC, ET_DYN):
        return Program("unknown", f"its ELF type {elf_type} is not a program's")
    offset = int.from_bytes(head[32:40], "little")
    size = int.from_bytes(head[54:56], "little")
    count = int.from_bytes(head[56:58], "little")
    if size != 56 or offset > 1 << 62:
        return Program("unknown", "its ELF program headers are damaged")
    table = os.pread(fd, size * count, offset)
    if len(table) != size * count:
        return Program("unknown", "its ELF program headers are cut short")
    for start in range(0, len(table), size):
        if int.from_bytes(table[start : start + 4], "little") == PT_INTERP:
            return Program("elf", dynamic=True)
    return Program("elf")


def _script(head: bytes) -> Program:
    line, newline, _ = head[2:].partition(b"\n")
    if not newline and len(head) >= HEAD_SIZE:
        return Program("unknown", "its #! line is too long")
    words = line.strip(b" \t").split(None, 1)
    if not words:
        return Program("unknown", "its #! line names no interpreter")
    argument = words[1].strip(b" \t") if len(words) > 1 else b""
    return Program("script", interpreter=os.fsdecode(words[0]), argument=os.fsdecode(argument))


def inspect(fd: int) -> Program:
    """Tell what the open regular file fd is; raises OSError."""
    head = os.pread(fd, HEAD_SIZE, 0)
    if head[:4] == b"\x7fELF":
        return _elf(fd, head)
    if head[:2] == b"#!":
        return _script(head)
    if not head:
        return Program("unknown", "it is empty")
    return Program("unknown", "it is neither an ELF file nor a #! script")
