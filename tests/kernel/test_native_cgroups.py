"""cgroups of the native engine: the machine's own layout, and a pure v2 one with device filter."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path

import needs
import pytest
from native_parts import Native, configuration

from krun.errors import KrunError
from krun.linux import bpf, cgroupfs, proc
from krun.plan.devices import DEFAULT_RULES
from krun.plan.model import Rule, Write

V2 = """
set -e; umount -l /sys/fs/cgroup; mount -t cgroup2 none /sys/fs/cgroup
exec "$@"
"""


def test_limits_of_the_machines_layout(native: Native) -> None:
    document = configuration("sleep", "100")
    document["linux"]["resources"] |= {"pids": {"limit": 33}, "memory": {"limit": 64 << 20}}
    native.write(document)
    name = native.name()
    native("run", "--detach", "--bundle", native.bundle, name, stdout=subprocess.DEVNULL)
    stats = json.loads(native("events", "--stats", name).stdout)["data"]
    assert stats["pids"]["limit"] == 33
    assert stats["memory"]["usage"]["limit"] == 64 << 20


def test_devices_are_denied(native: Native) -> None:
    document = configuration("sh", "-c", ": < /dev/zero && echo zero; : < /dev/fuse && echo fuse")
    device = {"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229, "fileMode": 0o666}
    document["linux"]["devices"] = [device]
    done = native.run(document, None)
    assert done.stdout == "zero\n"
    assert "Operation not permitted" in done.stderr


def test_pure_v2(native: Native) -> None:
    if "cgroup2" not in Path("/proc/filesystems").read_text():
        pytest.skip("the kernel has no cgroup v2 (CONFIG_CGROUPS)")
    script = "grep ^0: /proc/self/cgroup; : < /dev/zero && echo zero; : < /dev/fuse && echo fuse"
    document = configuration("sh", "-c", script)
    device = {"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229, "fileMode": 0o666}
    document["linux"]["devices"] = [device]
    document["linux"]["namespaces"] = [
        one for one in document["linux"]["namespaces"] if one["type"] != "cgroup"
    ]
    native.write(document)
    name = native.name()
    words = [*native.words, "run", "--bundle", str(native.bundle), name]
    done = subprocess.run(
        ["unshare", "-m", "--propagation", "private", "sh", "-c", V2, "sh", *words],
        capture_output=True,
        text=True,
        timeout=30,
        stdin=subprocess.DEVNULL,
    )
    assert done.stdout == f"0::/{name}\nzero\n", done.stderr
    assert "/dev/fuse: Operation not permitted" in done.stderr


def _freezers(path: str) -> list[tuple[Path, str, str]]:
    """Return, for each way to freeze here, a cgroup, its file and the words for yes and no."""
    found = []
    for place in cgroupfs.directories(path, cgroupfs.hierarchies()):
        if place.version == 2:
            found.append((Path(place.path), "cgroup.freeze", "1 0"))
        elif "freezer" in place.key.split(","):
            found.append((Path(place.path), "freezer.state", "FROZEN THAWED"))
    assert found, "no freezer here"
    return found


@pytest.mark.parametrize("below", ["", "/below"])
def test_a_frozen_cgroup_is_refused(native: Native, below: str) -> None:
    name = native.name()
    freezers = _freezers(f"/{name}")
    document = configuration("true")
    document["linux"]["cgroupsPath"] = f"/{name}{below}"
    native.write(document)
    for directory, file, words in freezers:
        yes, no = words.split()
        directory.mkdir()
        try:
            (directory / file).write_text(yes)
            for verb in ("create", "run"):
                done = native(verb, "--bundle", native.bundle, name, status=1)
                assert f"cgroup unexpectedly frozen: {directory}{below}" in done.stderr
                assert len(done.stderr.splitlines()) <= 2
                assert "does not exist" in native("state", name, status=1).stderr
                assert directory.exists(), "it was there before"
                assert not below or not (directory / "below").exists()
            (directory / file).write_text(no)
            native("run", "--bundle", native.bundle, name)
        finally:
            if directory.exists():
                (directory / file).write_text(no)
            _remove_cgroups(name)


def _in_cgroup(native: Native, below: str = "", hook: tuple[str, str] = ("", "")) -> str:
    """Write a configuration with a cgroup of the container's id at the top; returns the id.

    `hook` is a kind of hook, and the script it runs on the host, in which {} stands for the id.
    """
    name = native.name()
    document = configuration("sleep", "100")
    document["linux"]["cgroupsPath"] = f"/{name}{below}"
    kind, script = hook
    if kind:
        words = ["sh", "-c", script.format(name)]
        document["hooks"] = {kind: [{"path": "/bin/sh", "args": words}]}
    native.write(document)
    return name


def _held_up(where: str, call: str) -> list[str]:
    """The strace in front of a command that waits a second where it enters or exits a call."""
    strace = ["strace", "-qq", "-o", "/dev/null", "-e", f"trace={call}"]
    return [*strace, "-e", f"inject={call}:delay_{where}=1000000:when=1"]


# The numbers are x86-64's.
_NUMBERS = {"memfd_create": "319", "pidfd_open": "434"}


def _await_held_up(strace: subprocess.Popen[str], call: str) -> None:
    """Wait until the command of _held_up is in its call (proc_pid_syscall(5))."""
    children = Path(f"/proc/{strace.pid}/task/{strace.pid}/children")
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        for child in children.read_text().split():
            try:
                if Path(f"/proc/{child}/syscall").read_text().split()[0] == _NUMBERS[call]:
                    return
            except OSError:
                continue
        time.sleep(0.005)
    raise AssertionError(f"{call} was not reached")


def _remove_cgroups(name: str) -> None:
    for place in cgroupfs.directories(f"/{name}", cgroupfs.hierarchies()):
        cgroupfs.remove_tree(place.path)


@pytest.mark.parametrize("below", ["", "/below"])
@pytest.mark.parametrize("verb", ["create", "run"])
def test_frozen_while_it_is_made(native: Native, below: str, verb: str) -> None:
    """The check has passed already; the cgroup above it may not even be krun's to thaw."""
    for directory, file, words in _freezers("/"):
        yes, no = words.split()
        script = f"echo {yes} > {directory}/{{}}/{file}"
        name = _in_cgroup(native, below, ("createRuntime", script))
        try:
            done = native(verb, "--bundle", native.bundle, name, status=1, timeout=20)
            assert f"cgroup unexpectedly frozen: {directory}/{name}{below}" in done.stderr
            assert len(done.stderr.splitlines()) <= 2
            assert "does not exist" in native("state", name, status=1).stderr
            assert not below or not (directory / name / "below").exists()
        finally:
            _remove(directory / name / file, no, name)


def _remove(frozen: Path, word: str, name: str) -> None:
    if frozen.exists():
        frozen.write_text(word)
    _remove_cgroups(name)


@pytest.mark.parametrize("below", ["", "/below"])
def test_frozen_before_init_enters(native: Native, below: str) -> None:
    """The race itself: strace holds create between its look at the freezer and init's birth."""
    for directory, file, words in _freezers("/"):
        yes, no = words.split()
        name = _in_cgroup(native, below)
        words = [*_held_up("enter", "memfd_create"), *native.words]
        words += ["create", "--bundle", str(native.bundle), name]
        inside = Path(f"{directory}/{name}{below}")
        with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as create:
            _await_held_up(create, "memfd_create")
            assert inside.exists()
            try:
                (directory / name / file).write_text(yes)
                _, said = create.communicate(timeout=20)
                assert create.returncode == 1
                assert f"cgroup unexpectedly frozen: {inside}" in said
                assert not below or not inside.exists()
            finally:
                create.kill()
                _remove(directory / name / file, no, name)


@pytest.mark.parametrize("below", ["", "/below"])
def test_delete_of_a_killed_create_that_is_frozen(native: Native, below: str) -> None:
    for directory, file, words in _freezers("/"):
        yes, no = words.split()
        script = f"echo {yes} > {directory}/{{}}/{file}; kill -9 $PPID"
        name = _in_cgroup(native, below, ("createRuntime", script))
        try:
            native(
                "create",
                "--bundle",
                native.bundle,
                name,
                status=-9,
                stderr=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )
            state = json.loads((native.root / name / "state.json").read_text())
            native("delete", "--force", name)
            # Whoever reaps orphans here may not have come by yet.
            assert not proc.alive(state["pid"], state["start_time"])
            assert not (native.root / name).exists()
            assert not Path(f"{directory}/{name}{below}").exists()
        finally:
            _remove(directory / name / file, no, name)


def test_exec_into_a_cgroup_that_freezes(native: Native) -> None:
    for directory, file, words in _freezers("/"):
        yes, no = words.split()
        name = _in_cgroup(native)
        native("run", "--detach", "--bundle", native.bundle, name, stdout=subprocess.DEVNULL)
        words = [*_held_up("enter", "memfd_create"), *native.words, "exec", name, "true"]
        with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as exec_:
            _await_held_up(exec_, "memfd_create")
            (directory / name / file).write_text(yes)
            _, said = exec_.communicate(timeout=20)
            assert exec_.returncode == 255
            assert "unexpectedly frozen" in said
        (directory / name / file).write_text(no)
        assert len(json.loads(native("ps", "--format", "json", name).stdout)) == 1
        native("delete", "--force", name)


def test_start_of_what_freezes(native: Native) -> None:
    """start has given the word: it says what is wrong, and the payload runs once it is thawed."""
    directory, file, words = _freezers("/")[0]
    yes, no = words.split()
    name = _in_cgroup(native)
    native("create", "--bundle", native.bundle, name, stdout=subprocess.DEVNULL)
    start = [*_held_up("exit", "pidfd_open"), *native.words, "start", name]
    with subprocess.Popen(start, stderr=subprocess.PIPE, text=True) as started:
        _await_held_up(started, "pidfd_open")
        (directory / name / file).write_text(yes)
        _, said = started.communicate(timeout=20)
        assert started.returncode == 1
        assert f"cgroup unexpectedly frozen: {directory}/{name}" in said
    assert native.state(name)["status"] == "paused"
    (directory / name / file).write_text(no)
    end = time.monotonic() + 10
    while native.state(name)["status"] != "running":
        assert time.monotonic() < end
    native("delete", "--force", name)


def test_delete_of_what_was_moved_into_a_frozen_cgroup(native: Native) -> None:
    name = native.start("sleep", "100")
    pid = native.state(name)["pid"]
    for directory, file, words in _freezers(f"/{native.name()}"):
        yes, no = words.split()
        directory.mkdir()
        (directory / "cgroup.procs").write_text(str(pid))
        (directory / file).write_text(yes)
        try:
            native("delete", "--force", name)
            assert not Path(f"/proc/{pid}/root/bin").exists()
        finally:
            (directory / file).write_text(no)
            cgroupfs.remove_tree(str(directory))
        break


def test_period_and_quota_below_a_limit(native: Native) -> None:
    """The kernel looks at quota by period after each write of the two, below the pod's limit."""
    if not Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us").exists():
        pytest.skip("needs cgroup v1's cpu controller: v2 takes both in one write")
    name = native.name()
    pod = Path(f"/sys/fs/cgroup/cpu/{name}")
    pod.mkdir()
    document = configuration("sleep", "100")
    document["linux"]["cgroupsPath"] = f"/{name}/box"
    document["linux"]["resources"]["cpu"] = {"quota": 50000, "period": 100000}
    native.write(document)
    try:
        (pod / "cpu.cfs_quota_us").write_text("60000")
        native("run", "--detach", "--bundle", native.bundle, name, stdout=subprocess.DEVNULL)
        native("update", "--cpu-period", "10000", "--cpu-quota", "3000", name)
        found = [
            (pod / "box" / file).read_text() for file in ("cpu.cfs_period_us", "cpu.cfs_quota_us")
        ]
        assert found == ["10000\n", "3000\n"]
        native("delete", "--force", name)
    finally:
        _remove_cgroups(name)


EVERYTHING = Rule(True, "a", -1, -1, "rwm")


@needs.mark(root="eBPF programs")
@pytest.mark.parametrize(
    "rules",
    [
        (),
        (EVERYTHING,),
        (Rule(False, "a", -1, -1, "rwm"), *DEFAULT_RULES),
        (EVERYTHING, Rule(False, "b", 8, -1, "w"), Rule(True, "c", -1, 3, "rm")),
    ],
    ids=["none", "everything", "the default", "mixed"],
)
def test_the_verifier_takes_every_shape_of_rules(rules: tuple[Rule, ...]) -> None:
    os.close(bpf._load(bpf.assemble(rules)))


def test_hierarchies_and_directories(tmp_path: Path) -> None:
    for name in ("cpu", "systemd", "unified"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "cgroup.procs").touch()
    # A directory for a hierarchy that is mounted elsewhere only.
    (tmp_path / "net_cls,net_prio").mkdir()
    own = "3:net_cls,net_prio:/\n2:cpu:/a\n1:name=systemd:/b\n0::/c/d\n"
    found = cgroupfs.hierarchies(str(tmp_path), own)
    assert [(one.mountpoint, one.version) for one in found] == [
        (f"{tmp_path}/cpu", 1),
        (f"{tmp_path}/systemd", 1),
        (f"{tmp_path}/unified", 2),
    ]
    assert [one.path for one in cgroupfs.directories("x", found)] == [
        f"{tmp_path}/cpu/a/x",
        f"{tmp_path}/systemd/b/x",
        f"{tmp_path}/unified/c/x",
    ]
    assert cgroupfs.directories("/../../p/x", found)[0].path == f"{tmp_path}/cpu/p/x"


def test_a_cgroup_that_goes_meanwhile(native: Native) -> None:
    """Two that clean up at once, as delete and run do: gone is gone, at every moment."""
    [place] = [
        one
        for one in cgroupfs.directories(f"/{native.name()}", cgroupfs.hierarchies())
        if "pids" in one.key.split(",") or (one.version == 2 and cgroupfs.version() == 2)
    ]
    seconds = 1.0
    child = os.fork()
    if child == 0:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            os.mkdir(place.path)
            os.rmdir(place.path)
        os._exit(0)
    frozen = (place._replace(key="freezer"),)
    found = 0
    while os.waitpid(child, os.WNOHANG)[0] == 0:
        cgroupfs.frozen(frozen)
        cgroupfs.kill((place,), 9)
        cgroupfs.remove_tree(f"{place.path}/none")
        try:
            cgroupfs.read(f"{place.path}/cgroup.procs")
            found += 1
        except FileNotFoundError:
            continue
    assert found, "the two never met"


@pytest.mark.parametrize(
    ("write", "refused"),
    [
        (Write("cpuset", "cpuset.cpus", "0"), True),
        (Write("foo", "foo.bar", "x"), True),
        (Write("pids", "pids.max", "max"), False),
        (Write("cpu", "cpu.idle", "0"), False),
    ],
)
def test_a_controller_that_is_not_there(tmp_path: Path, write: Write, refused: bool) -> None:
    places = (cgroupfs.Directory("", str(tmp_path), 2),)
    if not refused:
        cgroupfs.apply((write,), places)
        return
    text = f"the requested cgroup controller `{write.controller}` is not available"
    with pytest.raises(KrunError, match=text):
        cgroupfs.apply((write,), places)
