"""NOTIFY_SOCKET: the payload's READY=1 reaches the caller's socket, and nothing else does."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from native_parts import Native, configuration

# What a hostile payload would like systemd to believe comes first.
SAID = ("MAINPID=1\nFDSTORE=1", "STATUS=warm", "STATUS=hot\nREADY=1", "STOPPING=1")


class Caller:
    """systemd's side: a datagram socket, path or abstract."""

    def __init__(self, address: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(address.replace("@", "\0", 1))
        self.socket.settimeout(20)
        self.environ = {**os.environ, "NOTIFY_SOCKET": address}

    def heard(self, count: int) -> list[str]:
        """The next messages; descriptors that came along are closed."""
        found = []
        for _ in range(count):
            text, fds, _, _ = socket.recv_fds(self.socket, 4096, 4)
            for fd in fds:
                os.close(fd)
            found.append(text.decode())
        return found

    def nothing_more(self) -> bool:
        """Whether nothing else has come."""
        self.socket.settimeout(0.3)
        try:
            return not self.socket.recv(4096)
        except TimeoutError:
            return True


@pytest.fixture(params=["path", "abstract"])
def caller(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Caller]:
    address = f"@krun-test-{os.urandom(6).hex()}" if request.param == "abstract" else ""
    one = Caller(address or str(tmp_path / "host.sock"))
    yield one
    one.socket.close()


def document(native: Native, payload: Path, *said: str) -> dict[str, Any]:
    shutil.copy(payload, native.rootfs / "payload")
    return configuration("/payload", "notify", *said)


def test_start_passes_ready_on(native: Native, payload: Path, caller: Caller) -> None:
    native.write(document(native, payload, *SAID))
    name = native.name()
    env = {"env": caller.environ}
    native("create", "--bundle", native.bundle, name, stdout=subprocess.DEVNULL, **env)
    pid = native.state(name)["pid"]
    words = [*native.words, "start", name]
    with subprocess.Popen(words, stdin=subprocess.DEVNULL, **env) as start:
        assert caller.heard(2) == [f"READY=1\nMAINPID={pid}\n", "BARRIER=1"]
        assert start.wait(10) == 0
    assert caller.nothing_more()
    assert native.state(name)["status"] == "running"
    assert os.listdir(native.root / name / "notify") == []
    native("delete", "--force", name)


def test_run_passes_ready_on_and_lives(native: Native, payload: Path, caller: Caller) -> None:
    native.write(document(native, payload, *SAID))
    words = [*native.words, "run", "--bundle", str(native.bundle), native.name()]
    with subprocess.Popen(words, stdout=subprocess.PIPE, env=caller.environ) as run:
        assert caller.heard(1) == [f"READY=1\nMAINPID={run.pid}\n"]
        assert run.stdout is not None
        assert run.stdout.readline() == b"napping\n"
        run.send_signal(signal.SIGTERM)
        assert run.wait(10) == 42
    assert caller.nothing_more()


def test_detached_run_waits_for_ready(native: Native, payload: Path, tmp_path: Path) -> None:
    caller = Caller(str(tmp_path / "host.sock"))
    native.write(document(native, payload, *SAID))
    name = native.name()
    words = [*native.words, "run", "--detach", "--bundle", str(native.bundle), name]
    output = subprocess.DEVNULL
    with subprocess.Popen(words, stdout=output, stderr=output, env=caller.environ) as run:
        heard = caller.heard(1)
        assert run.poll() is None, "it ends before systemd has read what it said"
        assert caller.heard(1) == ["BARRIER=1"]
        assert run.wait(10) == 0
    assert heard == [f"READY=1\nMAINPID={native.state(name)['pid']}\n"]


def test_a_payload_that_is_never_ready(native: Native, payload: Path, tmp_path: Path) -> None:
    """start ends with the payload, or when it is killed itself; delete removes what is left."""
    caller = Caller(str(tmp_path / "host.sock"))
    env = {"env": caller.environ}
    native.write(document(native, payload, "STATUS=never"))
    for how in ("payload", "start"):
        name = native.name()
        native("create", "--bundle", native.bundle, name, stdout=subprocess.DEVNULL, **env)
        with subprocess.Popen([*native.words, "start", name], **env) as start:
            end = time.monotonic() + 10
            while native.state(name)["status"] != "running":
                assert time.monotonic() < end
            assert start.poll() is None
            if how == "payload":
                native("kill", name, "KILL")
                assert start.wait(10) == 0
            else:
                start.kill()
        native("delete", "--force", name)
    assert caller.nothing_more()


def test_a_caller_that_is_gone_is_a_warning(native: Native, payload: Path, tmp_path: Path) -> None:
    native.write(document(native, payload, "READY=1"))
    env = {**os.environ, "NOTIFY_SOCKET": str(tmp_path / "nobody")}
    options = ("--detach", "--bundle", native.bundle)
    with (tmp_path / "said").open("w") as said:
        native("run", *options, native.name(), env=env, stdout=subprocess.DEVNULL, stderr=said)
    lines = (tmp_path / "said").read_text().splitlines()
    assert len(lines) == 1
    assert "the caller was not told READY=1" in lines[0]
    env["NOTIFY_SOCKET"] = "vsock:2:1"
    no_socket = 8
    done = native("run", "--bundle", native.bundle, native.name(), status=no_socket, env=env)
    assert "neither a path nor an abstract socket" in done.stderr


def test_a_user_of_a_user_namespace_may_tell(native: Native, payload: Path, tmp_path: Path) -> None:
    caller = Caller(str(tmp_path / "host.sock"))
    wanted = document(native, payload, "READY=1")
    ids = [{"containerID": 0, "hostID": 100000, "size": 1000}]
    wanted["linux"] |= {"uidMappings": ids, "gidMappings": ids}
    wanted["linux"]["namespaces"].append({"type": "user"})
    wanted["process"]["user"] = {"uid": 7, "gid": 7}
    native.write(wanted)
    # The image is of the namespace's root, who makes its mount points.
    os.chown(native.rootfs, 100000, 100000)
    name = native.name()
    options = ("--detach", "--bundle", native.bundle, name)
    with subprocess.Popen(
        [*native.words, "run", *map(str, options)], stdout=subprocess.DEVNULL, env=caller.environ
    ) as run:
        assert caller.heard(2)[0].startswith("READY=1\nMAINPID=")
        assert run.wait(10) == 0


def test_what_the_bundle_brings_stays(native: Native, payload: Path, tmp_path: Path) -> None:
    """podman's conmon has a socket of its own in the configuration: it is the one."""
    caller = Caller(str(tmp_path / "host.sock"))
    (tmp_path / "own").mkdir()
    own = Caller(str(tmp_path / "own/notify.sock"))
    wanted = document(native, payload, "READY=1")
    wanted["process"]["env"].append("NOTIFY_SOCKET=/run/notify/notify.sock")
    wanted["mounts"].append(
        {"destination": "/run/notify", "type": "bind", "source": str(tmp_path / "own")}
        | {"options": ["bind"]}
    )
    native.write(wanted)
    options = ("--detach", "--bundle", native.bundle, native.name())
    native("run", *options, env=caller.environ, stdout=subprocess.DEVNULL)
    assert own.heard(1) == ["READY=1"]
    assert caller.nothing_more()
