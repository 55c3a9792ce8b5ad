"""The native engine's plans: golden files for recorded configurations, and single decisions."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from krun.errors import BadSpec
from krun.linux import flags as k
from krun.plan.build import build
from krun.plan.cgroups import plan_writes, weight_of_shares
from krun.plan.model import to_json
from krun.plan.mounts import plan_mount
from krun.plan.process import cpu_list, plan_process

DATA = Path(__file__).parent.parent / "data" / "bundles"
GOLDEN = Path(__file__).parent.parent / "golden" / "plans"
RECORDED = (
    "podman-run-defaults",
    "podman-run-userns-uidmap",
    "podman-run-limits",
    "docker-run-none",
    "containerd-ctr-run-seccomp",
    "containerd-cri-sandbox",
)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("name", RECORDED)
def test_plan_of_a_recorded_configuration(name: str, version: int) -> None:
    spec = json.loads((DATA / name / "config.json").read_text())
    plan = to_json(build(spec, "golden", "/bundle", version))
    # The filter is the configuration's own section, unchanged.
    plan["seccomp"] = bool(plan["seccomp"])
    text = json.dumps(plan, indent=1) + "\n"
    path = GOLDEN / f"{name}.v{version}.json"
    if os.environ.get("KRUN_WRITE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert path.read_text() == text


def test_no_file_is_left_over() -> None:
    named = {f"{name}.v{version}.json" for name in RECORDED for version in (1, 2)}
    assert {path.name for path in GOLDEN.iterdir()} == named


def mount(**members: Any) -> Any:
    return plan_mount({"destination": "/x", **members}, "mounts[0]")  # type: ignore[typeddict-item]


def test_mount_options() -> None:
    one = mount(type="bind", source="/s", options=["rbind", "ro", "nosuid", "rslave", "rnoexec"])
    assert (one.kind, one.recursive) == ("bind", True)
    assert one.set_ == k.MOUNT_ATTR_RDONLY | k.MOUNT_ATTR_NOSUID
    assert one.recursive_set == k.MOUNT_ATTR_NOEXEC
    assert one.propagation == (k.MS_SLAVE | k.MS_REC,)
    later = mount(
        type="tmpfs", options=["ro", "rw", "noatime", "strictatime", "size=1m", "mode=700"]
    )
    assert later.set_ == k.MOUNT_ATTR_STRICTATIME
    assert later.clear == k.MOUNT_ATTR_RDONLY | k.MOUNT_ATTR__ATIME
    assert later.options == (("size", "1m"), ("mode", "700"))


def test_destination_has_one_leading_slash() -> None:
    assert mount(destination="//proc/../dev/", type="tmpfs").destination == "/dev"


def test_idmap_option() -> None:
    one = mount(
        type="bind", source="/s", options=["bind", "idmap=uids=0-1000-10#10-5000-5;gids=0-1-1"]
    )
    assert one.idmap.uid_map == "0 1000 10\n10 5000 5"
    assert one.idmap.gid_map == "0 1 1"
    with pytest.raises(BadSpec, match="CONTAINER-HOST-SIZE"):
        mount(type="bind", source="/s", options=["bind", "idmap=uids=0-1000;gids=0-1-1"])


@pytest.mark.parametrize(
    ("members", "text"),
    [
        ({"source": "/s"}, "is required unless"),
        ({"type": "bind"}, "is required for a bind mount"),
        ({"type": "proc", "options": ["tmpcopyup"]}, "tmpfs alone"),
    ],
)
def test_bad_mounts(members: dict[str, Any], text: str) -> None:
    with pytest.raises(BadSpec, match=text):
        mount(**members)


def test_resources_of_both_versions() -> None:
    resources = {
        "memory": {"limit": 1000, "swap": 3000},
        "cpu": {"shares": 1024, "quota": 50000, "period": 100000, "cpus": "0-1"},
        "pids": {"limit": 0},
    }
    first = {one.file: one.value for one in plan_writes(1, resources)}
    assert first["memory.memsw.limit_in_bytes"] == "3000"
    assert first["cpu.cfs_quota_us"] == "50000"
    assert first["pids.max"] == "max"
    second = {one.file: one.value for one in plan_writes(2, resources)}
    assert second["memory.swap.max"] == "2000"
    assert second["cpu.max"] == "50000 100000"
    assert second["cpu.weight"] == "39"
    with pytest.raises(BadSpec, match=r"memory\.limit"):
        plan_writes(2, {"memory": {"swap": 5}})
    with pytest.raises(BadSpec, match="unified on cgroup v1"):
        plan_writes(1, {"unified": {"memory.high": "1"}})
    for name in ("NO-KEY", "memory/high"):
        text = f"linux.resources.unified: the specified key has not the form .* `{name}`"
        with pytest.raises(BadSpec, match=text):
            plan_writes(2, {"unified": {name: "1"}})


@pytest.mark.parametrize(("shares", "weight"), [(2, 1), (1024, 39), (262144, 10000), (1, 1)])
def test_weight_of_shares(shares: int, weight: int) -> None:
    assert weight_of_shares(shares) == weight


def test_cpu_list() -> None:
    assert cpu_list("0-2,7, 9", "x") == (0, 1, 2, 7, 9)
    with pytest.raises(BadSpec):
        cpu_list("a-b", "x")


def test_the_verb_prints_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from krun.__main__ import main

    (tmp_path / "rootfs" / "bin").mkdir(parents=True)
    (tmp_path / "rootfs" / "bin" / "sh").write_bytes(Path("/bin/busybox").read_bytes())
    (tmp_path / "rootfs" / "bin" / "sh").chmod(0o755)
    assert main(["spec", "--bundle", str(tmp_path)]) == 0
    words = ["--monitor", "builtin", "plan", "--bundle", str(tmp_path)]
    assert main(words) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["rootfs"] == str(tmp_path / "rootfs")
    assert plan["process"]["args"] == ["/bin/sh"]
    assert main([*words, "--annotation", "nonsense"]) == 2


def test_the_source_of_a_bind_mount_is_relative_to_the_bundle() -> None:
    def source(**members: Any) -> str:
        spec = {"root": {"path": "r"}, "mounts": [{"destination": "/x", **members}]}
        return build(spec, "c", "/bundle", 2).mounts[0].source  # type: ignore[arg-type]

    assert source(source="data", options=["rbind"]) == "/bundle/data"
    assert source(source="/data", options=["rbind"]) == "/data"
    assert source(source="data", type="tmpfs") == "data"


def test_nothing_is_mounted_on_the_root_itself() -> None:
    for destination in ("/", "/x/.."):
        with pytest.raises(BadSpec, match="is the root itself"):
            mount(destination=destination, type="tmpfs")
    assert mount(destination="/", options=["remount", "ro"]).kind == "remount"


def test_access_times_without_a_flag_are_the_kernels_default() -> None:
    assert mount(type="tmpfs", options=["norelatime"]).set_ == k.MOUNT_ATTR_RELATIME
    assert mount(type="tmpfs", options=["iversion"]).options == ()


def test_id_mappings_that_nothing_gives() -> None:
    with pytest.raises(BadSpec, match="only bind mounts"):
        mount(type="tmpfs", options=["idmap"])
    bare = {"destination": "/x", "source": "/s", "options": ["rbind", "ridmap"]}
    spec: Any = {"root": {"path": "r"}, "mounts": [bare]}
    with pytest.raises(BadSpec, match="needs uidMappings, or a new user namespace"):
        build(spec, "c", "/b", 2)


def test_a_mount_at_the_place_of_a_device_stays() -> None:
    on_random = {"destination": "/dev/random", "source": "/dev/urandom", "options": ["bind"]}
    spec: Any = {"root": {"path": "r"}, "mounts": [on_random]}
    paths = [device.path for device in build(spec, "c", "/b", 2).devices]
    assert "/dev/random" not in paths
    assert "/dev/urandom" in paths


def test_a_process_without_capabilities_has_none() -> None:
    assert not any(plan_process({"cwd": "/"}).capabilities)


@pytest.mark.parametrize(
    "user", [{"uid": 2**32 - 1}, {"gid": 2**32 - 1}, {"additionalGids": [2**32 - 1]}]
)
def test_the_id_that_is_none(user: Any) -> None:
    """setresuid(2) would leave the process root."""
    with pytest.raises(BadSpec, match="4294967295 is no user or group"):
        plan_process({"cwd": "/", "user": user})


def test_a_negative_priority_is_the_kernels_to_refuse() -> None:
    scheduler: Any = {"policy": "SCHED_FIFO", "priority": -1}
    found = plan_process({"cwd": "/", "scheduler": scheduler}).scheduler
    assert found is not None
    assert found[20:24] == b"\xff" * 4


def test_id_mappings_relative_to_the_containers() -> None:
    """The example of crun(1), idmap mount options."""
    option = "idmap=uids=@1-3-10#20-30-1;gids=@0-0-1"
    own = [
        {"containerID": 0, "hostID": 0, "size": 1},
        {"containerID": 1, "hostID": 2, "size": 1000},
    ]
    bind = {"destination": "/x", "source": "/s", "options": ["rbind", option]}
    spec: Any = {"root": {"path": "r"}, "mounts": [bind], "linux": {}}
    spaces = [{"type": "user"}, {"type": "mount"}]
    spec["linux"] = {"namespaces": spaces, "uidMappings": own, "gidMappings": own}
    found = build(spec, "c", "/b", 2).mounts[0].idmap
    assert found is not None
    assert (found.uid_map, found.gid_map) == ("1 4 10\n20 30 1", "0 0 1")
