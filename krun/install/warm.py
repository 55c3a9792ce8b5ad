"""The warm start: a program that is a started interpreter with krun's modules loaded.

An interpreter's start and the import of modules take 8 ms of a verb, and what they leave in memory
is the same each time.  So krun install writes it to an ELF file once: every mapping of a process
that has come so far (krun.install.seed) becomes a segment at its own address.  The kernel maps the
file; only pages that a verb touches are read, only those it writes are copied.

    seed process  ->  memory, less what is the kernel's own (krun.install.memory)
                  ->  file (krun.install.program)  ->  which pages verbs write (krun.install.hot)

The file runs where it was made.  It knows the processor (krun.install.wake) and the interpreter's
files (krun.install.seed); where one of them differs, it executes the plain interpreter instead,
and so does the launcher where there is no file.
"""

from __future__ import annotations

import json
import os
import platform
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from krun.install import wake
from krun.install.hot import is_supported, ranges, written
from krun.install.memory import Memory, Unfit, copied, mappings, settle
from krun.install.program import write

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from krun.install.memory import Segment

NAME = "warm/krun"
# Beside it: what it was made from.
FACTS = "warm/facts.json"
_PAGE = 4096
_SECONDS = 30
# How often it is tried before it is used: each time elsewhere in the address space.
_TRIALS = 10
_ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "LC_ALL": "C",
    "GLIBC_TUNABLES": "glibc.malloc.arena_max=1",
}


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


def _hot(
    program: str, words: Sequence[str], example: dict[str, Any], segments: Sequence[Segment]
) -> set[int]:
    """Return the pages that verbs write: of some that fail before they have made anything."""
    if not is_supported():
        return set()
    with tempfile.TemporaryDirectory(prefix="krun-") as directory:
        os.mkdir(f"{directory}/rootfs")
        # There is no such program, which is found when all has been decided.
        config = {**example, "process": {**example["process"], "args": ["/nonesuch"]}}
        Path(f"{directory}/config.json").write_text(json.dumps(config))
        start = [program, "-", *words[1:], "--root", directory, "--mode", "all"]
        create = [*start, "create", "--bundle", directory, "nonesuch"]
        execute = [*start, "exec", "nonesuch", "true"]
        both = [written(argv, _ENVIRONMENT, segments) for argv in (create, execute)]
        return both[0] | both[1]


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
            memory = copied(pid, base, found)
            settle(memory, pid, base, break_, rseq)
        finally:
            # Its child ends with it.
            process.kill()
    return memory, base, sorted({one.name for one in found if one.name.startswith("/")})


def _make(memory: Memory, base: int, path: Path, words: Sequence[str], example: Any) -> None:
    """Write the file, find out which pages are written, and write it with them."""
    entry = base + wake.labels()["wake"]
    write(path, memory.segments, entry)
    pages = _hot(str(path), words, example, memory.segments)
    table = ranges(pages, wake.HOT_RANGES - 1)
    for i, (start, count) in enumerate(table):
        memory.set_word(base + wake.HOT + 16 * i, start * _PAGE)
        memory.set_word(base + wake.HOT + 16 * i + 8, count * _PAGE)
    write(path, memory.segments, entry)


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
