"""The image hooks that krun itself gives the containers of docker, containerd and CRI."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import installed
import needs
import pytest
from e2e.machine import IMAGE, REPOSITORY, Client, Machine, Record, wait_for
from e2e.test_cri import Pod
from images_parts import layer, registry

STATE = "/var/lib/krun/images"
POLICY = "/etc/krun/policy.json"
SETTINGS = "/etc/krun/images.toml"
WAY_OUT = f"krun images warm {IMAGE}"

Policy = Callable[..., None]


@pytest.fixture(scope="module")
def hooks(machine: Machine) -> None:
    """The hook programs where the installed krun looks for them."""
    place = ["--prefix", installed.prefix(), "--hooks-dir", machine.directory / "hooks.d"]
    machine.run(installed.launcher(), "images", "hooks", *place)


@pytest.fixture
def policy(machine: Machine, hooks: None) -> Iterator[Policy]:
    """Set the policy's `images`; the host's file is put back afterwards."""
    before = machine.run("cat", POLICY).stdout

    def change(**images: object) -> None:
        machine.write(POLICY, json.dumps({**json.loads(before), "images": images}))

    machine.run("rm", "-rf", STATE)
    yield change
    machine.write(POLICY, before)
    machine.run("rm", "-rf", STATE, SETTINGS)


def ledger(machine: Machine) -> list[dict[str, Any]]:
    return [
        json.loads(line)
        for line in machine.run("cat", f"{STATE}/ledger.jsonl").stdout.split("\n")
        if line
    ]


def events(machine: Machine) -> list[str]:
    return [entry["event"] for entry in ledger(machine)]


def look(machine: Machine, store: str, table: str) -> None:
    """Let krun look at the store: from now on it knows what was pulled before."""
    machine.write(SETTINGS, f'store = "{store}"\n[{store}]\n{table}\n')
    machine.run("env", "-C", REPOSITORY, sys.executable, "-m", "krun", "images", "ls")


def left(machine: Machine) -> list[str]:
    return machine.run("ls", "/run/krun").stdout.split()


def test_docker(docker: Client, engine: str, record: Record, policy: Policy) -> None:
    machine = docker.machine
    run = ["run", "--rm", "--runtime", f"krun-{engine}", "--network=none",
           "-v", record.volume, IMAGE, "/payload", "args", "hello"]  # fmt: skip
    before = left(machine)

    policy(check="record")
    assert docker(*run).stdout == "hello\n"
    check, start, stop = ledger(machine)
    assert (check["event"], check["mode"]) == ("check", "record")
    assert check["findings"] == ["nothing is known to be pre-pulled on this node"]
    assert (start["event"], stop["event"]) == ("start", "stop")
    assert start["image"] == IMAGE and start["id"].startswith("sha256:")
    assert start["container"] == stop["container"]

    policy(check="refuse")
    refused = docker(*run, status=125)
    assert f"image {IMAGE}: nothing is known to be pre-pulled" in refused.stderr
    assert WAY_OUT in refused.stderr
    assert "traceback" not in refused.stderr.lower()
    # The native engine runs the poststop hooks of a container whose create failed, as runc does.
    ended = ["stop"] if engine == "native" else []
    assert events(machine) == ["check", "start", "stop", "check", *ended]
    assert docker("ps", "-aq").stdout == ""
    assert left(machine) == before

    socket = docker.argv[docker.argv.index("-H") + 1]
    look(machine, "docker", f'host = "{socket}"')
    assert docker(*run).stdout == "hello\n"
    assert events(machine)[-2:] == ["start", "stop"]
    assert ledger(machine)[-2]["warm"] is True

    policy()
    assert docker(*run).stdout == "hello\n"
    assert len(ledger(machine)) == 6 + len(ended)
    record.count(3)


def test_containerd(ctr: Client, engine: str, record: Record, policy: Policy) -> None:
    machine = ctr.machine
    binary = machine.directory / f"krun-{engine}"
    mount = f"type=bind,src={record.path},dst=/km-record,options=rbind:rw"

    def run(*options: str, status: int = 0) -> Any:
        name = f"krun-test-{os.urandom(6).hex()}"
        return ctr("run", "--rm", "--runc-binary", binary, "--mount", mount, *options, IMAGE, name,
                   "/payload", "args", "hello", status=status)  # fmt: skip

    named = f"--annotation=io.kubernetes.cri.image-name={IMAGE}"
    before = left(machine)

    policy(check="record")
    assert run(named).stdout == "hello\n"
    assert events(machine) == ["check", "start", "stop"]
    assert ledger(machine)[1]["image"] == IMAGE

    # The container's own wish is stricter than the host's.
    refused = run(named, '--annotation=app.kontain.images={"check":"refuse"}', status=1)
    assert f"image {IMAGE}: nothing is known to be pre-pulled" in refused.stderr
    assert WAY_OUT in refused.stderr

    policy(check="refuse")
    assert WAY_OUT in run(named, status=1).stderr
    # ctr alone tells the runtime no image: the message says what would.
    assert "set the annotation kontain.app/image" in run(status=1).stderr
    assert left(machine) == before

    look(machine, "containerd", f'address = "{ctr.argv[-1]}"\nnamespace = "default"')
    assert run(named).stdout == "hello\n"
    assert run(f"--annotation=kontain.app/image={IMAGE}").stdout == "hello\n"
    assert ledger(machine)[-2]["warm"] is True
    # A wish of the container never loosens what the host says.
    machine.run("rm", f"{STATE}/index.tsv")
    run(named, '--annotation=app.kontain.images={"check":"record"}', status=1)
    record.count(3)


@pytest.fixture
def at_its_place(machine: Machine) -> Iterator[None]:
    """A krun at a path where the prefetch hook looks for one."""
    upper, work = machine.directory / "bin-upper", machine.directory / "bin-work"
    for directory in (upper, work):
        directory.mkdir(exist_ok=True)
    krun = upper / "krun"
    krun.write_text(f'#!/bin/sh\nexec env -C {REPOSITORY} {sys.executable} -m krun "$@"\n')
    krun.chmod(0o755)
    options = f"lowerdir=/usr/local/bin,upperdir={upper},workdir={work}"
    machine.run("mount", "-t", "overlay", "overlay", "-o", options, "/usr/local/bin")
    yield
    machine.run("umount", "/usr/local/bin")


@needs.mark("docker-registry")
def test_prefetch(
    ctr: Client, engine: str, record: Record, policy: Policy, at_its_place: None, tmp_path: Path
) -> None:
    machine = ctr.machine
    policy(check="record")
    look(machine, "containerd", f'address = "{ctr.argv[-1]}"\nnamespace = "default"')
    with registry(tmp_path / "registry") as served:
        served.push("app/next", "1", [layer("next")])
        wanted = f"{served.host}/app/next:1"
        asked = json.dumps({"prefetch": [wanted]}, separators=(",", ":"))
        ctr("run", "--rm", "--runc-binary", machine.directory / f"krun-{engine}",
            "--mount", f"type=bind,src={record.path},dst=/km-record,options=rbind:rw",
            f"--annotation=app.kontain.images={asked}", f"--annotation=kontain.app/image={IMAGE}",
            IMAGE, f"krun-test-{os.urandom(6).hex()}", "/payload", "args", "hello")  # fmt: skip
        wait_for("the next image is here", lambda: wanted in ctr("images", "ls", "-q").stdout)
        ctr("images", "rm", wanted)
    assert ledger(machine)[0]["warm"] is True


def test_pods(ctr: Client, engine: str, record: Record, policy: Policy) -> None:
    machine = ctr.machine
    policy(check="record")

    def pod() -> Pod:
        return Pod(ctr.argv[2], f"krun-{engine}", record)

    one = pod()
    try:
        container = one.start("/payload", "nap")
        # The sandbox is nobody's image: containerd chose it, and the kubelet keeps it.
        check, start = ledger(machine)
        assert (check["image"], check["container"]) == (IMAGE, container)
        # CRI tells image and namespace, which suggest asks for.
        assert (start["image"], start["namespace"]) == (IMAGE, "default")
    finally:
        one.close()
    assert events(machine) == ["check", "start", "stop"]
    policy(check="refuse")
    two = pod()
    try:
        with pytest.raises(grpc.RpcError) as caught:
            two.start("/payload", "nap")
        assert WAY_OUT in str(caught.value)
        look(machine, "containerd", f'address = "{ctr.argv[2]}"\nnamespace = "k8s.io"')
        two.start("/payload", "nap")
    finally:
        two.close()
    assert ledger(machine)[-2]["warm"] is True
