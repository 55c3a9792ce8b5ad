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
import struct
import subprocess
import time
from pathlib import Path

from krun.errors import KrunError
from krun.install import wake
from krun.install.seed import ROOM
from krun.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

NAME = "warm/krun"
# Beside it: what it was made from.
FACTS = "warm/facts.json"
_PAGE = 4096
_ZEROS = bytes(_PAGE)
# Above it the kernel may put a new process's stack, wherever else it puts the rest
# (arch/x86/mm/mmap.c: 16 GiB of random places and a gap below the end of the address space).
HIGHEST = 0x7FFB_F800_0000
# struct pthread, in bytes: more than glibc has had so far.
_THREAD = 2560
_SECONDS = 30
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


def _write(path: Path, segments: Sequence[Segment], entry: int) -> None:
    head, places = elf(segments, entry)
    with path.open("wb") as file:
        file.write(head)
        for segment, place in zip(segments, places, strict=True):
            content = memoryview(segment.content)
            for offset in range(0, len(content), _PAGE):
                page = bytes(content[offset : offset + _PAGE])
                # Pages of zeros are holes.
                if page != _ZEROS:
                    file.seek(place + offset)
                    file.write(page)
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


def _make(seed: Sequence[str], path: Path) -> list[str]:
    """Start the seed, write its child's memory to a file, and end both; returns what it mapped."""
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
    _write(path, memory.segments, base + wake.labels()["wake"])
    return sorted({one.name for one in found if one.name.startswith("/")})


def _try(program: str, words: Sequence[str]) -> None:
    """Raise Unfit unless the file answers as the plain interpreter does, every time."""
    expected = subprocess.run([*words, "--version"], capture_output=True, env=_ENVIRONMENT)
    # "-": nothing that it could execute instead.
    trial = [program, "-", *words[1:], "--version"]
    for _ in range(_TRIALS):
        done = subprocess.run(trial, capture_output=True, env=_ENVIRONMENT)
        if (done.returncode, done.stdout) != (expected.returncode, expected.stdout):
            raise Unfit(f"the file made does not run here (status {done.returncode})")


def build(directory: str, words: Sequence[str], seed: Sequence[str]) -> str:
    """Make a library's file unless there is a current one; returns its path.

    `words` is the plain interpreter's command, `seed` that of the seed.  Raises Unfit where no
    file can be made, OSError.
    """
    path = f"{directory}/{NAME}"
    if is_current(directory):
        return path
    if platform.machine() != "x86_64":
        raise Unfit(f"it is made for x86_64, this is {platform.machine()}")
    staged = Path(f"{path}.new.{os.getpid()}")
    staged.parent.mkdir(exist_ok=True)
    try:
        files = [(name, os.stat(name)) for name in _make(seed, staged)]
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
