"""Real clients on a machine of their own: podman, dockerd, containerd, and krun itself."""

from __future__ import annotations

import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import needs
import pytest
from e2e import machine as parts
from e2e.machine import Client, Machine, Record

ENGINES = ("crun", "native")
# The runtimes that clients know: one for each engine, and the native one with krun's own monitor.
RUNTIMES = (*ENGINES, "builtin")


def need(*programs: str) -> None:
    """Skip where a program is missing, or where the kernel will not let containers be made."""
    needs.need(*programs, root="mounts, namespaces, daemons")
    needs.need_kvm()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marks = {mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")}
    if "engine" in metafunc.fixturenames and "engine" not in marks:
        metafunc.parametrize("engine", ENGINES)


@pytest.fixture(scope="session")
def machine(km: Path, payload: Path) -> Iterator[Machine]:
    need("unshare", "nsenter", "busybox", "crun")
    # podman takes no run directory of more than 50 characters; ordinary users pass through here.
    directory = Path(tempfile.mkdtemp(prefix="krun-", dir="/tmp"))
    directory.chmod(0o755)
    machine = Machine(directory)
    monitor = directory / "km"
    shutil.copy(km, monitor)
    monitor.chmod(0o755)
    policy = {"paths": {"km": str(monitor)}, "defaults": {"monitor": "km"}}
    machine.write("/etc/krun/policy.json", json.dumps(policy))
    for engine in ENGINES:
        parts.make_launcher(directory / f"krun-{engine}", engine)
    parts.make_launcher(directory / "krun-builtin", "native", "--monitor", "builtin")
    rootfs = parts.make_rootfs(directory / "rootfs", payload)
    default = ["/payload", "args", "default"]
    parts.make_image(directory / "image.tar", rootfs, parts.IMAGE, default)
    pause = ["/payload", "wait"]
    parts.make_image(directory / "pause.tar", rootfs, parts.PAUSE_IMAGE, pause)
    yield machine
    left = machine.run("ls", "/run/krun").stdout.split()
    machine.close()
    shutil.rmtree(directory)
    assert left == [], "containers' state was left in /run/krun"


@pytest.fixture
def record(machine: Machine, km_is_real: bool) -> Record:
    """The record of this test's starts of km, in a directory that ordinary users may enter."""
    directory = Path(tempfile.mkdtemp(prefix="record-", dir=machine.directory))
    directory.chmod(0o755)
    return Record(directory / "record", km_is_real)


@pytest.fixture
def open_device(machine: Machine) -> Iterator[None]:
    """A /dev/kvm that everyone may open; the host's own keeps its mode."""
    node = machine.directory / "kvm"
    if not node.exists():
        os.mknod(node, 0o600 | stat.S_IFCHR, os.stat("/dev/kvm").st_rdev)
        node.chmod(0o666)
    machine.run("mount", "--bind", node, "/dev/kvm")
    yield
    machine.run("umount", "/dev/kvm")


@pytest.fixture
def closed_device(machine: Machine) -> Iterator[None]:
    """A /dev/kvm that only root may open."""
    node = machine.directory / "kvm-closed"
    if not node.exists():
        os.mknod(node, 0o600 | stat.S_IFCHR, os.stat("/dev/kvm").st_rdev)
    machine.run("mount", "--bind", node, "/dev/kvm")
    yield
    machine.run("umount", "/dev/kvm")


@pytest.fixture
def krun(machine: Machine, engine: str) -> Client:
    """krun itself, with one engine and a root of its own."""
    root = machine.directory / f"root-{engine}"
    return Client(machine, [machine.directory / f"krun-{engine}", "--root", root], {})


@pytest.fixture
def bundle(machine: Machine, tmp_path: Path, record: Record) -> Callable[..., Path]:
    """Make a bundle whose payload is argv; `edit` changes the configuration."""

    def make(*argv: object, edit: Callable[[dict[str, Any]], None] | None = None) -> Path:
        config = json.loads(
            (parts.REPOSITORY / "tests/data/bundles/crun-spec/config.json").read_text()
        )
        config["process"].update(args=list(map(str, argv)), terminal=False)
        config["process"]["rlimits"] = []
        # None of them is inheritable, which is worth a warning.
        config["process"]["capabilities"]["ambient"] = []
        config["root"] = {"path": str(machine.directory / "rootfs"), "readonly": True}
        config["mounts"].append(
            {
                "destination": "/km-record",
                "type": "bind",
                "source": str(record.path),
                "options": ["bind", "rw"],
            }
        )
        if edit:
            edit(config)
        directory = tmp_path / "bundle"
        directory.mkdir(exist_ok=True)
        (directory / "config.json").write_text(json.dumps(config))
        return directory

    return make


@pytest.fixture(scope="session")
def podman_base(machine: Machine) -> Iterator[Client]:
    """podman with storage, state and networks of its own; no runtime chosen."""
    need("podman", "conmon")
    home = machine.directory / "podman"
    home.mkdir()
    options = ["--root", home / "root", "--runroot", home / "runroot", "--tmpdir", home / "tmp"]
    options += ["--storage-driver", "overlay", "--network-config-dir", home / "networks"]
    conf = parts.make_containers_conf(home / "containers.conf", "/usr/bin/crun")
    client = Client(machine, ["podman", *options], {"CONTAINERS_CONF": str(conf)})
    client("load", "-q", "-i", machine.directory / "image.tar")
    yield client
    client("pod", "rm", "-f", "-t", "0", "--all", status=None)
    client("rm", "-f", "-t", "0", "--all", status=None)
    client("network", "prune", "-f", status=None)


@pytest.fixture
def podman(podman_base: Client, engine: str) -> Client:
    """podman --runtime krun, with one engine."""
    directory = podman_base.machine.directory
    conf = parts.make_containers_conf(
        directory / f"containers-{engine}.conf", str(directory / f"krun-{engine}")
    )
    runtime = ["--runtime", "krun"]
    env = {"CONTAINERS_CONF": str(conf)}
    return Client(podman_base.machine, podman_base.argv + runtime, env)


@pytest.fixture(scope="session")
def docker(machine: Machine) -> Iterator[Client]:
    """docker, and a dockerd of its own with a runtime krun-NAME for each of RUNTIMES."""
    need("dockerd", "containerd", "runc", "docker")
    runtimes = {f"krun-{name}": {"path": f"{machine.directory}/krun-{name}"} for name in RUNTIMES}
    with parts.dockerd(machine, runtimes) as client:
        yield client


@pytest.fixture(scope="session")
def ctr(machine: Machine) -> Iterator[Client]:
    """ctr, and a containerd of its own."""
    need("containerd", "ctr")
    cri = 'plugins."io.containerd.grpc.v1.cri"'
    home = machine.directory / "containerd"
    settings = (
        f'[{cri}]\n  sandbox_image = "{parts.PAUSE_IMAGE}"\n'
        "  disable_tcp_service = true\n  restrict_oom_score_adj = true\n"
        f'[{cri}.cni]\n  conf_dir = "{home}/cni"\n'
        f'[{cri}.containerd]\n  default_runtime_name = "krun-crun"\n'
        + "".join(
            f'[{cri}.containerd.runtimes.krun-{engine}]\n  runtime_type = "io.containerd.runc.v2"\n'
            '  pod_annotations = ["app.kontain.*"]\n'
            '  container_annotations = ["app.kontain.*"]\n'
            f"[{cri}.containerd.runtimes.krun-{engine}.options]\n"
            f'  BinaryName = "{machine.directory}/krun-{engine}"\n'
            for engine in RUNTIMES
        )
    )
    with parts.containerd(machine, home, settings) as client:
        for image in ("image.tar", "pause.tar"):
            client("-n", "k8s.io", "images", "import", machine.directory / image)
        yield client
