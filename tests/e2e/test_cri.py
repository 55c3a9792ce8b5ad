"""Pods as a kubelet makes them: containerd's CRI service, called over its socket."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from e2e.machine import IMAGE, Client, Record

Fields = list[tuple[int, Any]]
NODE = 2
NAMESPACES = [(1, NODE)]


def varint(number: int) -> bytes:
    """Protocol buffers' base 128 form."""
    out = b""
    while number > 0x7F:
        out += bytes([number & 0x7F | 0x80])
        number >>= 7
    return out + bytes([number])


def encode(fields: Fields) -> bytes:
    """A protocol buffers message; the field numbers are those of CRI v1's api.proto."""
    out = b""
    for number, value in fields:
        if isinstance(value, int):
            out += varint(number << 3) + varint(value)
            continue
        body = encode(value) if isinstance(value, list) else value.encode()
        out += varint(number << 3 | 2) + varint(len(body)) + body
    return out


def first_string(message: bytes) -> str:
    """Field 1 of an answer: the id that was made, or what a process wrote."""
    return message[2 : 2 + message[1]].decode() if message else ""


class Pod:
    """A pod sandbox on the host's network."""

    def __init__(self, socket: str, handler: str, record: Record) -> None:
        self.channel = grpc.insecure_channel(f"unix://{socket}")
        self.record = record
        self.name = name = f"krun-test-{os.urandom(4).hex()}"
        annotation = (7, [(1, "app.kontain.km.hcall-stats"), (2, "true")])
        self.config: Fields = [
            (1, [(1, name), (2, name), (3, "default")]),
            annotation,
            (8, [(1, f"/{name}"), (2, [(1, NAMESPACES)])]),
        ]
        self.id = first_string(self.call("RunPodSandbox", [(1, self.config), (2, handler)]))

    def call(self, method: str, fields: Fields) -> bytes:
        method = f"/runtime.v1.RuntimeService/{method}"
        answer: bytes = self.channel.unary_unary(method)(encode(fields), timeout=30)
        return answer

    def start(self, *command: str, security: Fields | None = None) -> str:
        """Create and start a container; return its id."""
        linux = [(1, [(3, 512), (4, 64 << 20)]), (2, [(3, NAMESPACES), *(security or [])])]
        config = [
            (1, [(1, f"c-{os.urandom(4).hex()}")]),
            (2, [(1, IMAGE)]),
            *[(3, word) for word in command],
            (6, [(1, "A"), (2, "b")]),
            (7, [(1, "/km-record"), (2, str(self.record.path))]),
            (15, linux),
        ]
        made = self.call("CreateContainer", [(1, self.id), (2, config), (3, self.config)])
        self.call("StartContainer", [(1, first_string(made))])
        return first_string(made)

    def run(self, container: str, *command: str) -> str:
        """Run a command in a container, as a probe does; return what it wrote."""
        words = [(2, word) for word in command]
        return first_string(self.call("ExecSync", [(1, container), *words, (3, 10)]))

    def close(self) -> None:
        for method in ("StopPodSandbox", "RemovePodSandbox"):
            with contextlib.suppress(grpc.RpcError):
                self.call(method, [(1, self.id)])
        self.channel.close()
        # The pod's cgroup is the kubelet's: containerd makes it and leaves it.
        for cgroup in Path("/sys/fs/cgroup").glob(f"*/{self.name}"):
            cgroup.rmdir()


@pytest.fixture
def pod(ctr: Client, engine: str, record: Record) -> Iterator[Pod]:
    pod = Pod(ctr.argv[2], f"krun-{engine}", record)
    yield pod
    pod.close()


def test_pod(pod: Pod, record: Record) -> None:
    container = pod.start("/payload", "nap")
    record.wait(1)
    if given := record.last():
        assert given["payload_argv"] == ["/payload", "nap"]
        assert "A=b" in given["payload_env"]
        assert "--hcall-stats" in given["argv"], "the pod's annotation"
    assert pod.run(container, "/payload", "args", "probe") == "probe\n"
    record.count(2)
    pod.call("StopContainer", [(1, container), (2, 10)])
    # ContainerStatusResponse.status (1) .exit_code (7) is 42: the payload's own handler ran.
    status = pod.call("ContainerStatus", [(1, container)])
    assert b"\x38\x2a" in status
    pod.call("RemoveContainer", [(1, container)])


def test_security_context(pod: Pod, record: Record) -> None:
    user = [(5, [(1, 1000)]), (12, [(1, 1000)]), (7, 1), (11, 1)]
    container = pod.start("/payload", "nap", security=user)
    assert pod.run(container, "/payload", "ids").split()[:2] == ["1000", "1000"]
    if given := record.last():
        assert given["status"]["NoNewPrivs"] == "1"


@pytest.mark.parametrize("program", ["/no/such", "/not-executable"])
def test_cannot_execute(pod: Pod, record: Record, program: str) -> None:
    start: Callable[..., str] = pod.start
    with pytest.raises(grpc.RpcError, match=program):
        start(program)
    record.count(0)
