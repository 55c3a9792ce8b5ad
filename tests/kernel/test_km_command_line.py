"""What km does with its command line, its environment and its surroundings.

The same expectations hold for the stand-in and, with KRUN_TEST_KM, for a real km: they are what
keeps the stand-in true.
"""

from __future__ import annotations

import resource
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from kernel.builtin_host import NEEDS_KVM

pytestmark = NEEDS_KVM


@pytest.fixture
def run(km: Path, tmp_path: Path) -> Any:
    def run(*argv: object, **keywords: Any) -> subprocess.CompletedProcess[str]:
        limits = (keywords.pop("nofile", 1024), 1024)

        def prepare() -> None:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)

        keywords.setdefault("env", {})
        started = subprocess.Popen(
            [km, *map(str, argv)],
            cwd=tmp_path,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            preexec_fn=prepare,
            **keywords,
        )
        said = started.communicate(timeout=20)
        # Where km's own words go when its stderr is a pipe and nobody said otherwise.
        Path(f"/tmp/km_{started.pid}.log").unlink(missing_ok=True)
        return subprocess.CompletedProcess(started.args, started.returncode, *said)

    return run


def test_payload_gets_its_arguments_and_the_given_environment(run: Any, payload: Path) -> None:
    done = run("--putenv", "A=b", "--", payload, "args", "-v", "--putenv", "x y", "")
    assert (done.returncode, done.stdout, done.stderr) == (0, "-v\n--putenv\nx y\n\n", "")
    done = run("--put", "A=b", payload, "env", env={"C": "d"})
    assert done.stdout == "A=b\n"
    assert run(payload, "env", env={"C": "d", "KM_MGTPIPE": ""}).stdout == "C=d\n"
    assert run("--copyenv", "PA=Z", payload, "env", env={"PATH": "/", "B": "c"}).stdout == "B=c\n"


def test_status_is_the_payloads(run: Any, payload: Path) -> None:
    assert run(payload, "exit", 7).returncode == 7
    assert run(payload, "kill", 15).returncode == -signal.SIGTERM


def test_km_logs_to_stderr_only_when_told(run: Any) -> None:
    told = run("--km-log-to=stderr", "--", "/nonexistent")
    assert told.returncode == 1
    assert "Failed to determine payload name" in told.stderr
    untold = run("--", "/tmp")
    assert (untold.returncode, untold.stderr) == (2, "")
    assert "is a directory" in run("-kstderr", "/tmp").stderr.lower()


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["--help"],
        ["-Z", "x"],
        [""],
        ["/nonexistent"],
        ["-A", "/p"],
        ["-P31", "PAYLOAD"],
        ["-P63", "PAYLOAD"],
        ["-Pxx", "PAYLOAD"],
        ["-P40", "PAYLOAD"],
        ["--putenv", "A=b", "--copyenv", "C", "PAYLOAD"],
        ["--copyenv", "A", "--copyenv", "C", "PAYLOAD"],
        ["--kill-unimpl-hcall", "PAYLOAD"],
        ["--virt-device"],
        ["-F", "/nonexistent", "PAYLOAD"],
        ["-F", "/dev/null", "PAYLOAD"],
    ],
)
def test_status_1(run: Any, payload: Path, argv: list[str]) -> None:
    assert run(*[payload if word == "PAYLOAD" else word for word in argv]).returncode == 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "read"),
        (b"x", "read"),
        (b"short text\n", "EHDR"),
        (b"long text " * 10, "EHDR magic number mismatch"),
        (b"#! /bin/sh\n" + b"#" * 100, "Cannot open"),
    ],
)
def test_no_elf_file(run: Any, tmp_path: Path, content: bytes, words: str) -> None:
    file = tmp_path / "file"
    file.write_bytes(content)
    file.chmod(0o755)
    done = run("--km-log-to=stderr", file)
    assert done.returncode == 2
    assert words in done.stderr


def test_interpreter_line(run: Any, tmp_path: Path, payload: Path) -> None:
    script = tmp_path / "script"
    script.write_text(f"#!{payload} args\n")
    script.chmod(0o755)
    assert run(script, "a", "b").stdout == f"{script}\na\nb\n"


def test_needs_descriptors_and_limits(run: Any, km: Path, payload: Path) -> None:
    assert run("-kstderr", payload, nofile=256).returncode == -signal.SIGABRT
    assert run("-kstderr", payload, nofile=737).returncode == 0
    code = 'exec "$0" "$1" <&-'
    closed = subprocess.run(["sh", "-c", code, km, payload], capture_output=True)
    assert closed.returncode == -signal.SIGSEGV


def test_needs_proc(km: Path, payload: Path) -> None:
    command = ["unshare", "-m", "sh", "-c", 'umount -l /proc && exec "$0" "$1"', km, payload]
    assert subprocess.run(command, capture_output=True).returncode in (-signal.SIGSEGV, 139)


def test_private_variables(run: Any, payload: Path) -> None:
    assert run(payload, env={"KM_EXEC_VERS": "3"}).returncode == -signal.SIGABRT
    management = {"KM_MGTDIR": "/tmp"}
    assert run("--mgtpipe", "/tmp/krun-no-pipe", payload, env=management).returncode == 1


def test_total_size_of_strings(run: Any, payload: Path) -> None:
    assert run(payload, "args", *["x" * 4000] * 40).returncode == 2


def test_stand_in_refuses_long_strings(run: Any, payload: Path, km_is_real: bool) -> None:
    if km_is_real:
        pytest.skip("the real km cuts such a string without a word")
    done = run("-kstderr", payload, "args", "x" * 4097)
    assert done.returncode == 2
    assert run("-kstderr", payload, "args", "x" * 4096).stdout == "x" * 4096 + "\n"


def test_stand_in_says_what_it_is(run: Any, km_is_real: bool) -> None:
    if km_is_real:
        pytest.skip("a real km is under test")
    assert "stand-in" in run("--km-log-to=stderr", "--version").stderr
