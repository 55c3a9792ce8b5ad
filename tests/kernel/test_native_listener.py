"""SCMP_ACT_NOTIFY: the listener of init and of each exec goes to listenerPath, with the state."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import struct
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from native_parts import Native, configuration

# seccomp_unotify(2): struct seccomp_notif and seccomp_notif_resp, x86-64.
RECV, SEND = 0xC0502100, 0xC0182101
EXDEV = 18


class Agent:
    """Answers every notified call with EXDEV, an error that mkdir never has by itself."""

    def __init__(self, path: Path) -> None:
        self.documents: list[dict[str, Any]] = []
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.bind(str(path))
        self.socket.listen(4)
        self.socket.settimeout(0.2)
        self.stopped = False
        self.thread = threading.Thread(target=self.serve)
        self.thread.start()

    def serve(self) -> None:
        threads = []
        while not self.stopped:
            try:
                connection, _ = self.socket.accept()
            except TimeoutError:
                continue
            text, fds, _, _ = socket.recv_fds(connection, 65536, 1)
            self.documents.append(json.loads(text))
            connection.close()
            threads.append(threading.Thread(target=self.answer, args=(fds[0],)))
            threads[-1].start()
        for thread in threads:
            thread.join(5)

    def answer(self, listener: int) -> None:
        try:
            while True:
                request = bytearray(80)
                fcntl.ioctl(listener, RECV, request)
                (identifier,) = struct.unpack_from("=Q", request)
                fcntl.ioctl(listener, SEND, struct.pack("=QqiI", identifier, 0, -EXDEV, 0))
        except OSError:
            # The last process with the filter is gone.
            os.close(listener)

    def close(self) -> None:
        self.stopped = True
        self.thread.join(10)
        self.socket.close()


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Agent]:
    one = Agent(tmp_path / "agent")
    yield one
    one.close()


@pytest.mark.parametrize("no_new_privileges", [True, False])
def test_listener(native: Native, agent: Agent, tmp_path: Path, no_new_privileges: bool) -> None:
    script = "mkdir /made 2>&1; sleep 100"
    document = configuration("sh", "-c", script)
    os.symlink("busybox", native.rootfs / "bin/mkdir")
    document["process"]["noNewPrivileges"] = no_new_privileges
    document["linux"]["seccomp"] = {
        "defaultAction": "SCMP_ACT_ALLOW",
        "listenerPath": str(tmp_path / "agent"),
        "listenerMetadata": "hello",
        "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_NOTIFY"}],
    }
    native.write(document)
    name = native.name()
    output = tmp_path / "output"
    with output.open("w") as file:
        native("run", "--detach", "--bundle", native.bundle, name, stdout=file, stderr=file)
    pid = native.state(name)["pid"]
    done = subprocess.run(
        [*native.words, "exec", name, "sh", "-c", "mkdir /made 2>&1"],
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert "Invalid cross-device link" in done.stdout
    assert "Invalid cross-device link" in output.read_text()
    first, second = agent.documents
    assert (first["metadata"], first["fds"]) == ("hello", ["seccompFd"])
    assert (first["pid"], first["state"]["status"]) == (pid, "creating")
    assert second["state"]["status"] == "running"
    assert second["state"]["id"] == name
    assert second["state"]["pid"] == pid != second["pid"]
    native("delete", "--force", name)
