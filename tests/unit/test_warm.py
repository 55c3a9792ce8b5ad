"""The warm start: a file that is a started interpreter does what the interpreter does."""

from __future__ import annotations

import json
import os
import platform
import pty
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import installed
import needs
import pytest

from krun.install import hot, memory, program, seed, wake

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64", reason="the warm start is made for x86_64"
)


# What krun install says of machines on which it can make none; anything else is a failure.
UNFIT = ("the C library is not glibc", "its memory cannot be read", "not laid out at random")


@pytest.fixture(autouse=True)
def made() -> None:
    """A warm start, unless the machine is one without."""
    why = installed.why_cold()
    if any(words in why for words in UNFIT):
        pytest.skip(f"no warm start here: {why}")
    assert installed.starts_warm(), why


def file() -> Path:
    return Path(installed.words("warm")[0])


def start(how: str, *argv: str | bytes, **more: object) -> subprocess.CompletedProcess[bytes]:
    """Run krun; a warm one that would execute the plain interpreter finds none."""
    words = installed.words(how)
    if how == "warm":
        words[1] = "/nonexistent"
    return subprocess.run([*words, *argv], capture_output=True, **more)  # type: ignore[call-overload,no-any-return]


def both(*argv: str | bytes, **more: object) -> subprocess.CompletedProcess[bytes]:
    """Run krun warm and cold; the answer, which must be the same."""
    answers = [start(how, *argv, **more) for how in ("warm", "cold")]
    for name in ("returncode", "stdout", "stderr"):
        assert getattr(answers[0], name) == getattr(answers[1], name)
    return answers[0]


# The machine code.


@needs.mark("as")
def test_the_assembler_makes_the_same_code(tmp_path: Path) -> None:
    names = {"stack": wake.STACK, "thread": wake.THREAD, "tid": wake.TID}
    names |= {"arguments": wake.ARGUMENTS, "cpu": wake.CPU, "ready": wake.READY}
    names |= {"enabled": wake.ENABLED, "hot": wake.HOT}
    source = ".intel_syntax noprefix\n" + "\n".join(text for _, text in wake.columns())
    source += "".join(f"\n.org {place}\n{name}: .long 0" for name, place in names.items()) + "\n"
    (tmp_path / "wake.s").write_text(source)
    subprocess.run(["as", "wake.s", "-o", "wake.o"], cwd=tmp_path, check=True)
    subprocess.run(["objcopy", "-Obinary", "-j.text", "wake.o", "code"], cwd=tmp_path, check=True)
    code = (tmp_path / "code").read_bytes()
    assert code[: len(wake.code())] == wake.code()
    assert not any(code[len(wake.code()) :])
    assert len(wake.code()) <= wake.PAGE


# What the file is made of.


def test_mappings_of_this_process() -> None:
    text = Path("/proc/self/maps").read_text()
    found = memory.mappings(text)
    assert len(found) == len(text.splitlines())
    stack = next(one for one in found if one.name == "[stack]")
    assert stack.flags & 6 == 6
    assert any(one.name == os.path.realpath(sys.executable) and one.flags == 5 for one in found)
    assert memory.mappings("1000-3000 rw-p 00000000 00:00 0 \n") == [
        memory.Mapping(0x1000, 0x3000, 6, "")
    ]


def test_functions_of_the_vdso() -> None:
    with open("/proc/self/mem", "rb", buffering=0) as own:
        for one in memory.mappings(Path("/proc/self/maps").read_text()):
            if one.name == "[vdso]":
                own.seek(one.start)
                names = set(memory.functions(own.read(one.end - one.start)).values())
    assert {"clock_gettime", "gettimeofday", "time", "getcpu", "clock_getres"} <= names
    assert names & set(wake.labels()) >= {"clock_gettime", "gettimeofday", "time"}


def test_pointers_are_those_of_a_plain_search() -> None:
    chance = random.Random(1)
    for _ in range(200):
        start = chance.randrange(1 << 20, 1 << 47) & ~4095
        end = start + 4096 * chance.randrange(1, 40)
        words = [
            chance.choice((start, end, start - 1, end - 1, 0, chance.randrange(start, end)))
            for _ in range(200)
        ]
        content = b"".join(word.to_bytes(8, "little") for word in words)
        # As bytes that are no aligned word they do not count.
        content += b"\1\2\3" + start.to_bytes(8, "little") + bytes(5)
        expected = [8 * i for i, word in enumerate(words) if start <= word < end]
        assert sorted(memory.pointers(content, start, end)) == expected


def test_what_moves_takes_its_pointers_along() -> None:
    old, new = 0x7F00_1234_5000, 0x7F00_0000_2000
    content = struct.pack("<4Q", old + 16, 7, old + 8, old + 24)
    code = struct.pack("<Q", old)
    found = memory.Memory(
        [
            memory.Segment(0x1000, 6, bytearray(struct.pack("<3Q", old, old + 32, old + 31))),
            memory.Segment(0x3000, 5, bytearray(code)),
            memory.Segment(new, 6, bytearray(4096)),
        ]
    )
    found.move(old, content, new, {24: 0x3000})
    assert struct.unpack("<3Q", found.read(0x1000, 24)) == (new, old + 32, new + 31)
    assert struct.unpack("<4Q", found.read(new, 32)) == (new + 16, 7, new + 8, 0x3000)
    assert found.read(0x3000, 8) == code
    with pytest.raises(memory.Unfit, match="no memory at 0x5000"):
        found.word(0x5000)


def test_the_kernel_runs_what_elf_describes(tmp_path: Path) -> None:
    # mov edi, [variable]; mov eax, exit_group; syscall
    code = bytes.fromhex("8b3c2500005000b8e70000000f05")
    segments = [
        memory.Segment(0x400000, 5, bytearray(code.ljust(4096, b"\0"))),
        memory.Segment(0x500000, 6, bytearray((42).to_bytes(4, "little") + bytes(1 << 20))),
    ]
    program.write(tmp_path / "program", segments, 0x400000)
    assert subprocess.run([tmp_path / "program"]).returncode == 42
    # Zeros take no room.
    assert (tmp_path / "program").stat().st_blocks * 512 < 1 << 17


def test_what_is_filled() -> None:
    block = program._BLOCK
    content = bytearray(5 * block + 100)
    assert program.filled(content) == []
    content[block + 7] = content[3 * block - 1] = content[-1] = 1
    assert program.filled(content) == [(block, 3 * block), (5 * block, 5 * block + 100)]
    assert program.filled(bytearray(b"x")) == [(0, 1)]


def test_ranges_hold_every_page_and_few_others() -> None:
    chance = random.Random(2)
    for _ in range(200):
        pages = {chance.randrange(1000) for _ in range(chance.randrange(300))}
        limit = chance.choice((1, 20, 100, 400))
        found = hot.ranges(pages, limit)
        assert len(found) <= limit
        covered = [page for start, count in found for page in range(start, start + count)]
        assert len(covered) == len(set(covered))
        if found:
            assert pages <= set(covered)
        if limit == 400:
            assert pages == set(covered)
    assert hot.ranges({5, 6, 9}, 2) == [(5, 2), (9, 1)]
    assert hot.ranges({5, 6, 9}, 1) == [(5, 5)]
    assert hot.ranges({0, 1000}, 1) == []


# The file in use.


@needs.mark("strace")
def test_install_makes_one_and_the_launcher_starts_it(tmp_path: Path) -> None:
    assert file().stat().st_mode & 0o777 == 0o755
    command = [
        "strace",
        "-f",
        "-qq",
        "-e",
        "trace=execve",
        str(installed.launcher()),
        "create",
        "x",
    ]
    said = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path).stderr
    assert f'execve("{file()}"' in said
    assert 'execve("/usr' not in said


@needs.mark("strace")
def test_pages_that_verbs_write_are_copied_at_once() -> None:
    words = [*installed.words("warm"), "state", "nonesuch"]
    command = ["strace", "-qq", "-e", "trace=madvise", *words]
    said = subprocess.run(command, capture_output=True, text=True).stderr
    sizes = re.findall(r"madvise\(0x\w+, (\d+), (?:MADV_POPULATE_WRITE|0x17[^)]*)\) = 0\n", said)
    assert 10 < len(sizes) <= wake.HOT_RANGES - 1
    assert 50 < sum(map(int, sizes)) // 4096 < 2000


@pytest.mark.parametrize(
    "argv",
    [
        ("--version",),
        ("state", "nonesuch"),
        ("--log-format", "json", "state", "nonesuch"),
        ("create", "--bundle", "/nonexistent", "x"),
        ("creat",),
        ("state", "--help"),
        ("kill", "nonesuch", "NOSUCH"),
        ("state", ""),
        ("state", b"\xff\xfe"),
        ("state", "ä" * 300),
        ("state", "x" * 100_000),
        (),
        ("images", "ls", "--nonesuch"),
    ],
    ids=lambda argv: " ".join(map(str, argv))[:30],
)
def test_the_answer_is_the_interpreters(argv: tuple[str | bytes, ...]) -> None:
    both(*argv, env={"PATH": "/usr/bin", "LC_ALL": "C.UTF-8"})


def test_arguments_and_environment_are_this_processs(tmp_path: Path) -> None:
    config = {"ociVersion": "1.2.0", "process": {"args": ["x"], "cwd": "/"}, "root": {"path": "r"}}
    (tmp_path / "r").mkdir()
    (tmp_path / "config.json").write_text(json.dumps(config))
    environment = {f"NAME{i}": "x" * i for i in range(500)} | {"XDG_RUNTIME_DIR": str(tmp_path)}
    # --preserve-fds is refused for a descriptor that is not open, the cwd is the bundle.
    for argv in (("translate",), ("--root", str(tmp_path), "create", "x"), ("spec", "-b", "/none")):
        both(*argv, env=environment, cwd=tmp_path)
    assert not list(tmp_path.glob("x*"))


def test_random_numbers_are_not_remembered() -> None:
    words = installed.words("cold")
    check = "import sys;sys.stdout.write(' '.join(n for n in sys.modules if n[:4]!='krun'))"
    sow = words[-1].replace("begin(*a[1:])", "ready(*a[1:]);")
    names = "from krun.install import seed;seed._load([*a[3],*a[4]])"
    done = subprocess.run(
        [*words[:-1], f"{sow}{names};{check}"], capture_output=True, text=True, check=True
    )
    loaded = set(done.stdout.split())
    assert "_json" in loaded
    assert not loaded & {*seed.UNWANTED, "ssl", "logging", "click", "json"}


@pytest.mark.parametrize("how", ["warm", "cold"])
def test_an_ignored_interrupt_stays_ignored(how: str) -> None:
    def ignore() -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    words = installed.words(how)
    for before, expected in ((ignore, "ignored"), (None, "")):
        # A fifo that nobody writes: krun waits while it reads the process's description.
        process = subprocess.Popen(
            [*words, "exec", "--process", "/dev/stdin", "x"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            preexec_fn=before,
        )
        status = Path(f"/proc/{process.pid}/status")
        ignored = ""
        for _ in range(4000):
            time.sleep(0.005)
            lines = dict(line.split(":\t", 1) for line in status.read_text().splitlines())
            if int(lines["SigIgn"], 16) & 1 << signal.SIGPIPE - 1:
                ignored = "ignored" if int(lines["SigIgn"], 16) & 1 << signal.SIGINT - 1 else ""
                break
        process.kill()
        process.communicate()
        assert ignored == expected


def test_lines_go_to_a_terminal_at_once() -> None:
    master, slave = pty.openpty()
    process = subprocess.Popen([*installed.words("warm"), "--version"], stdout=slave)
    os.close(slave)
    assert process.wait() == 0
    assert os.read(master, 100).startswith(b"krun version")
    os.close(master)


@pytest.mark.parametrize("how", ["warm", "cold"])
def test_closed_descriptors(how: str) -> None:
    for argv, status in ((("--version",), 0), (("list",), 0), (("state", "nonesuch"), 1)):
        for closed in ("<&-", ">&-", "2>&-", "<&- >&-", "<&- >&- 2>&-"):
            words = ["sh", "-c", f'exec "$@" {closed}', "sh", *installed.words(how), *argv]
            done = subprocess.run(words, capture_output=True, text=True)
            assert done.returncode == status, (argv, closed)
            assert "traceback" not in done.stderr.lower()


def test_hundreds_of_address_spaces() -> None:
    words = [*installed.words("warm"), "state", "nonesuch"]
    words[1] = "/nonexistent"
    for _ in range(300):
        assert subprocess.run(words, stderr=subprocess.DEVNULL).returncode == 1


@pytest.mark.parametrize("wrapper", [["setarch", "-R"], ["setarch", "-L"], ["nice"]])
def test_other_layouts(wrapper: list[str]) -> None:
    words = installed.words("warm")
    words[1] = "/nonexistent"
    done = subprocess.run([*wrapper, *words, "--version"], capture_output=True, text=True)
    assert done.stdout.startswith("krun version"), done.stderr


def _unlimited() -> None:
    hard = resource.getrlimit(resource.RLIMIT_STACK)[1]
    resource.setrlimit(resource.RLIMIT_STACK, (hard, hard))


def _small() -> None:
    resource.setrlimit(resource.RLIMIT_STACK, (1 << 20, 1 << 20))


@pytest.mark.parametrize("limit", [_unlimited, _small])
def test_other_stacks(limit: Callable[[], None]) -> None:
    assert start("warm", "--version", preexec_fn=limit).stdout.startswith(b"krun version")


def test_deep_input_is_refused_not_fatal(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[" * 100_000)
    done = both("create", "--bundle", str(tmp_path), "x")
    assert done.returncode == 1
    assert done.stderr.count(b"\n") == 1


def test_by_hand_it_says_what_it_is_for() -> None:
    for argv in ([], ["--version"], ["state", "x"]):
        done = subprocess.run([file(), *argv], capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == "krun: this program is for krun's launcher alone: run that\n"


# Where the file does not fit.


def _marker(directory: Path) -> Path:
    path = directory / "plain"
    path.write_text('#!/bin/sh\necho "plain $*"\n')
    path.chmod(0o755)
    return path


def _run_with_marker(program: Path, marker: Path) -> str:
    words = [str(program), str(marker), *installed.words("warm")[2:], "--version"]
    return subprocess.run(words, capture_output=True, text=True).stdout


def test_another_processor_gets_the_plain_interpreter(tmp_path: Path) -> None:
    content = bytearray(file().read_bytes())
    (entry,) = struct.unpack_from("<Q", content, 24)
    (count,) = struct.unpack_from("<H", content, 56)
    base = entry - wake.labels()["wake"]
    for index in range(count):
        header = struct.unpack_from("<IIQQQQQQ", content, 64 + 56 * index)
        _, _, place, address, _, size, _, _ = header
        if address <= base + wake.PAGE < address + size:
            start = place + base - address
    marker = _marker(tmp_path)
    assert _run_with_marker(file(), marker).startswith("krun version")
    for word in (*range(wake.CPU, wake.READY, 4), wake.ENABLED):
        changed = bytearray(content)
        changed[start + word + 1] ^= 0x10
        other = tmp_path / f"word{word}"
        other.write_bytes(changed)
        other.chmod(0o755)
        said = _run_with_marker(other, marker)
        assert said.startswith("plain -I -S -B -c ")
        assert said.endswith("--version\n")


@needs.mark(root="mounts")
def test_an_upgraded_library_gets_the_plain_interpreter(tmp_path: Path) -> None:
    facts = json.loads((file().parent / "facts.json").read_text())
    library = next(path for path, _, _ in facts["files"] if "libm" in path or "libc" in path)
    newer = tmp_path / "library"
    # Everything the same but for the time.
    shutil.copy(library, newer)
    script = 'mount --bind "$1" "$2"; shift 2; exec "$@"'
    marker = _marker(tmp_path)
    command = ["unshare", "-m", "sh", "-c", script, "sh", str(newer), library]
    words = [str(file()), str(marker), *installed.words("warm")[2:], "state", "x"]
    done = subprocess.run([*command, *words], capture_output=True, text=True)
    assert done.stdout.startswith("plain -I -S -B -c "), done.stderr
    assert done.stdout.endswith("state x\n")
    # krun check and a second krun install see it, too.
    program = "from krun.install import warm; import sys; print(warm.is_current(sys.argv[1]))"
    words = [sys.executable, "-c", program, str(file().parent.parent)]
    for before, expected in ((command, "False\n"), ([], "True\n")):
        done = subprocess.run(
            [*before, *words], capture_output=True, text=True, cwd=installed.REPOSITORY
        )
        assert done.stdout == expected, done.stderr


def test_a_missing_file_gets_the_plain_interpreter(tmp_path: Path) -> None:
    said = installed.install(tmp_path / "usr")
    assert "krun starts warm\n" in said
    program = next(tmp_path.glob("usr/lib/krun/*/warm/krun"))
    before = program.stat()
    assert "krun starts warm\n" in installed.install(tmp_path / "usr")
    assert program.stat().st_mtime_ns == before.st_mtime_ns
    program.unlink()
    words = [str(tmp_path / "usr/bin/krun"), "--version"]
    assert subprocess.run(words, capture_output=True).stdout.startswith(b"krun version")
    installed.install(tmp_path / "usr")
    assert program.exists()
    assert sorted(path.name for path in program.parent.iterdir()) == ["facts.json", "krun"]


def test_cold_when_asked(tmp_path: Path) -> None:
    words = [str(tmp_path / "bin/krun"), "check"]
    for options, found in (((), "warm"), (("--cold",), "cold"), ((), "warm")):
        assert f"krun starts {found}\n" in installed.install(tmp_path, *options)
        said = subprocess.run(words, capture_output=True, text=True).stdout
        line = next(line for line in said.splitlines() if line.startswith("start "))
        assert line.split()[1:] == ["ok", found]
        assert bool(list(tmp_path.glob("lib/krun/*/warm"))) == (found == "warm")
        assert ("warm" in (tmp_path / "bin/krun").read_text()) == (found == "warm")


def test_no_file_where_the_layout_is_fixed(tmp_path: Path) -> None:
    command = ["setarch", "-R", sys.executable, "-m", "krun", "install", "--prefix", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=installed.REPOSITORY)
    assert done.returncode == 0
    assert "krun starts cold" in done.stdout
    assert "not laid out at random" in done.stdout
    assert not list(tmp_path.glob("lib/krun/*/warm/*"))
    words = [str(tmp_path / "bin/krun"), "--version"]
    assert subprocess.run(words, capture_output=True).stdout.startswith(b"krun version")


def test_nothing_of_the_installers_environment_is_in_it(tmp_path: Path) -> None:
    secret = os.urandom(16).hex()
    command = [sys.executable, "-m", "krun", "install", "--prefix", str(tmp_path)]
    environment = {**os.environ, "KRUN_TEST_SECRET": secret}
    subprocess.run(
        command, check=True, cwd=installed.REPOSITORY, env=environment, capture_output=True
    )
    assert secret.encode() not in next(tmp_path.glob("lib/krun/*/warm/krun")).read_bytes()


def test_a_killed_install_leaves_no_process(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "krun", "install", "--prefix", str(tmp_path)]

    def seeds() -> list[str]:
        found = subprocess.run(["pgrep", "-f", f"{tmp_path}.*sow"], capture_output=True, text=True)
        return found.stdout.split()

    process = subprocess.Popen(
        command, cwd=installed.REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 30
    while not seeds() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    assert process.poll() is None, "the seed was not seen"
    process.kill()
    process.wait()
    while seeds() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not seeds()
    # Whatever it left is put right by the next one.
    installed.install(tmp_path)
    assert len(list(tmp_path.glob("lib/krun/*/warm/*"))) == 2


@needs.mark("strace")
def test_modules_ask_nothing_of_the_machine_while_they_are_loaded(tmp_path: Path) -> None:
    """What they found would be remembered in every process made from the file."""
    words = installed.words("cold")
    sow = words[-1].replace("begin(*a[1:])", "ready(*a[1:]);")
    load = "from krun.install import seed;posix.access('/begin',0);seed._load([*a[3],*a[4]])"
    trace = tmp_path / "trace"
    calls = "trace=%file,getuid,geteuid,getpid,getppid,sysinfo,sched_getaffinity,prlimit64"
    strace = ["strace", "-qq", "-o", str(trace), "-e", calls]
    subprocess.run([*strace, *words[:-1], sow + load], check=True, capture_output=True)
    lines = trace.read_text().partition("/begin")[2].splitlines()[1:]
    own = (str(installed.prefix()), "/usr/lib/", "/lib/", "/usr/local/lib/", "/etc/ld.so.")

    def is_loading(line: str) -> bool:
        path = re.search(r'"([^"]*)"', line)
        # Without a name: a file that was opened, which is another call's.
        return path is not None and (not path[1] or path[1].startswith(own))

    asked = [line for line in lines if not is_loading(line)]
    assert not asked
