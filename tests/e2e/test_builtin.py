"""krun's own monitor under real clients: the payload runs in KVM, and says so itself."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from e2e.machine import IMAGE, Client, wait_for
from e2e.test_cri import Pod

NONE = ("--network", "none")
IN_A_VM = re.compile(r"\.kontain\.KVM$")

# The `engine` of the fixtures names the launcher: the native engine with --monitor builtin.
pytestmark = pytest.mark.parametrize("engine", ["builtin"])


@pytest.fixture
def start(podman: Client) -> Iterator[Callable[..., str]]:
    """podman run -d; the container is removed afterwards."""
    names = []

    def start(*argv: object, ready: str) -> str:
        names.append(f"krun-test-{os.urandom(6).hex()}")
        podman("run", "-d", "--name", names[-1], *NONE, *argv)
        wait_for(ready, lambda: ready in podman("logs", names[-1]).stdout)
        return names[-1]

    yield start
    for name in names:
        podman("rm", "-f", "-t", "0", name, status=None)


def test_podman_run(podman: Client) -> None:
    run = ["run", "--rm", *NONE]
    assert IN_A_VM.search(podman(*run, IMAGE, "/payload", "uname").stdout.strip())
    done = podman(*run, IMAGE, "/payload", "args", "a b", "", "-v")
    assert (done.stdout, done.stderr) == ("a b\n\n-v\n", "")
    assert podman(*run, IMAGE, "/payload", "exit", 7, status=7).stdout == ""
    assert podman(*run, "-i", IMAGE, "/payload", "cat", input="typed\n").stdout == "typed\n"
    variables = podman(*run, "--env", "A=b c", IMAGE, "/payload", "env").stdout.splitlines()
    assert {"A=b c", "FROM=image"} <= set(variables)
    assert podman(*run, IMAGE, "/script", "x").stdout == "/script\nx\n"


@pytest.mark.parametrize(
    "options",
    [
        ["--user", "1000:1000"],
        ["--read-only"],
        ["--cap-drop", "all", "--security-opt", "no-new-privileges"],
        ["--privileged"],
        ["--uidmap", "0:100000:5000", "--gidmap", "0:100000:5000"],
        ["-m", "128m", "--pids-limit", "20"],
        ["--init"],
        ["--pid", "host"],
    ],
    ids=lambda options: options[0].strip("-"),
)
def test_podman_options(podman: Client, open_device: None, options: list[str]) -> None:
    done = podman("run", "--rm", *NONE, *options, IMAGE, "/payload", "uname")
    assert IN_A_VM.search(done.stdout.strip())


def test_podman_life(podman: Client, start: Callable[..., str]) -> None:
    name = start(IMAGE, "/payload", "nap", ready="napping")
    assert IN_A_VM.search(podman("exec", name, "/payload", "uname").stdout.strip())
    assert podman("exec", name, "/payload", "exit", 9, status=9).stdout == ""
    ids = podman("exec", "--user", "1000:1000", name, "/payload", "ids").stdout.split()
    assert ids[:2] == ["1000", "1000"]
    podman("pause", name)
    podman("unpause", name)
    podman("stop", "-t", "10", name)
    assert podman("wait", name).stdout.strip() == "42", "the payload's own handler ran"
    podman("start", name)
    wait_for("a second life", lambda: podman("logs", name).stdout.count("napping") == 2)
    podman("kill", name)
    assert podman("wait", name).stdout.strip() == str(128 + signal.SIGKILL)


def test_podman_terminal(podman: Client) -> None:
    arguments = ["run", "--rm", "-it", *NONE, IMAGE, "/payload", "talk"]
    status, said = podman.terminal(*arguments, after="talking", typed="line\n\x04")
    assert status == 0, said
    assert said.count("line\n") == 2, "once echoed by the terminal, once by the payload"


@pytest.mark.parametrize(
    ("program", "status"), [("/no/such", 127), ("/not-executable", 126), ("/text", 126)]
)
def test_cannot_execute(podman: Client, program: str, status: int) -> None:
    done = podman("run", "--rm", *NONE, IMAGE, program, status=status)
    assert program in done.stderr


def test_docker(docker: Client, engine: str) -> None:
    run = ["run", "--rm", "--runtime", f"krun-{engine}", *NONE, IMAGE, "/payload"]
    assert IN_A_VM.search(docker(*run, "uname").stdout.strip())
    docker(*run, "exit", "7", status=7)
    assert docker(*run, "args", "x").stdout == "x\n"


def test_pod(ctr: Client, engine: str, record: Any) -> None:
    pod = Pod(ctr.argv[2], f"krun-{engine}", record)
    try:
        container = pod.start("/payload", "nap")
        assert IN_A_VM.search(pod.run(container, "/payload", "uname").strip())
    finally:
        pod.close()


def test_direct(krun: Client, bundle: Callable[..., Path]) -> None:
    name = f"krun-test-{os.urandom(6).hex()}"
    nowhere = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    try:
        krun("create", "--bundle", bundle("/payload", "nap"), name, **nowhere)
        assert json.loads(krun("state", name).stdout)["status"] == "created"
        krun("start", name)
        assert IN_A_VM.search(krun("exec", name, "/payload", "uname").stdout.strip())
        krun("kill", name, "KILL")

        def stopped() -> bool:
            return bool(json.loads(krun("state", name).stdout)["status"] == "stopped")

        wait_for("the end", stopped)
        krun("delete", name)
    finally:
        krun("delete", "--force", name)
