"""What users and hosts choose: annotations, the label mode, direct invocation, policies."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from e2e.machine import IMAGE, Client, Machine, Record

NONE = ("--network", "none")
PREFIX = "app.kontain."
Podman = Callable[..., Any]


@pytest.fixture
def run(podman: Client, record: Record) -> Podman:
    """podman with options for the runtime, then run --rm --network none and the record."""

    def run(runtime: dict[str, object], *argv: object, **keywords: Any) -> Any:
        flags = [f"--runtime-flag={name}={value}" for name, value in runtime.items()]
        return podman(*flags, "run", "--rm", *NONE, "-v", record.volume, *argv, **keywords)

    return run


@pytest.fixture
def write_policy(machine: Machine, tmp_path: Path) -> Callable[..., Path]:
    """Write a policy file that has the tests' km and what is given."""

    def write(**parts: Any) -> Path:
        document: dict[str, Any] = {"paths": {"km": str(machine.directory / "km")}}
        document["defaults"] = {"monitor": "km"} | parts.pop("defaults", {})
        path = tmp_path / "policy.json"
        path.write_text(json.dumps(document | parts))
        return path

    return write


def annotated(**annotations: str) -> list[str]:
    """podman options that set annotations: km_device is app.kontain.km.device."""
    pairs = [f"{PREFIX}{name.replace('_', '.')}={value}" for name, value in annotations.items()]
    return [word for pair in pairs for word in ("--annotation", pair)]


# Which containers


def test_label_mode(run: Podman, record: Record) -> None:
    """With --mode label only marked containers get a VM; the others are crun's, unchanged."""
    label = {"mode": "label"}
    plain = run(label, IMAGE, "sh", "-c", "ls /dev; cat /proc/1/comm")
    record.count(0)
    assert not {"km", "kvm", "krun-init"} & set(plain.stdout.split())
    assert plain.stdout.split()[-1] in ("sh", "cat")
    run(label, *annotated(version="1"), IMAGE, "/payload")
    record.count(1)
    run(label, *annotated(version="2"), IMAGE, "/payload")
    record.count(1)
    run(label, "-v", f"{record.path}:/.kontain", IMAGE, "/payload")
    record.count(2)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("monitor", "none", "allow-listed programs only"),
        ("mode", "label", "app.kontain.mode"),
        ("sandbox", "native", "app.kontain.sandbox"),
        ("direct-invocation", "/payload", "is not JSON"),
    ],
)
def test_bundle_cannot_leave_the_vm(
    run: Podman, record: Record, name: str, value: str, words: str
) -> None:
    done = run({}, *annotated(**{name: value}), IMAGE, "/payload", status=None)
    assert done.returncode in (125, 126)
    assert words in done.stderr
    record.count(0)


def test_bundle_cannot_list_a_program(run: Podman, record: Record, machine: Machine) -> None:
    """What the host does not list runs in a VM, whatever digest a container names."""
    digest = hashlib.sha256((machine.directory / "rootfs/payload").read_bytes()).hexdigest()
    entry = json.dumps({"path": "/payload", "sha256": digest})
    # podman reads the option's value as a line of CSV.
    text = f"{PREFIX}direct-invocation=[{entry}]".replace('"', '""')
    assert run({}, "--annotation", f'"{text}"', IMAGE, "/payload", "args", "x").stdout == "x\n"
    record.count(1)


# How km is started


@pytest.mark.parametrize(
    ("annotation", "value", "flag"),
    [
        ("km.membus-width", "36", "--membus-width=36"),
        ("km.overcommit-memory", "true", "--overcommit-memory"),
        ("km.enable-1g-pages", "false", "--disable-1g-pages"),
        ("km.hcall-stats", "true", "--hcall-stats"),
        ("km.coredump", "/tmp/core", "--coredump=/tmp/core"),
        ("km.coredump", "none", "--coredump=/dev/null"),
        ("km.kill-unimplemented-syscalls", "true", "--kill-unimpl-scall"),
        ("km.vendor-id", "true", "--vendorid"),
        ("km.log", "/tmp/km.log", "--km-log-to=/tmp/km.log"),
        ("km.log", "none", "--km-log-to=none"),
        ("km.verbose", "mem", "--verbose=mem"),
        ("km.snapshot", "/tmp/snap", "--snapshot=/tmp/snap"),
        ("km.device", "kvm", "--virt-device=/dev/kvm"),
    ],
)
def test_km_option(run: Podman, record: Record, annotation: str, value: str, flag: str) -> None:
    """Each option arrives as km spells it: the stand-in refuses what km does not know."""
    options = ["--annotation", f"{PREFIX}{annotation}={value}"]
    assert run({}, *options, IMAGE, "/payload", "args", "x").stdout == "x\n"
    if given := record.last():
        assert flag in given["argv"][: given["argv"].index("--")]


@pytest.mark.parametrize(
    ("annotation", "value"),
    [
        ("km.membus-width", "64"),
        ("km.gdb", "2159"),
        ("km.extra-args", "--gdb-listen"),
        ("km.device", "/dev/mem"),
        ("km.nonsense", "1"),
        ("monitor-path", "/bin/busybox"),
        ("init", "/bin/busybox"),
    ],
)
def test_option_that_is_refused(run: Podman, record: Record, annotation: str, value: str) -> None:
    options = ["--annotation", f"{PREFIX}{annotation}={value}"]
    done = run({}, *options, IMAGE, "/payload", status=None)
    assert done.returncode in (125, 126), "a container may only ask for what the host allows"
    assert f"{PREFIX}{annotation}" in done.stderr
    record.count(0)


def test_host_may_allow_more(
    run: Podman, record: Record, write_policy: Callable[..., Path]
) -> None:
    policy = write_policy(allow={"extraArgs": True})
    options = ["--annotation", f"{PREFIX}km.extra-args=--dump-shutdown"]
    run({"policy": policy}, *options, IMAGE, "/payload")
    if given := record.last():
        assert "--dump-shutdown" in given["argv"]


@pytest.mark.parametrize(
    "words",
    [
        ["--gdb-server-port=2159"],
        ["-g2159"],
        ["-Sg2159"],
        ["--virt=/dev/null"],
        ["-SF/dev/null"],
        ["--gdb-l"],
    ],
)
def test_entrypoint_km_with_options_that_are_the_hosts(
    run: Podman, record: Record, words: list[str]
) -> None:
    entrypoint = json.dumps(["/opt/kontain/bin/km", *words])
    done = run({}, "--entrypoint", entrypoint, IMAGE, "/payload", status=None)
    assert done.returncode in (125, 126), done
    record.count(0)


def test_entrypoint_km_with_options(run: Podman, record: Record) -> None:
    entrypoint = json.dumps(["/opt/kontain/bin/km", "-S", "--putenv", "A=b"])
    done = run({}, "--entrypoint", entrypoint, IMAGE, "/payload", "env")
    assert done.stdout == "A=b\n"
    record.count(1)


def test_no_init(run: Podman, record: Record) -> None:
    run({}, *annotated(init="none"), IMAGE, "/payload")
    if given := record.last():
        assert given["pid"] == 1
    run({}, IMAGE, "/payload")
    if given := record.last():
        assert given["pid"] != 1


def test_snapshot(run: Podman, record: Record) -> None:
    if record.km_is_real:
        pytest.skip("the image's snapshot is a bare header, which a real km cannot resume")
    run({}, IMAGE, "/snapshot")
    assert record.lines[-1]["payload_argv"] == ["/snapshot"]
    done = run({}, IMAGE, "/snapshot", "argument", status=None)
    assert done.returncode in (125, 126)
    assert "snapshot" in done.stderr
    record.count(1)


# Who may run without a VM


@pytest.fixture
def listed(machine: Machine, write_policy: Callable[..., Path]) -> Path:
    """A policy that lists the image's busybox."""
    content = (machine.directory / "rootfs/bin/busybox").read_bytes()
    entry = {"path": "/bin/busybox", "sha256": hashlib.sha256(content).hexdigest()}
    return write_policy(directInvocation=[entry])


@pytest.fixture
def container(podman: Client, record: Record, listed: Path) -> Iterator[Callable[..., Any]]:
    """podman exec in a container that was made under the policy `listed`."""
    name = f"krun-test-{os.urandom(6).hex()}"
    flag = f"--runtime-flag=policy={listed}"
    podman(flag, "run", "-d", "--name", name, *NONE, "-v", record.volume, IMAGE, "/payload", "nap")

    def execute(*argv: object, **keywords: Any) -> Any:
        return podman(flag, "exec", name, *argv, **keywords)

    yield execute
    podman("rm", "-f", "-t", "0", name, status=None)


def test_direct_invocation(run: Podman, record: Record, listed: Path) -> None:
    policy = {"policy": listed}
    assert run(policy, IMAGE, "/bin/busybox", "echo", "native").stdout == "native\n"
    record.count(0)
    assert run(policy, IMAGE, "/payload", "args", "vm").stdout == "vm\n"
    record.count(1)


def test_direct_invocation_by_exec(container: Callable[..., Any], record: Record) -> None:
    assert container("/bin/busybox", "echo", "native").stdout == "native\n"
    record.count(1)
    assert container("/payload", "args", "vm").stdout == "vm\n"
    record.count(2)


def test_changed_program_is_not_direct(
    run: Podman, record: Record, listed: Path, machine: Machine, tmp_path: Path
) -> None:
    """Same path, another file: mounted over, or another image."""
    other = tmp_path / "busybox"
    other.write_bytes((machine.directory / "rootfs/bin/busybox").read_bytes() + b"\0")
    other.chmod(0o755)
    mount = ["-v", f"{other}:/bin/busybox:ro"]
    run({"policy": listed}, *mount, IMAGE, "/bin/busybox", "echo", "x", status=None)
    record.count(1)


def test_container_cannot_swap_the_program_for_exec(
    container: Callable[..., Any], record: Record
) -> None:
    """The payload overwrites the listed program; exec runs the pinned copy or a VM, never that."""
    # The list is of files, and sh is a link to busybox.
    container("sh", "-c", "cp /payload /bin/other && mv /bin/other /bin/busybox")
    record.count(1)
    assert container("/payload", "read", "/bin/busybox").stdout[1:4] == "ELF"
    record.count(2)
    # The payload's first word is what it is to do: it knows no echo.
    assert container("/bin/busybox", "echo", "x").stdout == "x\n"
    record.count(2)


def test_exec_may_not_leave_the_vm_where_the_host_says_so(
    podman: Client, record: Record, listed: Path
) -> None:
    document = json.loads(listed.read_text())
    document["defaults"]["execOutsideVM"] = False
    listed.write_text(json.dumps(document))
    name = f"krun-test-{os.urandom(6).hex()}"
    flag = f"--runtime-flag=policy={listed}"
    try:
        volume = ["-v", record.volume]
        podman(flag, "run", "-d", "--name", name, *NONE, *volume, IMAGE, "/payload", "nap")
        assert podman(flag, "exec", name, "/bin/busybox", "echo", "x").stdout == "x\n"
        record.count(2)
    finally:
        podman("rm", "-f", "-t", "0", name, status=None)
