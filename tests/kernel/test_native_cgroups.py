"""cgroups of the native engine: the machine's own layout, and a pure v2 one with device filter."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from native_parts import Native, configuration

from krun.linux import bpf, cgroupfs
from krun.plan.devices import DEFAULT_RULES
from krun.plan.model import Rule

V2 = """
umount -l /sys/fs/cgroup && mount -t cgroup2 none /sys/fs/cgroup || exit 125
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
    if done.returncode == 125:
        pytest.skip("no cgroup v2 here")
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
    return found


@pytest.mark.parametrize("below", ["", "/below"])
def test_a_frozen_cgroup_is_refused(native: Native, below: str) -> None:
    name = native.name()
    freezers = _freezers(f"/{name}")
    assert freezers, "no freezer here"
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
                assert f"cgroup {directory}{below} is frozen" in done.stderr
                assert len(done.stderr.splitlines()) <= 2
                assert "does not exist" in native("state", name, status=1).stderr
                assert directory.exists(), "it was there before"
                assert not below or not (directory / "below").exists()
            (directory / file).write_text(no)
            native("run", "--bundle", native.bundle, name)
        finally:
            if directory.exists():
                (directory / file).write_text(no)
            for place in cgroupfs.directories(f"/{name}", cgroupfs.hierarchies()):
                cgroupfs.remove_tree(place.path)


def test_the_verifier_takes_every_shape_of_rules() -> None:
    everything = Rule(True, "a", -1, -1, "rwm")
    nothing = Rule(False, "a", -1, -1, "rwm")
    for rules in (
        (),
        (everything,),
        (nothing, *DEFAULT_RULES),
        (everything, Rule(False, "b", 8, -1, "w"), Rule(True, "c", -1, 3, "rm")),
    ):
        import os

        if os.geteuid() != 0:
            pytest.skip("needs root")
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
