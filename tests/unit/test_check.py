"""krun check: what is judged of a machine, and that this one is seen as it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import needs
import pytest

from krun import checks, inspection
from krun.checks import FAILURE, OK, WARNING, Device, Facts, Finding, Program

ROOT = Path(__file__).resolve().parent.parent.parent

GOOD = Facts(
    kernel="6.1.0-13-amd64",
    machine="x86_64",
    cpu_flags=frozenset({"fpu", "svm"}),
    devices=(Device("/dev/kvm", True, 0o666), Device("/dev/kkm")),
    crun=Program("/usr/bin/crun", "1.8.1"),
    km=Program("/opt/kontain/bin/km", "0.9.9"),
    init=Program("/usr/bin/tini-static"),
    podman=Program("/usr/bin/podman", "4.3.1"),
    docker=Program("/usr/bin/docker", "20.10.24"),
    containerd=Program("/usr/bin/containerd", "1.6.20"),
    cgroup="v2",
    controllers=("cpu", "memory", "pids"),
    seccomp=True,
    libseccomp="libseccomp.so.2",
    newuidmap=Program("/usr/bin/newuidmap"),
    newgidmap=Program("/usr/bin/newgidmap"),
    user="ann",
    euid=1000,
    user_namespaces=True,
    subuid=True,
    subgid=True,
    packages=(),
    native=True,
    builtin=True,
)
NOTHING = Program()


def changed(**facts: object) -> dict[str, Finding]:
    return {finding.name: finding for finding in checks.judge(GOOD._replace(**facts))}


def test_a_complete_machine_has_nothing_to_improve() -> None:
    findings = checks.judge(GOOD)
    assert {finding.status for finding in findings} == {OK}
    assert checks.can_run(findings)
    assert not any(finding.way_out for finding in findings)


# Facts that differ, the finding's name, its status with and without krun's own engine and monitor.
CASES = [
    ({"kernel": "5.4.0-1-amd64"}, "kernel", FAILURE),
    ({"kernel": "5.10.0"}, "kernel", WARNING),
    ({"kernel": "5.12.0"}, "kernel", OK),
    ({"machine": "aarch64"}, "cpu", FAILURE),
    ({"cpu_flags": frozenset()}, "cpu", WARNING),
    ({"cpu_flags": frozenset({"vmx"})}, "cpu", OK),
    ({"devices": (Device("/dev/kvm"), Device("/dev/kkm"))}, "/dev/kvm", FAILURE),
    (
        {"devices": (Device("/dev/kvm", True, 0o600, "open: Permission denied"),)},
        "/dev/kvm",
        FAILURE,
    ),
    (
        {
            "devices": (
                Device("/dev/kvm", True, 0o600, "open: Permission denied"),
                Device("/dev/kkm", True, 0o666),
            )
        },
        "/dev/kvm",
        WARNING,
    ),
    ({"devices": (Device("/dev/kvm", True, 0o660),)}, "rootless device", WARNING),
    ({"crun": NOTHING}, "crun", WARNING),
    ({"crun": NOTHING, "native": False}, "crun", FAILURE),
    ({"crun": Program("/usr/bin/crun", "0.14"), "native": False}, "crun", FAILURE),
    ({"crun": Program("/usr/bin/crun", "", "Exec format error"), "native": False}, "crun", FAILURE),
    ({"cgroup": "hybrid"}, "crun", WARNING),
    ({"cgroup": "hybrid", "native": False}, "crun", FAILURE),
    ({"libseccomp": ""}, "native engine", WARNING),
    ({"km": NOTHING}, "km", WARNING),
    ({"km": NOTHING, "builtin": False}, "km", FAILURE),
    ({"km": Program("/km", "", "Permission denied"), "builtin": False}, "km", FAILURE),
    ({"init": NOTHING}, "init", WARNING),
    ({"cgroup": "none", "controllers": ()}, "cgroup", FAILURE),
    ({"controllers": ("memory", "pids")}, "cgroup", WARNING),
    ({"seccomp": False}, "seccomp", WARNING),
    ({"policy_error": "/etc/krun/policy.json: line 1"}, "policy", FAILURE),
    ({"launcher_stale": "/usr/local/bin/krun"}, "launcher", WARNING),
    ({"start": "stale"}, "start", WARNING),
    ({"podman": NOTHING}, "podman", WARNING),
    ({"docker": Program("/usr/bin/docker", "", "status 1")}, "docker", WARNING),
    ({"containerd": NOTHING}, "containerd", WARNING),
    ({"newuidmap": NOTHING}, "rootless", WARNING),
    ({"newgidmap": Program("/usr/bin/newgidmap", "", "not setuid")}, "rootless", WARNING),
    ({"subuid": False}, "rootless", WARNING),
    ({"subuid": False, "euid": 0}, "rootless", OK),
    ({"user_namespaces": False}, "rootless", WARNING),
    ({"no_new_privs": True}, "rootless", WARNING),
    ({"euid": 0}, "capabilities", OK),
    ({"euid": 0, "lacking": ("MKNOD",)}, "capabilities", WARNING),
    ({"euid": 0, "lacking": ("SYS_ADMIN", "MKNOD")}, "capabilities", FAILURE),
    ({"packages": ("rich",)}, "packages", WARNING),
]


@pytest.mark.parametrize(("facts", "name", "status"), CASES)
def test_each_fact_is_judged(facts: dict[str, object], name: str, status: str) -> None:
    findings = changed(**facts)
    assert findings[name].status == status, findings[name]
    assert bool(findings[name].way_out) == (status != OK), "a way out exactly where one is needed"
    assert checks.can_run(list(findings.values())) == (status != FAILURE)


def test_kkm_alone_runs_km_but_not_the_built_in_monitor() -> None:
    devices = (Device("/dev/kvm"), Device("/dev/kkm", True, 0o666))
    findings = changed(devices=devices)
    assert "/dev/kvm" not in findings
    assert findings["built-in monitor"].status == WARNING
    assert checks.can_run(list(findings.values()))
    assert not checks.can_run(list(changed(devices=devices, km=NOTHING).values()))


@pytest.mark.parametrize(
    ("mounts", "layout", "controllers"),
    [
        ("", "none", ()),
        ("proc /proc proc rw 0 0\n", "none", ()),
        (
            "cgroup /sys/fs/cgroup/cpu,cpuacct cgroup rw,nosuid,relatime,cpu,cpuacct 0 0\n"
            "cgroup /sys/fs/cgroup/systemd cgroup rw,xattr,name=systemd 0 0\n",
            "v1",
            ("cpu", "cpuacct"),
        ),
        (
            "cgroup /sys/fs/cgroup/memory cgroup rw,memory 0 0\n"
            "cgroup2 /sys/fs/cgroup/nonexistent cgroup2 rw 0 0\n",
            "hybrid",
            ("memory",),
        ),
        ("cgroup2 /sys/fs/cgroup/nonexistent cgroup2 rw 0 0\n", "v2", ()),
    ],
)
def test_cgroup_layout(mounts: str, layout: str, controllers: tuple[str, ...]) -> None:
    assert inspection.cgroup_layout(mounts) == (layout, controllers)


def test_devices_are_tried(tmp_path: Path) -> None:
    assert inspection.try_device(str(tmp_path / "none")) == Device(str(tmp_path / "none"))
    assert "API" in inspection.try_device("/dev/null").error or inspection.try_device(
        "/dev/null"
    ).error.startswith("no VM")
    plain = tmp_path / "plain"
    plain.write_text("")
    assert inspection.try_device(str(plain)).error == "is no device"
    if os.path.exists("/dev/kvm") and os.access("/dev/kvm", os.W_OK):
        before = set(os.listdir("/proc/self/fd"))
        found = inspection.try_device("/dev/kvm")
        assert found.present and not found.error
        assert set(os.listdir("/proc/self/fd")) == before


def test_versions_are_read(km: Path, tmp_path: Path) -> None:
    """km's own comes through its log; a program that fails says why."""
    found = inspection.version_of(str(km), "--km-log-to=stderr", "--version")
    assert found.version and not found.error, found
    assert inspection.version_of("/bin/false", "--version").error
    broken = tmp_path / "broken"
    broken.write_bytes(b"\x7fELF")
    broken.chmod(0o755)
    assert "xec format error" in inspection.version_of(str(broken)).error
    assert inspection.version_of("") == NOTHING


def krun(*words: str, before: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    argv = [*before, sys.executable, "-m", "krun", *words]
    return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)


@needs.mark("setpriv", root="capabilities to give away")
def test_command_sees_what_its_caller_may_not() -> None:
    """As in a container, or in a service with NoNewPrivileges=yes."""
    less = ("setpriv", "--no-new-privs", "--bounding-set=-mknod,-sys_admin", "--")
    done = krun("check", "--format", "json", before=less)
    found = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert found["capabilities"]["status"] == "failure"
    assert "CAP_SYS_ADMIN, CAP_MKNOD" in found["capabilities"]["found"]
    assert "no_new_privs" in found["rootless"]["found"]
    assert done.returncode == 1


def test_command_with_everything_there(km: Path, tmp_path: Path) -> None:
    policy = tmp_path / "policy.json"
    policy.write_text(json.dumps({"paths": {"km": str(km)}}))
    done = krun("--policy", str(policy), "check", "--format", "json")
    document = json.loads(done.stdout)
    found = {check["name"]: check for check in document["checks"]}
    assert done.returncode == (0 if document["canRun"] else 1)
    failed = [check for check in document["checks"] if check["status"] == "failure"]
    assert document["canRun"] == (not failed)
    assert found["km"]["status"] == "ok" and str(km) in found["km"]["found"]
    assert found["kernel"]["found"] == os.uname().release
    assert found["policy"]["found"] == str(policy)


def test_command_names_a_wrong_policy(tmp_path: Path) -> None:
    policy = tmp_path / "policy.json"
    policy.write_text("{]")
    done = krun("--policy", str(policy), "check")
    assert done.returncode == 1
    assert str(policy) in done.stdout and "containers cannot run" in done.stdout
    assert "traceback" not in done.stderr.lower()
