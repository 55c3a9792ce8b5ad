"""containerd through `ctr run --runc-binary`."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
from e2e.machine import IMAGE, Client, Record, wait_for


@pytest.fixture
def run(ctr: Client, engine: str, record: Record) -> Any:
    """ctr run with options and a command; the container is removed afterwards."""
    names = []

    def run(options: list[object], *command: object, **keywords: Any) -> Any:
        names.append(f"krun-test-{os.urandom(6).hex()}")
        mount = f"type=bind,src={record.path},dst=/km-record,options=rbind:rw"
        binary = ctr.machine.directory / f"krun-{engine}"
        arguments = ["run", "--runc-binary", binary, "--mount", mount, *options]
        done = ctr(*arguments, IMAGE, names[-1], *command, **keywords)
        done.name = names[-1]
        return done

    yield run
    for name in names:
        ctr("task", "kill", "-s", "SIGKILL", name, status=None)
        ctr("task", "delete", "-f", name, status=None)
        ctr("container", "delete", name, status=None)


Run = Callable[..., Any]


def test_run(run: Run, record: Record) -> None:
    done = run(["--rm"], "/payload", "args", "a b", "-v")
    assert done.stdout == "a b\n-v\n"
    if given := record.last():
        assert given["payload_argv"] == ["/payload", "args", "a b", "-v"]
    run(["--rm"], "/payload", "exit", "7", status=7)
    run(["--rm", "--privileged", "--net-host"], "/payload", "args")
    run(["--rm", "--memory-limit", "67108864", "--read-only"], "/payload", "args")
    record.count(4)


def test_terminal(ctr: Client, engine: str, record: Record) -> None:
    name = f"krun-test-{os.urandom(6).hex()}"
    binary = ctr.machine.directory / f"krun-{engine}"
    mount = f"type=bind,src={record.path},dst=/km-record,options=rbind:rw"
    arguments = ["run", "--rm", "--tty", "--runc-binary", binary, "--mount", mount, IMAGE, name]
    status, said = ctr.terminal(*arguments, "/payload", "args", "on a terminal")
    assert (status, "on a terminal" in said) == (0, True), said
    if given := record.last():
        assert given["terminal"] == [True, True, True]


def test_detached_life(ctr: Client, run: Run, record: Record) -> None:
    name = run(["-d"], "/payload", "nap").name
    wait_for("the task runs", lambda: "RUNNING" in ctr("task", "ls").stdout)
    done = ctr("task", "exec", "--exec-id", "one", name, "/payload", "args", "a b")
    assert done.stdout == "a b\n"
    user = ["--user", "1000", "--cwd", "/tmp"]
    done = ctr("task", "exec", "--exec-id", "two", *user, name, "/payload", "ids")
    assert done.stdout.split()[0] == "1000"
    ctr("task", "pause", name)
    assert "PAUSED" in ctr("task", "ls").stdout
    ctr("task", "resume", name)
    ctr("task", "kill", "-s", "SIGTERM", name)
    wait_for("the task ends", lambda: "STOPPED" in ctr("task", "ls").stdout)
    assert "exit code 42" in ctr("task", "delete", name).stderr
    record.count(3)


def test_cannot_execute(run: Run, record: Record) -> None:
    done = run(["--rm"], "/no/such", status=1)
    assert "/no/such" in done.stderr
    assert "no such file" in done.stderr.lower()
    record.count(0)
