"""The warm start: a program that is a started interpreter with krun's modules loaded.

An interpreter's start and the import of modules take 8 ms of a verb, and what they leave in memory
is the same each time.  So krun install writes it to an ELF file (elf(5)) once: every mapping of a
process that has come so far (krun.install.seed) becomes a segment at its own address.  The kernel
maps the file; only pages that a verb touches are read, only those it writes are copied.

    seed process  ->  mappings, less the kernel's own  ->  pointers into these moved  ->  ELF file

The file runs where it was made.  It knows the processor (krun.install.wake) and the interpreter's
files (krun.install.seed); where one of them differs, it executes the plain interpreter instead,
and so does the launcher where there is no file.
"""

from __future__ import annotations

import json
import os
import platform
import re
import select
import shutil
import signal
import struct
import subprocess
import tempfile
import time
from pathlib import Path

from krun.errors import KrunError
from krun.install import wake
from krun.install.seed import ROOM
from krun.linux import libc
from krun.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

NAME = "warm/krun"
# Beside it: what it was made from.
FACTS = "warm/facts.json"
_PAGE = 4096
_BLOCK = 1 << 16
# Above it the kernel may put a new process's stack, wherever else it puts the rest
# (arch/x86/mm/mmap.c: 16 GiB of random places and a gap below the end of the address space).
HIGHEST = 0x7FFB_F800_0000
# struct pthread, in bytes: more than glibc has had so far.
_THREAD = 2560
_SECONDS = 30
# More of them than pages between two that are written, and the two are one range.
_GAPS = (0, 1, 2, 4, 8, 16)
# ptrace(2), madvise(2), proc_pid_pagemap(5)
_SYS_ptrace = 101
_SYS_madvise = 28
_PTRACE_TRACEME = 0
_PTRACE_CONT = 7
_PTRACE_SETOPTIONS = 0x4200
_PTRACE_O_TRACEEXIT = 0x40
_PTRACE_O_EXITKILL = 0x100000
_EVENT_EXIT = signal.SIGTRAP | 6 << 8
_MADV_POPULATE_WRITE = 23
_PRESENT = 1 << 63
_OF_A_FILE = 1 << 61
# How often it is tried before it is used: each time elsewhere in the address space.
_TRIALS = 10
_ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "LC_ALL": "C",
    "GLIBC_TUNABLES": "glibc.malloc.arena_max=1",
}
# Mappings that the kernel makes in every process, and those that move.
_KERNELS = ("[vvar]", "[vvar_vclock]", "[vsyscall]", "[uprobes]")
_MOVED = ("[vdso]", "[stack]")


class Unfit(KrunError):
    """No file can be made here; says why."""


class Mapping(Record):
    """A line of /proc/PID/maps (proc_pid_maps(5)): addresses, rwx flags as in elf(5), the name."""

    start: int
    end: int
    flags: int
    name: str


class Segment(Record):
    """A part of the new process's memory: its address, flags and content."""

    start: int
    flags: int
    content: bytearray


def mappings(text: str) -> list[Mapping]:
    """Return the mappings of /proc/PID/maps."""
    found = []
    for line in text.splitlines():
        fields = line.split(None, 5)
        start, _, end = fields[0].partition("-")
        flags = sum(bit for bit, letter in ((4, "r"), (2, "w"), (1, "x")) if letter in fields[1])
        name = fields[5] if len(fields) > 5 else ""
        found.append(Mapping(int(start, 16), int(end, 16), flags, name))
    return found


def functions(vdso: bytes) -> dict[int, str]:
    """Return the names of a vDSO's functions by their offset; __vdso_ is left out."""
    table = struct.unpack_from("<Q", vdso, 40)[0]
    count = struct.unpack_from("<H", vdso, 60)[0]
    sections = [struct.unpack_from("<IIQQQQIIQQ", vdso, table + 64 * i) for i in range(count)]
    found = {}
    for _, kind, _, _, offset, size, link, _, _, _ in sections:
        if kind != 11:  # SHT_DYNSYM
            continue
        names = sections[link][4]
        for place in range(offset, offset + size, 24):
            name, info, _, _, value, _ = struct.unpack_from("<IBBHQQ", vdso, place)
            if info & 15 == 2:  # STT_FUNC
                end = vdso.index(b"\0", names + name)
                found[value] = vdso[names + name : end].decode().removeprefix("__vdso_")
    return found


def pointers(content: bytes | bytearray, start: int, end: int) -> list[int]:
    """Return where in memory there are aligned words that point into [start, end)."""
    found = []
    # All but the lowest two bytes are the same in each stretch of 64 KiB.
    for high in range(start >> 16, (end - 1 >> 16) + 1):
        for match in re.finditer(re.escape(high.to_bytes(6, "little")), content):
            place = match.start() - 2
            if (
                place % 8 == 0
                and start <= int.from_bytes(content[place : place + 8], "little") < end
            ):
                found.append(place)
    return found


class Memory:
    """The segments of the file to be."""

    def __init__(self, segments: list[Segment]) -> None:
        self.segments = segments

    def _find(self, address: int) -> tuple[bytearray, int]:
        for segment in self.segments:
            if segment.start <= address < segment.start + len(segment.content):
                return segment.content, address - segment.start
        raise Unfit(f"the seed has no memory at {address:#x}")

    def read(self, address: int, size: int) -> bytes:
        """Return bytes at an address."""
        content, place = self._find(address)
        return bytes(content[place : place + size])

    def write(self, address: int, data: bytes) -> None:
        """Put bytes at an address."""
        content, place = self._find(address)
        content[place : place + len(data)] = data

    def word(self, address: int) -> int:
        """Return the 8-byte word at an address."""
        return int.from_bytes(self.read(address, 8), "little")

    def set_word(self, address: int, value: int) -> None:
        """Put an 8-byte word at an address."""
        self.write(address, value.to_bytes(8, "little"))

    def move(self, start: int, content: bytes, place: int, known: dict[int, int]) -> None:
        """Put content that was at `start` elsewhere; pointers to it follow.

        A pointer to an offset in `known` becomes the address there instead.
        """
        self.write(place, content)
        end = start + len(content)
        for segment in self.segments:
            if segment.flags & 1:
                continue
            for at in pointers(segment.content, start, end):
                offset = int.from_bytes(segment.content[at : at + 8], "little") - start
                target = known.get(offset, place + offset)
                segment.content[at : at + 8] = target.to_bytes(8, "little")


def elf(segments: Sequence[Segment], entry: int) -> tuple[bytes, list[int]]:
    """Return an executable's headers, and where in the file each segment's content belongs."""
    count = len(segments) + 1
    place = -(-(64 + 56 * count) // _PAGE) * _PAGE
    places = []
    headers = []
    for segment in segments:
        size = len(segment.content)
        # PT_LOAD: file offset, virtual and physical address, sizes, alignment.
        fields = (1, segment.flags, place, segment.start, segment.start, size, size, _PAGE)
        headers.append(struct.pack("<IIQQQQQQ", *fields))
        places.append(place)
        place += size
    # PT_GNU_STACK: readable, writable, not executable.
    headers.append(struct.pack("<IIQQQQQQ", 0x6474E551, 6, 0, 0, 0, 0, 0, 16))
    head = b"\x7fELF\x02\x01\x01" + bytes(9)
    # ET_EXEC, EM_X86_64
    head += struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, entry, 64, 0, 0, 64, 56, count, 0, 0, 0)
    return head + b"".join(headers), places


def _filled(content: bytearray) -> list[tuple[int, int]]:
    """Return where content is not zeros, in stretches of whole blocks; the rest becomes holes."""
    found: list[tuple[int, int]] = []
    for first in range(0, len(content), _BLOCK):
        last = min(first + _BLOCK, len(content))
        if content.count(0, first, last) == last - first:
            continue
        start = found.pop()[0] if found and found[-1][1] == first else first
        found.append((start, last))
    return found


def _write(path: Path, segments: Sequence[Segment], entry: int) -> None:
    head, places = elf(segments, entry)
    with path.open("wb") as file:
        file.write(head)
        for segment, place in zip(segments, places, strict=True):
            content = segment.content
            for first, last in _filled(content):
                file.seek(place + first)
                # In one piece: the page cache keeps it in large folios, which are mapped at once.
                file.write(memoryview(content)[first:last])
            end = place + len(content)
        file.truncate(end)
        file.flush()
        os.fsync(file.fileno())
    path.chmod(0o755)


def _copied(pid: int, base: int, found: Sequence[Mapping]) -> Memory:
    """Return the memory of a resting process, such that another one can live in it."""
    segments = []
    moved: dict[str, tuple[int, bytes]] = {}
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for one in found:
            # What nobody can read is a guard page.
            if one.name in _KERNELS or not one.flags & 4:
                continue
            memory.seek(one.start)
            content = memory.read(one.end - one.start)
            if one.name in _MOVED:
                moved[one.name] = (one.start, content)
                continue
            if one.end > HIGHEST:
                raise Unfit("this process's address space is not laid out at random (setarch -R)")
            segments.append(Segment(one.start, one.flags, bytearray(content)))
    result = Memory(segments)
    place = base + wake.SIZE
    labels = wake.labels()
    for name, (start, content) in moved.items():
        named = functions(content).items() if name == "[vdso]" else ()
        known = {offset: base + labels[word] for offset, word in named if word in labels}
        result.move(start, content, place, known)
        place += len(content)
    if place > base + ROOM:
        raise Unfit("the first stack is larger than the room for it")
    return result


def _settle(memory: Memory, pid: int, base: int, break_: int, rseq: int) -> None:
    """Set what the kernel knows of a process and the C library remembers."""
    thread = memory.word(base + wake.THREAD)
    content = memory.read(thread, _THREAD)
    places = [
        i for i in range(0, len(content), 4) if content[i : i + 4] == pid.to_bytes(4, "little")
    ]
    if len(places) != 1:
        raise Unfit("the C library does not keep the thread's id as glibc does")
    memory.set_word(base + wake.TID, thread + places[0])
    # brk(2) begins elsewhere: the C library shall ask.
    memory.set_word(break_, 0)
    if rseq:
        # Not registered (rseq(2)): cpu_id_start, cpu_id = RSEQ_CPU_ID_REGISTRATION_FAILED.
        offset = struct.unpack("<q", memory.read(rseq, 8))[0]
        memory.write(thread + offset, struct.pack("<Ii", 0, -2))


def processor() -> str:
    """Return what /proc/cpuinfo says of the processor, less what changes."""
    with open("/proc/cpuinfo") as file:
        lines = file.read().partition("\n\n")[0].splitlines()
    wanted = ("vendor_id", "cpu family", "model", "model name", "stepping", "flags")
    return "\n".join(line for line in lines if line.partition("\t")[0].strip() in wanted)


def is_current(directory: str) -> bool:
    """Return whether a library's copy has a file that was made from what is here now."""
    try:
        with open(f"{directory}/{FACTS}") as file:
            facts = json.load(file)
        if not os.access(f"{directory}/{NAME}", os.X_OK) or facts["processor"] != processor():
            return False
        for path, size, time_ns in facts["files"]:
            status = os.stat(path)
            if (status.st_size, status.st_mtime_ns) != (size, time_ns):
                return False
    except (OSError, ValueError, KeyError):
        return False
    return True


def _line(process: subprocess.Popen[bytes], deadline: float) -> list[int]:
    """Return the numbers of the line that the seed prints when its child is about to rest."""
    assert process.stdout is not None
    ready, _, _ = select.select([process.stdout], [], [], deadline - time.monotonic())
    numbers = process.stdout.readline().split() if ready else []
    if len(numbers) != 4:
        process.kill()
        _, complaint = process.communicate()
        last = complaint.decode(errors="replace").strip().splitlines()[-1:] or ["it said nothing"]
        raise Unfit(f"the interpreter could not be prepared: {last[0]}")
    return [int(number) for number in numbers]


def _await_rest(pid: int, base: int, deadline: float) -> None:
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        while True:
            memory.seek(base + wake.READY)
            if memory.read(4) == b"\1\0\0\0":
                return
            if time.monotonic() > deadline:
                raise Unfit("the interpreter did not come to rest")
            time.sleep(0.001)


def ranges(pages: set[int], limit: int) -> list[tuple[int, int]]:
    """Return the first page and the number of pages of at most `limit` stretches with all pages."""
    for gap in _GAPS:
        found: list[list[int]] = []
        for page in sorted(pages):
            if found and page - sum(found[-1]) <= gap:
                found[-1][1] = page - found[-1][0] + 1
            else:
                found.append([page, 1])
        if len(found) <= limit:
            return [(start, count) for start, count in found]
    return []


def _written(pid: int, segments: Sequence[Segment]) -> set[int]:
    """Return the numbers of the pages of a process that are no longer the file's."""
    pages = set()
    with open(f"/proc/{pid}/pagemap", "rb") as file:
        for segment in segments:
            if segment.flags & 2:
                first, count = segment.start // _PAGE, len(segment.content) // _PAGE
                file.seek(first * 8)
                entries = struct.unpack(f"<{count}Q", file.read(count * 8))
                for page, entry in enumerate(entries, first):
                    if entry & _PRESENT and not entry & _OF_A_FILE:
                        pages.add(page)
    return pages


def _ptrace(request: int, pid: int, data: int = 0) -> None:
    libc.syscall(_SYS_ptrace, request, pid, 0, data)


def _traced(argv: list[str], segments: Sequence[Segment]) -> set[int]:
    """Run a command to its exit; returns the pages of the segments that it has written."""
    pid = os.fork()
    if pid == 0:
        try:
            null = os.open(os.devnull, os.O_RDWR)
            for descriptor in range(3):
                os.dup2(null, descriptor)
            _ptrace(_PTRACE_TRACEME, 0)
            os.execve(argv[0], argv, _ENVIRONMENT)
        finally:
            os._exit(127)
    pages: set[int] = set()
    begun = False
    while True:
        _, status = os.waitpid(pid, 0)
        if not os.WIFSTOPPED(status):
            return pages
        number = os.WSTOPSIG(status)
        if not begun:
            _ptrace(_PTRACE_SETOPTIONS, pid, _PTRACE_O_TRACEEXIT | _PTRACE_O_EXITKILL)
            begun, number = True, 0
        elif status >> 8 == _EVENT_EXIT:
            pages, number = _written(pid, segments), 0
        elif number == signal.SIGTRAP:
            number = 0
        _ptrace(_PTRACE_CONT, pid, number)


def _hot(
    program: str, words: Sequence[str], example: dict[str, Any], segments: Sequence[Segment]
) -> set[int]:
    """Return the pages that verbs write: of some that fail before they have made anything."""
    try:
        libc.syscall(_SYS_madvise, 0, 0, _MADV_POPULATE_WRITE)
    except OSError:
        # Before Linux 5.14.
        return set()
    with tempfile.TemporaryDirectory(prefix="krun-") as directory:
        os.mkdir(f"{directory}/rootfs")
        # There is no such program, which is found when all has been decided.
        config = {**example, "process": {**example["process"], "args": ["/nonesuch"]}}
        Path(f"{directory}/config.json").write_text(json.dumps(config))
        start = [program, "-", *words[1:], "--root", directory, "--mode", "all"]
        create = [*start, "create", "--bundle", directory, "nonesuch"]
        execute = [*start, "exec", "nonesuch", "true"]
        return _traced(create, segments) | _traced(execute, segments)


def _taken(seed: Sequence[str]) -> tuple[Memory, int, list[str]]:
    """Start the seed, take its child's memory, and end both.

    Returns the memory, where in it the code of krun.install.wake is, and the files it had mapped.
    """
    deadline = time.monotonic() + _SECONDS
    pipe = subprocess.PIPE
    with subprocess.Popen(
        seed, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, env=_ENVIRONMENT, cwd="/"
    ) as process:
        try:
            pid, base, break_, rseq = _line(process, deadline)
            if not break_:
                raise Unfit("the C library is not glibc")
            _await_rest(pid, base, deadline)
            with open(f"/proc/{pid}/maps") as file:
                found = mappings(file.read())
            memory = _copied(pid, base, found)
            _settle(memory, pid, base, break_, rseq)
        finally:
            # Its child ends with it.
            process.kill()
    return memory, base, sorted({one.name for one in found if one.name.startswith("/")})


def _make(memory: Memory, base: int, path: Path, words: Sequence[str], example: Any) -> None:
    """Write the file, find out which pages are written, and write it with them."""
    entry = base + wake.labels()["wake"]
    _write(path, memory.segments, entry)
    pages = _hot(str(path), words, example, memory.segments)
    table = ranges(pages, wake.HOT_RANGES - 1)
    for i, (start, count) in enumerate(table):
        memory.set_word(base + wake.HOT + 16 * i, start * _PAGE)
        memory.set_word(base + wake.HOT + 16 * i + 8, count * _PAGE)
    _write(path, memory.segments, entry)


def _try(program: str, words: Sequence[str]) -> None:
    """Raise Unfit unless the file answers as the plain interpreter does, every time."""
    expected = subprocess.run([*words, "--version"], capture_output=True, env=_ENVIRONMENT)
    # "-": nothing that it could execute instead.
    trial = [program, "-", *words[1:], "--version"]
    for _ in range(_TRIALS):
        done = subprocess.run(trial, capture_output=True, env=_ENVIRONMENT)
        if (done.returncode, done.stdout) != (expected.returncode, expected.stdout):
            raise Unfit(f"the file made does not run here (status {done.returncode})")


def build(
    directory: str, words: Sequence[str], seed: Sequence[str], example: dict[str, Any]
) -> str:
    """Make a library's file unless there is a current one; returns its path.

    `words` is the plain interpreter's command, `seed` that of the seed, `example` a configuration.
    Raises Unfit where no file can be made, OSError.
    """
    path = f"{directory}/{NAME}"
    if is_current(directory):
        return path
    if platform.machine() != "x86_64":
        raise Unfit(f"it is made for x86_64, this is {platform.machine()}")
    staged = Path(f"{path}.new.{os.getpid()}")
    staged.parent.mkdir(exist_ok=True)
    try:
        memory, base, names = _taken(seed)
        files = [(name, os.stat(name)) for name in names]
        _make(memory, base, staged, words, example)
        _try(str(staged), words)
        known = [(name, status.st_size, status.st_mtime_ns) for name, status in files]
        facts = {"processor": processor(), "files": known}
        Path(f"{directory}/{FACTS}").write_text(json.dumps(facts))
        staged.rename(path)
    except PermissionError as error:
        raise Unfit(f"its memory cannot be read or written: {error}") from None
    finally:
        staged.unlink(missing_ok=True)
    return path


def remove(directory: str) -> None:
    """Remove a library's file."""
    shutil.rmtree(f"{directory}/warm", ignore_errors=True)
