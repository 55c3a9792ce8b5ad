"""The systemd cgroup driver with a real systemd, on the machine's v1 or hybrid layout and on v2."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import installed
import pytest
from e2e.machine import make_containers_conf
from native_parts import Native, configuration
from native_systemd import Systemd, need


@pytest.fixture(params=["v1", "v2"])
def systemd(request: pytest.FixtureRequest, native: Native) -> Iterator[Systemd]:
    need()
    one = Systemd(native, request.param)
    yield one
    assert one.close() == []


def written(native: Native, *args: str, **linux: Any) -> str:
    """Write a configuration for a scope test-ID.scope in test.slice; returns the id."""
    name = native.name()
    document = configuration(*args)
    document["linux"] |= {"cgroupsPath": f"test.slice:test:{name}", **linux}
    native.write(document)
    return name


def limits(systemd: Systemd) -> dict[str, Any]:
    """Limits that this layout has the controllers for."""
    found = {"devices": [{"allow": False, "access": "rwm"}]}
    if systemd.run("sh", "-c", "test -e /sys/fs/cgroup/cgroup.controllers", status=None).returncode:
        found |= {"memory": {"limit": 64 << 20}, "cpu": {"shares": 512}, "pids": {"limit": 1}}
    return found


def test_life(systemd: Systemd) -> None:
    native = systemd.native
    fuse = {"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229, "fileMode": 0o666}
    name = written(native, "sleep", "100", resources=limits(systemd), devices=[fuse])
    unit = f"test-{name}.scope"
    systemd.krun("create", "--bundle", native.bundle, name, quiet=True)
    shown = systemd.show(unit, "ActiveState", "ControlGroup", "Slice", "Delegate", "DevicePolicy")
    cgroup = f"/{systemd.cgroup}/test.slice/{unit}"
    assert shown == {
        "ActiveState": "active",
        "ControlGroup": cgroup,
        "Slice": "test.slice",
        "Delegate": "yes",
        "DevicePolicy": "strict",
    }
    pid = json.loads(systemd.krun("state", name).stdout)["pid"]
    places = systemd.run("cat", f"/proc/{pid}/cgroup").stdout.splitlines()
    if systemd.layout == "v2":
        # The others are not mounted there.
        places = [line for line in places if line.startswith("0::")]
    assert {line.split(":", 2)[2] for line in places} == {cgroup}
    assert (
        systemd.run(
            "cat", f"/sys/fs/cgroup/{systemd_hierarchy(systemd)}{cgroup}/cgroup.procs"
        ).stdout
        == f"{pid}\n"
    ), "the placeholder is gone"
    systemd.krun("start", name)
    if "pids" in limits(systemd):
        limited = systemd.show(unit, "TasksMax", "MemoryLimit", "CPUShares")
        assert limited == {"TasksMax": "1", "MemoryLimit": str(64 << 20), "CPUShares": "512"}
        memory = systemd.run("cat", f"/sys/fs/cgroup/memory{cgroup}/memory.limit_in_bytes")
        assert memory.stdout == f"{64 << 20}\n"
        systemd.krun("update", "--memory", str(32 << 20), "--pids-limit", "7", name)
        limited = systemd.show(unit, "TasksMax", "MemoryLimit")
        assert limited == {"TasksMax": "7", "MemoryLimit": str(32 << 20)}
        memory = systemd.run("cat", f"/sys/fs/cgroup/memory{cgroup}/memory.limit_in_bytes")
        assert memory.stdout == f"{32 << 20}\n"
    # systemd has written its own device rules once more; they are krun's.
    systemd.run("systemctl", "daemon-reload")
    script = ": < /dev/zero && echo zero; : < /dev/fuse"
    done = systemd.krun("exec", name, "sh", "-c", script, status=None)
    assert done.stdout == "zero\n", done.stderr
    assert "/dev/fuse: Operation not permitted" in done.stderr
    systemd.krun("kill", name, "KILL")
    wait_for_end(systemd, name)
    systemd.krun("delete", name)
    assert systemd.units() == []


def systemd_hierarchy(systemd: Systemd) -> str:
    """Where systemd itself finds a unit's processes, below /sys/fs/cgroup."""
    for place in ("unified", "systemd"):
        if not systemd.run("test", "-d", f"/sys/fs/cgroup/{place}", status=None).returncode:
            return place
    return "."


def wait_for_end(systemd: Systemd, name: str) -> None:
    end = time.monotonic() + 10
    while '"stopped"' not in systemd.krun("state", name).stdout:
        assert time.monotonic() < end
        time.sleep(0.02)


def test_run_sees_its_cgroup(systemd: Systemd) -> None:
    name = written(systemd.native, "cat", "/proc/self/cgroup")
    done = systemd.krun("run", "--bundle", systemd.native.bundle, name)
    # Its cgroup namespace begins where it is, so nothing of the host's path shows.
    assert {line.split(":", 2)[2] for line in done.stdout.splitlines()} == {"/"}
    assert systemd.units() == []


def test_without_a_path_systemd_chooses(systemd: Systemd) -> None:
    native = systemd.native
    name = native.name()
    native.write(configuration("sleep", "100"))
    systemd.krun("run", "--detach", "--bundle", native.bundle, name, quiet=True)
    assert systemd.show(f"krun-{name}.scope", "Slice") == {"Slice": "system.slice"}
    systemd.krun("delete", "--force", name)


@pytest.mark.parametrize("systemd", ["v1"], indirect=True)
def test_annotations_become_properties(systemd: Systemd) -> None:
    native = systemd.native
    name = written(native, "sleep", "100")
    document = configuration("sleep", "100")
    document["linux"]["cgroupsPath"] = f"test.slice:test:{name}"
    document["annotations"] = {
        "org.systemd.property.TimeoutStopUSec": "uint64 7000000",
        "org.systemd.property.Description": "'by hand'",
        "org.systemd.property.DefaultDependencies": "true",
    }
    native.write(document)
    systemd.krun("run", "--detach", "--bundle", native.bundle, name, quiet=True)
    wanted = {"TimeoutStopUSec": "7s", "Description": "by hand", "DefaultDependencies": "yes"}
    assert systemd.show(f"test-{name}.scope", *wanted) == wanted
    systemd.krun("delete", "--force", name)


def test_a_failed_create_leaves_no_scope(systemd: Systemd) -> None:
    name = written(systemd.native, "nothing-of-the-kind")
    done = systemd.krun("run", "--bundle", systemd.native.bundle, name, status=127)
    assert "executable file not found" in done.stderr
    assert systemd.units() == []


@pytest.mark.parametrize("when", ["createRuntime", "poststart"])
def test_a_killed_krun_leaves_what_delete_removes(systemd: Systemd, when: str) -> None:
    native = systemd.native
    name = native.name()
    document = configuration("sleep", "100")
    document["linux"]["cgroupsPath"] = f"test.slice:test:{name}"
    document["hooks"] = {when: [{"path": "/bin/sh", "args": ["sh", "-c", "kill -9 $PPID"]}]}
    native.write(document)
    systemd.krun("run", "--detach", "--bundle", native.bundle, name, quiet=True, status=None)
    systemd.krun("delete", "--force", name)
    assert systemd.units() == []
    assert not (native.root / name).exists()


@pytest.mark.parametrize("systemd", ["v1"], indirect=True)
def test_the_same_name_twice(systemd: Systemd) -> None:
    native = systemd.native
    written(native, "sleep", "100")
    name = native.name()
    document = configuration("sleep", "100")
    document["linux"]["cgroupsPath"] = "test.slice:test:same"
    native.write(document)
    systemd.krun("run", "--detach", "--bundle", native.bundle, name, quiet=True)
    other = native.name()
    done = systemd.krun("create", "--bundle", native.bundle, other, status=1)
    assert "systemd: Unit test-same.scope" in done.stderr
    assert systemd.show("test-same.scope", "ActiveState") == {"ActiveState": "active"}
    assert not (native.root / other).exists()


@pytest.mark.parametrize("systemd", ["v2"], indirect=True)
def test_through_a_bus(systemd: Systemd) -> None:
    """With dbus-daemon between, and systemd's own socket out of reach."""
    native = systemd.native
    systemd.start_bus()
    systemd.run("mount", "--bind", "/dev/null", "/run/systemd/private")
    name = written(native, "sleep", "100")
    systemd.krun("run", "--detach", "--bundle", native.bundle, name, quiet=True)
    assert '"running"' in systemd.krun("state", name).stdout
    systemd.krun("delete", "--force", name)
    systemd.run("umount", "/run/systemd/private")


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("/a/b", "not slice:prefix:name"),
        ("a:b:c", "a is not the name of a slice"),
        ("a--b.slice:b:c", "not the name of a slice"),
        ("a.slice:b:c.slice", "is a slice"),
        ("a.slice:b:c/d", "not the name of a unit"),
    ],
)
def test_bad_paths(native: Native, path: str, text: str) -> None:
    document = configuration("true")
    document["linux"]["cgroupsPath"] = path
    native.write(document)
    words = ("--systemd-cgroup", "create", "--bundle", native.bundle, native.name())
    done = native(*words, status=1)
    assert text in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_without_systemd_it_says_so(native: Native) -> None:
    native.write(configuration("true"))
    words = ["--systemd-cgroup", "run", "--bundle", str(native.bundle), native.name()]
    # Without a package of anybody's.
    code = f"import sys; sys.path.insert(0, {str(installed.REPOSITORY)!r})"
    code += "; from krun.__main__ import console; console()"
    bare = ["/usr/bin/python3", "-IS", "-c", code, "--engine", "native"]
    done = subprocess.run([*bare, *words], capture_output=True, text=True, timeout=20)
    assert done.returncode == 1
    assert "jeepney is not installed" in done.stderr
    environ = os.environ | {"DBUS_SYSTEM_BUS_ADDRESS": f"unix:path={native.directory}/none"}
    inside = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs none /run && exec "$@"', "sh"]
    done = subprocess.run(
        [*inside, *native.words, *words],
        capture_output=True,
        text=True,
        timeout=20,
        env=environ,
    )
    assert done.returncode == 1
    assert "no systemd answers" in done.stderr
    assert "--cgroup-manager cgroupfs" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_podman(systemd: Systemd) -> None:
    """podman --cgroup-manager=systemd, whose conmon has a scope of its own."""
    native = systemd.native
    systemd.start_bus()
    home = native.directory / "podman"
    home.mkdir()
    wrapper = home / "krun"
    wrapper.write_text(f'#!/bin/sh\nexec {shlex.join(native.words[:-2])} "$@"\n')
    wrapper.chmod(0o755)
    conf = make_containers_conf(home / "containers.conf", str(wrapper))
    conf.write_text(conf.read_text().replace('"cgroupfs"', '"systemd"'))
    tar = ["tar", "-C", str(native.rootfs), "-cf", str(home / "image.tar"), "."]
    subprocess.run(tar, check=True)

    def podman(*argv: object, status: int | None = 0) -> str:
        # Its paths may not be long; this /run is the systemd's own.
        places = (
            "--root",
            "/run/box/root",
            "--runroot",
            "/run/box/run",
            "--tmpdir",
            "/run/box/tmp",
        )
        fixed = ("--storage-driver", "vfs", "--events-backend", "file", "--runtime", "krun")
        words = ("env", f"CONTAINERS_CONF={conf}", "podman", *places, *fixed, *argv)
        return systemd.run(*words, status=status).stdout

    # The machine's v2 may lack the controller of podman's default limit.
    run = ("run", "--log-driver", "k8s-file", "--network", "none", "--pids-limit", "-1")
    podman("import", home / "image.tar", "localhost/box:1")
    identifier = podman(*run, "-d", "--name", "box", "localhost/box:1", "/bin/sleep", "99").strip()
    scope = f"libpod-{identifier}.scope"
    assert set(systemd.units()) == {f"libpod-conmon-{identifier}.scope", scope}
    assert systemd.show(scope, "Slice", "Delegate") == {"Slice": "machine.slice", "Delegate": "yes"}
    podman("exec", "box", "/bin/true")
    podman("rm", "-f", "-t", "0", "box")
    end = time.monotonic() + 10
    while systemd.units():
        assert time.monotonic() < end, systemd.units()
    assert podman(*run, "--rm", "localhost/box:1", "/bin/id", "-u") == "0\n"


USER = 4711
# systemd's user instance asks whether the machine was booted with systemd; on v2 it needs a cgroup
# that is the user's.
USER_START = r"""
set -e
umount -l /sys/fs/cgroup
mount -t cgroup2 none /sys/fs/cgroup
mount -t tmpfs tmpfs /run
mkdir -p /run/systemd/system "$2/units" "/sys/fs/cgroup/$1/user"
printf '[Unit]\nDefaultDependencies=no\n' | tee "$2/units/default.target" > "$2/units/exit.target"
chown -R "$3:$3" "/sys/fs/cgroup/$1" "$2"
echo $$ > "/sys/fs/cgroup/$1/user/cgroup.procs"
exec setpriv --reuid "$3" --regid "$3" --clear-groups env -i HOME=/tmp PATH="$PATH" \
  XDG_RUNTIME_DIR="$2" SYSTEMD_LOG_TARGET=console \
  SYSTEMD_UNIT_PATH="$2/systemd/transient:$2/units" \
  /lib/systemd/systemd --user
"""
USER_CALL = r"""
mkdir -p "$1/user/caller" && echo $$ > "$1/user/caller/cgroup.procs"
runtime=$2 user=$3
shift 3
exec setpriv --reuid "$user" --regid "$user" --clear-groups env -i HOME=/tmp PATH=/usr/bin:/bin \
  XDG_RUNTIME_DIR="$runtime" "$@"
"""


def test_of_an_ordinary_user(native: Native) -> None:
    """The user's own systemd makes the scope; the container has a user namespace."""
    name = native.name()
    document = configuration("cat", "/proc/self/cgroup")
    linux = document["linux"]
    linux["namespaces"] = [one for one in linux["namespaces"] if one["type"] != "cgroup"]
    linux["namespaces"].append({"type": "user"})
    linux["uidMappings"] = [{"containerID": 0, "hostID": USER, "size": 1}]
    linux["gidMappings"] = [{"containerID": 0, "hostID": USER, "size": 1}]
    linux["cgroupsPath"] = f"user.slice:libpod:{name}"
    del linux["resources"]
    native.write(document)
    for top, directories, files in os.walk(native.directory):
        for one in (top, *(f"{top}/{each}" for each in directories + files)):
            os.chown(one, USER, USER, follow_symlinks=False)
    group, runtime = f"krun-user-{os.urandom(6).hex()}", f"/run/user/{USER}"
    words = ["unshare", "-m", "--propagation", "private", "sh", "-c", USER_START, "sh"]
    manager = subprocess.Popen([*words, group, runtime, str(USER)], stdin=subprocess.DEVNULL)
    place = Path(f"/proc/{manager.pid}/root/sys/fs/cgroup/{group}")

    def call(*argv: object) -> str:
        inside = ["nsenter", "-t", str(manager.pid), "-m", "--wd=/", "sh", "-c", USER_CALL, "sh"]
        told = [f"/sys/fs/cgroup/{group}", runtime, str(USER), *map(str, argv)]
        output = native.directory / "said"
        with output.open("w") as said:
            done = subprocess.run(
                [*inside, *told], stdin=subprocess.DEVNULL, stdout=said, stderr=said, timeout=30
            )
        assert done.returncode == 0, output.read_text()
        return output.read_text()

    try:
        end = time.monotonic() + 10
        while (
            not (place / "user/init.scope").exists()
            or not Path(f"/proc/{manager.pid}/root{runtime}/systemd/private").exists()
        ):
            assert time.monotonic() < end
            assert manager.poll() is None
            time.sleep(0.05)
        krun = (*native.words, "--systemd-cgroup")
        said = call(*krun, "run", "--bundle", native.bundle, name)
        scope = f"/{group}/user/user.slice/libpod-{name}.scope"
        assert f"0::{scope}" in said.splitlines()
        document["process"]["args"] = ["sleep", "100"]
        native.write(document)
        call(*krun, "create", "--bundle", native.bundle, name)
        assert len((place / scope.split("/", 2)[2] / "cgroup.procs").read_text().split()) == 1
        call(*krun, "start", name)
        call(*krun, "exec", name, "true")
        call(*krun, "delete", "--force", name)
        assert not (place / scope.split("/", 2)[2]).exists()
    finally:
        manager.kill()
        manager.wait(10)
        for top in (Path("/sys/fs/cgroup/unified"), Path("/sys/fs/cgroup")):
            for directory, _, _ in os.walk(top / group, topdown=False):
                os.rmdir(directory)
