"""docker run --runtime krun, through dockerd and containerd's shim."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from e2e.machine import IMAGE, Client, Record, wait_for

NONE = ("--network", "none")
ALL_CAPABILITIES = (1 << 41) - 1


def bounding_set() -> int:
    """The capabilities root may have on this machine."""
    found = re.search(r"^CapBnd:\s*(\w+)", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found
    return int(found[1], 16)


@pytest.fixture
def run(docker: Client, engine: str, record: Record) -> Callable[..., Any]:
    """docker run --rm --network none, with the record mounted."""

    def run(*argv: object, **keywords: Any) -> Any:
        runtime = ["--runtime", f"krun-{engine}"]
        return docker("run", "--rm", *runtime, *NONE, "-v", record.volume, *argv, **keywords)

    return run


@pytest.fixture
def start(docker: Client, engine: str, record: Record) -> Any:
    """docker run -d, with the record mounted; the container is removed afterwards."""
    names = []

    def start(*argv: object, ready: str = "") -> str:
        name = f"krun-test-{os.urandom(6).hex()}"
        names.append(name)
        runtime = ["--runtime", f"krun-{engine}"]
        docker("run", "-d", "--name", name, *runtime, *NONE, "-v", record.volume, *argv)
        if ready:
            wait_for(ready, lambda: ready in docker("logs", name).stdout)
        return name

    yield start
    for name in names:
        docker("rm", "-f", name, status=None)


def inspect(docker: Client, name: str, form: str) -> str:
    """One field of docker inspect."""
    return docker("inspect", "--format", form, name).stdout.strip()


def test_run(run: Any, record: Record) -> None:
    done = run(IMAGE, "/payload", "args", "a b", "--putenv", "")
    assert (done.stdout, done.stderr) == ("a b\n--putenv\n\n", "")
    if given := record.last():
        assert given["payload_argv"] == ["/payload", "args", "a b", "--putenv", ""]
        assert given["exe_read_only"]
        assert given["rlimits"]["nofile"][0] >= 737
        assert given["status"]["Seccomp"] == "2"
        assert sorted(given["fds"]) == ["0", "1", "2"]
    assert run(IMAGE, "/payload", "exit", 7, status=7).stdout == ""
    assert run("-i", IMAGE, "/payload", "cat", input="typed\n").stdout == "typed\n"
    record.count(3)


def test_init(docker: Client, start: Any, record: Record) -> None:
    name = start("--init", IMAGE, "/payload", "wait", ready="waiting")
    if given := record.last():
        assert given["pid"] != 1
        assert given["payload_argv"] == ["/payload", "wait"]
    assert re.search(r"docker-init", docker("top", name, "-o", "pid,args").stdout)
    docker("stop", "-t", "10", name)
    assert inspect(docker, name, "{{.State.ExitCode}}") == str(128 + signal.SIGTERM)


def test_user_and_limits(run: Any, record: Record) -> None:
    options = ["--user", "1000:1000", "--cap-drop", "all", "--security-opt", "no-new-privileges"]
    done = run(*options, "--read-only", IMAGE, "/payload", "ids")
    assert done.stdout.split()[:2] == ["1000", "1000"]
    assert run("-m", "64m", "--cpus", "0.5", "--pids-limit", "2", IMAGE).stdout == "default\n"
    record.count(2)


def test_privileged(engine: str, run: Any, record: Record) -> None:
    """dockerd asks for every capability it knows, also where root itself lacks some.

    The specification wants those left out; crun fails instead.
    """
    if engine == "crun" and bounding_set() & ALL_CAPABILITIES != ALL_CAPABILITIES:
        done = run("--privileged", IMAGE, "/payload", status=125)
        assert re.search(r"cap.*peration not permitted", done.stderr)
        record.count(0)
        return
    assert run("--privileged", IMAGE, "/payload", "args", "x").stdout == "x\n"
    if given := record.last():
        assert given["status"]["Seccomp"] == "0"


def test_volume(run: Any, tmp_path: Path) -> None:
    (tmp_path / "volume").mkdir()
    run("-v", f"{tmp_path}/volume:/data", IMAGE, "/payload", "write", "/data/out", "text")
    assert (tmp_path / "volume/out").read_text() == "text\n"


def test_life(docker: Client, start: Any, record: Record) -> None:
    name = start(IMAGE, "/payload", "nap", ready="napping")
    assert docker("exec", name, "/payload", "args", "a b").stdout == "a b\n"
    assert docker("exec", name, "/payload", "exit", 9, status=9).stdout == ""
    assert docker("exec", "-i", name, "/payload", "cat", input="in").stdout == "in"
    ids = docker("exec", "--user", "1000:1000", name, "/payload", "ids").stdout.split()
    assert ids[:2] == ["1000", "1000"]
    docker("exec", "-d", name, "/payload", "exit", "0")
    record.wait(6)
    docker("pause", name)
    assert inspect(docker, name, "{{.State.Status}}") == "paused"
    docker("unpause", name)
    docker("update", "--memory", "64m", "--memory-swap", "64m", name)
    assert "payload" in docker("top", name).stdout
    docker("stop", "-t", "10", name)
    assert inspect(docker, name, "{{.State.ExitCode}}") == "42"
    docker("start", name)
    wait_for("a second life", lambda: docker("logs", name).stdout.count("napping") == 2)
    docker("kill", name)
    assert docker("wait", name).stdout.strip() == str(128 + signal.SIGKILL)


def test_terminal(docker: Client, engine: str, start: Any, record: Record) -> None:
    arguments = ["run", "--rm", "-it", "--runtime", f"krun-{engine}", *NONE]
    arguments += ["-v", record.volume, IMAGE, "/payload", "talk"]
    status, said = docker.terminal(*arguments, after="talking", typed="line\n\x04")
    assert status == 0, said
    assert said.count("line\n") == 2, "once echoed by the terminal, once by the payload"
    name = start(IMAGE, "/payload", "nap", ready="napping")
    status, said = docker.terminal("exec", "-it", name, "/payload", "args", "on a terminal")
    assert (status, "on a terminal" in said) == (0, True)
    if given := record.last():
        assert given["terminal"] == [True, True, True]


def test_restart_policy(docker: Client, start: Any, record: Record) -> None:
    name = start("--restart", "on-failure:2", IMAGE, "/payload", "exit", "3")
    wait_for("two restarts", lambda: inspect(docker, name, "{{.RestartCount}}") == "2")
    wait_for("the end", lambda: inspect(docker, name, "{{.State.Status}}") == "exited")
    assert inspect(docker, name, "{{.State.ExitCode}}") == "3"
    record.count(3)


@pytest.mark.parametrize(
    ("program", "status"), [("/no/such", 127), ("no-such", 127), ("/not-executable", 126)]
)
def test_cannot_execute(run: Any, record: Record, program: str, status: int) -> None:
    done = run(IMAGE, program, status=status)
    assert program in done.stderr
    assert "traceback" not in done.stderr.lower()
    record.count(0)
