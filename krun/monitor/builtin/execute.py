"""execve(2) and execveat(2): the arguments are read, the first host thread does the rest."""

from __future__ import annotations

import os
import struct

from krun.monitor.builtin import arguments
from krun.monitor.builtin.areas import Fault
from krun.monitor.builtin.arguments import INT
from krun.monitor.builtin.elf import BadExecutable
from krun.monitor.builtin.hostcall import call
from krun.monitor.builtin.procfs import rename
from krun.monitor.builtin.program import open_program
from krun.monitor.builtin.thread import Thread, ThreadExit

E2BIG, EBADF, EACCES, EINVAL = 7, 9, 13, 22

MAX_STRING = 32 * 4096


def sys_execve(thread: Thread, path: int, argv: int, environ: int) -> int:
    text = rename(thread.process, thread.process.memory.string(path))
    return _execute(thread, text, argv, environ)


def sys_execveat(
    thread: Thread, directory: int, path: int, argv: int, environ: int, flags: int
) -> int:
    directory = arguments.directory(thread, directory)
    text = rename(thread.process, thread.process.memory.string(path))
    flags &= INT
    if flags & ~0x1100:
        return -EINVAL
    if not text:
        if not flags & 0x1000:
            return -2
        text = b"/proc/self/fd/%d" % directory
    elif directory != -100 and not text.startswith(b"/"):
        if call(72, directory, 1) < 0:
            return -EBADF
        text = b"/proc/self/fd/%d/%s" % (directory, text)
    return _execute(thread, text, argv, environ)


def _strings(thread: Thread, address: int) -> list[bytes]:
    memory = thread.process.memory
    strings: list[bytes] = []
    if not address:
        return strings
    total = 0
    while True:
        pointer = struct.unpack("<Q", memory.read(address, 8))[0]
        if not pointer:
            return strings
        text = memory.string(pointer, MAX_STRING + 1)
        if len(text) > MAX_STRING:
            raise OverflowError
        strings.append(text)
        total += len(text) + 9
        if total > 2 << 20:
            raise OverflowError
        address += 8


def _execute(thread: Thread, path: bytes, argv: int, environ: int) -> int:
    process = thread.process
    try:
        arguments = _strings(thread, argv) or [b""]
        environment = _strings(thread, environ)
    except (OverflowError, Fault) as error:
        # A file that cannot be opened goes first.
        result = _openable(path)
        if result < 0 or isinstance(error, OverflowError):
            return result or -E2BIG
        raise
    try:
        program, interpreter, arguments = open_program(path, arguments)
    except OSError as error:
        return -(error.errno or EACCES)
    except BadExecutable as error:
        return -error.errno
    with process.lock:
        if process.ending:
            # Another thread executes already, and ends this one.
            os.close(program.fd)
            if interpreter is not None:
                os.close(interpreter.fd)
            raise ThreadExit
        # In this order: a thread that ends because of the one must find the other.
        process.successor = (program, interpreter, arguments, environment, path, thread.mask)
        process.ending = True
    for other in list(process.threads.values()):
        if other is not thread:
            other.attention = True
            process.kick(other)
    # The first host thread makes the new VM once all payload threads are gone.
    raise ThreadExit


def _openable(path: bytes) -> int:
    """0, or the negative errno with which executing a file would fail before it is read."""
    try:
        program, interpreter, _ = open_program(path, [b""])
    except OSError as error:
        return -(error.errno or EACCES)
    except BadExecutable:
        return 0
    os.close(program.fd)
    if interpreter is not None:
        os.close(interpreter.fd)
    return 0
