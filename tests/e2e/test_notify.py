"""podman --sdnotify=container: READY=1 of the payload, in its VM, reaches the caller's socket."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
from e2e.machine import IMAGE, Client


def _main_pids(said: list[str]) -> list[str]:
    return [one for one in said if one.startswith("MAINPID=")]


def heard(caller: socket.socket) -> list[str]:
    """What has come within a moment, without descriptors."""
    found: list[str] = []
    while True:
        # What must not come may come a second later.
        caller.settimeout(1 if "READY=1" in found and _main_pids(found) else 20)
        try:
            text, fds, _, _ = socket.recv_fds(caller, 4096, 4)
        except TimeoutError:
            return found
        for fd in fds:
            os.close(fd)
        found += text.decode().split()


@pytest.mark.parametrize("engine", ["native", "crun", "builtin"])
def test_podman_sdnotify(podman: Client, tmp_path: Path, engine: str) -> None:
    caller = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    caller.bind(str(tmp_path / "host.sock"))
    told = Client(
        podman.machine, podman.argv, {**podman.env, "NOTIFY_SOCKET": caller.getsockname()}
    )
    name = f"krun-test-{os.urandom(6).hex()}"
    words = ("--name", name, "--network", "none", "--sdnotify", "container", IMAGE)
    try:
        told("run", "-d", *words, "/payload", "notify", "STATUS=warm", "READY=1")
        found = heard(caller)
        assert found.count("READY=1") == 1, found
        conmon = podman("inspect", "--format", "{{.State.ConmonPid}}", name).stdout.strip()
        assert _main_pids(found)[-1] == f"MAINPID={conmon}"
    finally:
        podman("rm", "-f", "-t", "0", name, status=None)
        caller.close()
