"""Executable files: opening a program, its interpreter, or what its `#!` line names."""

from __future__ import annotations

import os

from krun.monitor.builtin import elf
from krun.monitor.builtin.elf import PAGE, BadExecutable, Image, Script

ELOOP, EACCES = 40, 13


class Program:
    """A file that was opened, read and found executable."""

    def __init__(self, path: bytes, fd: int, image: Image) -> None:
        self.path = path
        self.fd = fd
        self.image = image


def open_program(path: bytes, argv: list[bytes]) -> tuple[Program, Program | None, list[bytes]]:
    """The program at path, its interpreter, and the arguments that a script's line makes of argv.

    Raises OSError or BadExecutable, as execve(2) would fail.
    """
    for _ in range(5):
        fd, head, size = _open_executable(path)
        try:
            found = elf.parse(head, size)
        except BadExecutable:
            os.close(fd)
            raise
        if isinstance(found, Script):
            os.close(fd)
            extra = [found.argument] if found.argument else []
            argv = [found.interpreter, *extra, path, *argv[1:]]
            path = found.interpreter
            continue
        program = Program(path, fd, found)
        if not found.interpreter:
            return program, None, argv
        try:
            fd, head, size = _open_executable(found.interpreter)
            inner = elf.parse(head, size)
            if isinstance(inner, Script) or inner.interpreter:
                os.close(fd)
                raise BadExecutable("its interpreter is no plain ELF file")
        except OSError:
            os.close(program.fd)
            raise
        return program, Program(found.interpreter, fd, inner), argv
    raise OSError(ELOOP, os.strerror(ELOOP), os.fsdecode(path))


def _open_executable(path: bytes) -> tuple[int, bytes, int]:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        status = os.fstat(fd)
        if status.st_mode & 0o170000 != 0o100000:
            raise OSError(EACCES, os.strerror(EACCES), os.fsdecode(path))
        if not os.access(path, os.X_OK, effective_ids=True):
            raise OSError(EACCES, os.strerror(EACCES), os.fsdecode(path))
        return fd, os.pread(fd, PAGE, 0), status.st_size
    except BaseException:
        os.close(fd)
        raise
