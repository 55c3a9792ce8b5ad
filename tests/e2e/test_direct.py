"""krun itself, without a client: the verbs in the order a client calls them."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from e2e.machine import Client, Machine, Record, as_tester, cgroups, wait_for

Bundle = Callable[..., Path]


@pytest.fixture
def name(krun: Client) -> Iterator[str]:
    """A container id; whatever holds it afterwards is deleted."""
    name = f"krun-test-{os.urandom(6).hex()}"
    yield name
    krun("delete", "--force", name, status=None)


def test_run(krun: Client, bundle: Bundle, name: str, record: Record) -> None:
    done = krun("run", "--bundle", bundle("/payload", "args", "a b", ""), name)
    assert (done.stdout, done.stderr) == ("a b\n\n", "")
    if given := record.last():
        assert given["payload_argv"] == ["/payload", "args", "a b", ""]
    assert krun("run", "--bundle", bundle("/payload", "exit", 7), name, status=7).stdout == ""
    done = krun("run", "--bundle", bundle("/payload", "kill", 15), name, status=None)
    assert done.returncode == 128 + signal.SIGTERM
    done = krun("run", "-b", bundle("/payload", "cat"), name, input="typed\n")
    assert done.stdout == "typed\n"
    record.count(4)
    assert krun("list", "--quiet").stdout.split() == []
    assert cgroups(name) == []


def test_null_device_that_is_read_only(krun: Client, bundle: Bundle, name: str) -> None:
    """As containerd's shim gives it to a sandbox: the container's own takes its place."""
    with open(os.devnull, "rb") as null:
        streams = {"stdin": null, "stdout": null, "stderr": null}
        krun("run", "--bundle", bundle("/payload", "args", "x"), name, **streams)


def test_many_at_once(krun: Client, bundle: Bundle, name: str, record: Record) -> None:
    """A burst of starts: each gets its own status."""
    directory = bundle("/payload", "exit", 7)
    number = 12
    running = [
        subprocess.Popen(
            krun.machine.inside(*krun.argv, "run", "--bundle", directory, f"{name}-{one}"),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for one in range(number)
    ]
    said = [one.communicate(timeout=60)[1] for one in running]
    assert [one.returncode for one in running] == [7] * number, said
    record.count(number)
    assert krun("list", "--quiet").stdout == ""
    assert cgroups(name) == []


def test_life(krun: Client, bundle: Bundle, name: str, record: Record, tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    out = tmp_path / "out"
    with open(out, "wb") as stdout:
        command = [*krun.argv, "create", "--bundle", bundle("/payload", "nap")]
        command += ["--pid-file", pid_file, name]
        subprocess.run(krun.machine.inside(*command), stdout=stdout, stderr=stdout, check=True)
    state = json.loads(krun("state", name).stdout)
    pid = int(pid_file.read_text())
    assert (state["id"], state["status"], state["pid"]) == (name, "created", pid)
    assert state["bundle"] == str(tmp_path / "bundle")
    assert state["ociVersion"]
    record.count(0)
    assert out.read_text() == ""
    krun("start", name)
    wait_for("the payload runs", lambda: out.read_text() == "napping\n")
    assert json.loads(krun("state", name).stdout)["status"] == "running"
    assert name in krun("list").stdout
    [listed] = json.loads(krun("list", "--format", "json").stdout)
    assert (listed["id"], listed["status"]) == (name, "running")
    pids = json.loads(krun("ps", "--format", "json", name).stdout)
    assert pid in pids
    krun("pause", name)
    assert json.loads(krun("state", name).stdout)["status"] == "paused"
    krun("resume", name)
    assert name in krun("delete", name, status=1).stderr
    krun("kill", name, "TERM")

    def stopped() -> bool:
        return bool(json.loads(krun("state", name).stdout)["status"] == "stopped")

    wait_for("the payload ends", stopped)
    krun("delete", name)
    assert name in krun("state", name, status=1).stderr
    assert cgroups(name) == []
    krun("delete", "--force", name)


def test_exec(krun: Client, bundle: Bundle, name: str, record: Record, tmp_path: Path) -> None:
    nowhere = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    krun("run", "--detach", "--bundle", bundle("/payload", "nap"), name, **nowhere)
    assert krun("exec", name, "/payload", "args", "--tty", "x").stdout == "--tty\nx\n"
    krun("exec", name, "/payload", "exit", 9, status=9)
    done = krun("exec", "--user", "1000:1000", "--cwd", "/tmp", name, "/payload", "ids")
    assert done.stdout.split()[:2] == ["1000", "1000"]
    if given := record.last():
        assert given["cwd"] == "/tmp"
    variables = krun("exec", "--env", "A=b", name, "/payload", "env").stdout.splitlines()
    assert "A=b" in variables
    process = tmp_path / "process.json"
    process.write_text(
        json.dumps(
            {
                "args": ["/payload", "args", "from the file"],
                "cwd": "/",
                "user": {"uid": 0, "gid": 0},
                "env": ["PATH=/bin"],
            }
        )
    )
    pid_file = tmp_path / "exec-pid"
    arguments = ["exec", "--process", process, "--pid-file", pid_file, name]
    assert krun(*arguments).stdout == "from the file\n"
    assert int(pid_file.read_text()) > 1
    record.count(6)
    for program in ("/no/such", "no-such", "/not-executable"):
        done = krun("exec", name, program, status=255)
        assert program in done.stderr
    done = krun("exec", "krun-test-none", "/payload", status=255)
    assert "container `krun-test-none` does not exist" in done.stderr
    record.count(6)


@pytest.mark.parametrize(
    ("program", "status"),
    [("/no/such", 127), ("no-such", 127), ("/not-executable", 126), ("/data", 126), ("/text", 126)],
)
def test_cannot_execute(
    krun: Client, bundle: Bundle, name: str, record: Record, program: str, status: int
) -> None:
    done = krun("run", "--bundle", bundle(program), name, status=status)
    assert program in done.stderr
    assert len(done.stderr.splitlines()) == 1
    record.count(0)
    assert krun("list", "-q").stdout == ""
    assert cgroups(name) == []


def test_terminal(krun: Client, bundle: Bundle, name: str, record: Record) -> None:
    def terminal(config: dict[str, Any]) -> None:
        config["process"]["terminal"] = True

    command = ["run", "--bundle", bundle("/payload", "talk", edit=terminal), name]
    status, said = krun.terminal(*command, after="talking", typed="line\n\x04")
    assert status == 0, said
    assert said.count("line\n") == 2
    if given := record.last():
        assert given["terminal"] == [True, True, True]


def test_descriptors(krun: Client, bundle: Bundle, name: str, record: Record) -> None:
    """--preserve-fds reaches km, which keeps them from the payload; others do not."""
    command = [*krun.argv, "run", "--preserve-fds", "1", "--bundle", bundle("/payload"), name]
    script = 'exec 3</etc/passwd 4</etc/group; exec "$@"'
    krun.machine.run("sh", "-c", script, "sh", *command)
    if given := record.last():
        assert sorted(given["fds"]) == ["0", "1", "2", "3"]


def test_stdin_of_the_caller(krun: Client, bundle: Bundle, name: str) -> None:
    """A config.json over 64 KiB, as containerd writes them, goes through as well."""

    def large(config: dict[str, Any]) -> None:
        config["annotations"] = {f"com.example.{n}": "x" * 1000 for n in range(300)}

    done = krun("run", "-b", bundle("/payload", "cat", edit=large), name, input="in")
    assert done.stdout == "in"


def test_translate_shows_what_runs(krun: Client, bundle: Bundle, name: str, record: Record) -> None:
    directory = bundle("/payload", "args", "x")
    shown = json.loads(krun("translate", "--bundle", directory).stdout)
    krun("run", "--bundle", directory, name)
    if given := record.last():
        args = shown["process"]["args"]
        assert given["argv"] == args[args.index(given["argv"][0]) :]
        assert given["exe"] in [mount["destination"] for mount in shown["mounts"]]


def test_spec_makes_a_bundle_that_runs(
    krun: Client, machine: Machine, name: str, tmp_path: Path
) -> None:
    machine.run("cp", "-a", machine.directory / "rootfs", tmp_path / "rootfs")
    krun("spec", "--bundle", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["process"].update(terminal=False, args=["/payload", "args", "x"])
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert krun("run", "--bundle", tmp_path, name).stdout == "x\n"
    assert "app.kontain" in krun("features").stdout
    assert re.match(r"(krun|runc|crun) version", krun("--version").stdout)


def test_signals_reach_the_payload(krun: Client, bundle: Bundle, name: str, tmp_path: Path) -> None:
    """What a shell or a service manager sends to `krun run` arrives at the payload."""
    out = tmp_path / "out"
    with open(out, "wb") as stream:
        command = krun.machine.inside(*krun.argv, "run", "-b", bundle("/payload", "nap"), name)
        running = subprocess.Popen(command, stdout=stream, stderr=stream)
    wait_for("the payload runs", lambda: out.read_text() == "napping\n")
    running.send_signal(signal.SIGTERM)
    assert running.wait(10) == 42
    assert krun("list", "-q").stdout == ""


def test_console_socket(krun: Client, bundle: Bundle, name: str, tmp_path: Path) -> None:
    """create sends the terminal's master end to the client, which then owns it."""

    def terminal(config: dict[str, Any]) -> None:
        config["process"]["terminal"] = True
        config["process"]["consoleSize"] = {"height": 24, "width": 80}

    # A socket's path has at most 107 bytes.
    path = f"{krun.machine.directory}/{name}.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        directory = bundle("/payload", "talk", edit=terminal)
        nowhere = {"stdout": subprocess.DEVNULL}
        krun("create", "--bundle", directory, "--console-socket", path, name, **nowhere)
        listener.settimeout(10)
        with listener.accept()[0] as connection:
            _, [master], _, _ = socket.recv_fds(connection, 4096, 1)
    assert os.isatty(master)
    krun("start", name)
    said = b""
    while b"talking" not in said:
        said += os.read(master, 1000)
    os.write(master, b"line\n\x04")
    wait_for("the end", lambda: json.loads(krun("state", name).stdout)["status"] == "stopped")
    os.close(master)


def test_detached_run(krun: Client, bundle: Bundle, name: str, tmp_path: Path) -> None:
    nowhere = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    arguments = ["--detach", "--pid-file", tmp_path / "pid", "--bundle", bundle("/payload", "nap")]
    krun("run", *arguments, name, **nowhere)
    state = json.loads(krun("state", name).stdout)
    assert state["status"] == "running"
    assert state["pid"] == int((tmp_path / "pid").read_text())
    krun("kill", name, "KILL")
    wait_for("the end", lambda: json.loads(krun("state", name).stdout)["status"] == "stopped")
    assert krun("kill", name, "TERM", status=None).returncode == 1
    krun("delete", name)


def test_kill_all(krun: Client, bundle: Bundle, name: str) -> None:
    nowhere = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    krun("run", "--detach", "--bundle", bundle("/payload", "nap"), name, **nowhere)
    krun("exec", "--detach", name, "/payload", "wait", **nowhere)
    krun("kill", "--all", name, "KILL")
    wait_for("the end", lambda: json.loads(krun("state", name).stdout)["status"] == "stopped")
    assert krun("kill", name, "0", status=None).returncode == 1
    assert "payload" not in krun("ps", name, status=None).stdout


def test_signals_and_processes_are_runcs(krun: Client, bundle: Bundle, name: str) -> None:
    """crun takes an unknown name for signal 0, prints ids alone, and crashes once it stopped."""
    nowhere = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    krun("run", "--detach", "--bundle", bundle("/payload", "nap"), name, **nowhere)
    for word in ("SIGFOO", "65", ""):
        assert "unknown signal" in krun("kill", name, word, status=1).stderr
    for word in ("0", "cont", "SIGCONT", "SIGURG"):
        krun("kill", name, word)
    header, *rows = krun("ps", name).stdout.splitlines()
    assert header.split()[:3] == ["UID", "PID", "PPID"]
    assert any("/payload nap" in row for row in rows)
    krun("kill", name, "sigkill")
    wait_for("the end", lambda: json.loads(krun("state", name).stdout)["status"] == "stopped")
    assert krun("ps", name).stdout == header + "\n"
    assert json.loads(krun("ps", "--format", "json", name).stdout) == []
    assert krun("events", "--stats", name, status=1).stdout == ""


def test_update(krun: Client, bundle: Bundle, name: str, tmp_path: Path) -> None:
    def limited(config: dict[str, Any]) -> None:
        config["linux"]["cgroupsPath"] = f"/{name}"
        config["linux"]["resources"] = {"memory": {"limit": 64 << 20}, "pids": {"limit": 30}}

    nowhere = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    directory = bundle("/payload", "nap", edit=limited)
    krun("run", "--detach", "--bundle", directory, name, **nowhere)

    def limits() -> tuple[int, int]:
        # The container's own, whichever the layout; cgroups below it come first.
        found = {}
        for directory in cgroups(name):
            for file in ("memory.limit_in_bytes", "memory.max", "pids.max"):
                if os.path.exists(f"{directory}/{file}"):
                    found[file.partition(".")[0]] = Path(directory, file).read_text()
        return int(found["memory"]), int(found["pids"])

    assert limits() == (64 << 20, 30)
    resources = json.dumps({"memory": {"limit": 48 << 20}, "pids": {"limit": 20}})
    krun("update", "--resources", "-", name, input=resources)
    assert limits() == (48 << 20, 20)
    krun("update", "--memory", "32M", name)
    assert "--memory 3x" in krun("update", "--memory=3x", name, status=1).stderr
    assert "--pids-limit" in krun("update", "--pids-limit", "1]", name, status=1).stderr
    assert limits() == (32 << 20, 20)


def test_hooks(krun: Client, bundle: Bundle, name: str, tmp_path: Path) -> None:
    """The hooks of the runtime's namespace run in order, with the container's state."""
    log = tmp_path / "hooks"
    script = tmp_path / "hook"
    script.write_text(
        '#!/bin/sh\nread -r state\necho "$1 $(echo "$state" | grep -o \'"status" *: *"[a-z]*"\')"'
        f" >> {log}\n"
    )
    script.chmod(0o755)
    # The standard's status first; crun says created until start returns.
    expected = {
        "prestart": ("creating", "created"),
        "createRuntime": ("creating", "created"),
        "poststart": ("running", "created"),
        "poststop": ("stopped",),
    }

    def hooks(config: dict[str, Any]) -> None:
        config["hooks"] = {
            kind: [{"path": str(script), "args": ["hook", kind]}] for kind in expected
        }

    krun("run", "--bundle", bundle("/payload", "args", edit=hooks), name)
    seen = [line.split(maxsplit=1) for line in log.read_text().splitlines()]
    assert [kind for kind, _ in seen] == list(expected)
    for kind, said in seen:
        assert said.split('"')[3] in expected[kind]


def test_hook_that_fails(krun: Client, bundle: Bundle, name: str, record: Record) -> None:
    def hooks(config: dict[str, Any]) -> None:
        config["hooks"] = {"createRuntime": [{"path": "/bin/false"}]}

    done = krun("run", "--bundle", bundle("/payload", edit=hooks), name, status=None)
    assert done.returncode > 0
    assert "traceback" not in done.stderr.lower()
    assert len(done.stderr.splitlines()) == 1
    record.count(0)
    krun("delete", "--force", name)
    assert cgroups(name) == []


@pytest.mark.usefixtures("open_checkout")
def test_rootless(machine: Machine, engine: str, name: str, open_device: None) -> None:
    """An ordinary user without a client: krun spec --rootless, krun run."""
    home = machine.directory / f"direct-{engine}"
    krun = Client(machine, [*as_tester(home), machine.directory / f"krun-{engine}"], {})
    krun("spec", "--rootless", "--bundle", home)
    config = json.loads((home / "config.json").read_text())
    config["root"] = {"path": str(machine.directory / "rootfs"), "readonly": True}
    config["process"].update(args=["/payload", "args", "x"], terminal=False)
    (home / "config.json").write_text(json.dumps(config))
    assert krun("run", "--bundle", home, name).stdout == "x\n"
    assert krun("list", "-q").stdout == ""
