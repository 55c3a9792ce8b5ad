"""What runc and crun both take, and how they end; each was seen with Debian's packages of them."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from native_parts import Native, configuration

from krun.linux import cgroupfs

MAPPINGS = [{"containerID": 0, "hostID": 100000, "size": 65536}]


def test_members_that_are_null_are_absent(native: Native) -> None:
    document = configuration("id")
    document["process"].update(rlimits=None, oomScoreAdj=None)
    document["linux"].update(seccomp=None, maskedPaths=None)
    document["linux"]["resources"]["memory"] = {"limit": None}
    document.update(hooks=None, annotations=None)
    assert native.run(document).stdout.startswith("uid=0")
    name = native.start("sleep", "100")
    process = native.directory / "process.json"
    process.write_text(json.dumps({"args": ["id"], "cwd": "/", "user": None, "rlimits": None}))
    process_env = native("exec", "--process", process, name)
    assert process_env.stdout.startswith("uid=0")


def test_relative_sources_and_destinations(native: Native) -> None:
    (native.bundle / "data").mkdir()
    (native.bundle / "data/file").write_text("seen")
    document = configuration("cat", "/mnt/file")
    mount = {"destination": "mnt", "source": "data", "options": ["rbind", "ro"]}
    document["mounts"].append(mount)
    assert native.run(document).stdout == "seen"


def test_without_capabilities_there_are_none(native: Native) -> None:
    document = configuration("grep", "Cap", "/proc/self/status")
    del document["process"]["capabilities"]
    sets = [line.split()[1] for line in native.run(document).stdout.splitlines()]
    assert sets == ["0" * 16] * 5


def test_a_process_of_exec_has_the_containers_capabilities(native: Native) -> None:
    name = native.start("sleep", "100")
    process = native.directory / "process.json"
    process.write_text(json.dumps({"args": ["grep", "CapEff", "/proc/self/status"], "cwd": "/"}))
    seen = native("exec", "--process", process, name).stdout
    assert seen == native("exec", name, "grep", "CapEff", "/proc/self/status").stdout
    assert int(seen.split()[1], 16)
    native("exec", "--user", "4294967295", name, "true", status=255)


def test_a_device_over_a_device(native: Native) -> None:
    document = configuration("ls", "-l", "/dev/random")
    options = ["rbind"]
    document["mounts"].append(
        {"destination": "/dev/random", "source": "/dev/urandom", "options": options}
    )
    assert "1,   9" in native.run(document).stdout


def test_remount_with_options_of_the_file_system(native: Native) -> None:
    document = configuration("grep", " /dev ", "/proc/self/mounts")
    again = {"destination": "/dev", "type": "tmpfs", "options": ["remount", "size=10m", "noexec"]}
    document["mounts"].append(again)
    options = native.run(document).stdout.split()[3].split(",")
    assert {"size=10240k", "noexec"} <= set(options)
    again["options"] = ["remount", "zise=10m"]
    assert "Unknown parameter 'zise'" in native.run(document, 1).stderr


@pytest.mark.parametrize(
    ("propagation", "root", "below"),
    [
        ("shared", "shared", "-"),
        ("rshared", "shared", "shared"),
        ("unbindable", "unbindable", "-"),
        ("slave", "-", "-"),
        ("rprivate", "-", "-"),
    ],
)
def test_propagation_of_the_root(native: Native, propagation: str, root: str, below: str) -> None:
    document = configuration("cat", "/proc/self/mountinfo")
    document["linux"]["rootfsPropagation"] = propagation
    lines = [line.split() for line in native.run(document).stdout.splitlines()]
    found = {fields[4]: fields[6].partition(":")[0] for fields in lines}
    assert (found["/"], found["/proc"]) == (root, below)


def _log(kind: str, path: str, end: str = "") -> dict[str, Any]:
    script = f'echo {kind} $(grep -o \'"status": *"[a-z]*"\' | cut -d\'"\' -f4) >> {path}; {end}'
    return {"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/bin:/usr/bin"]}


@pytest.mark.parametrize("failing", ["prestart", "createRuntime", "createContainer", "payload"])
def test_poststop_follows_a_create_that_fails(native: Native, failing: str) -> None:
    log = native.bundle / "log"
    document = configuration("true" if failing != "payload" else "no-such-program")
    document["hooks"] = {"poststop": [_log("poststop", str(log))]}
    if failing != "payload":
        document["hooks"][failing] = [_log(failing, str(log), "exit 1")]
    native.run(document, None)
    lines = log.read_text().splitlines()
    assert lines[-1] == "poststop stopped"
    assert lines[:-1] == ([f"{failing} creating"] if failing != "payload" else [])


def test_a_container_is_created_when_start_container_hooks_run(native: Native) -> None:
    (native.rootfs / "bin/cut").symlink_to("busybox")
    document = configuration("cat", "/log")
    document["hooks"] = {"startContainer": [_log("startContainer", "/log")]}
    assert native.run(document).stdout == "startContainer created\n"


def test_a_fifo_is_no_namespace(native: Native) -> None:
    os.mkfifo(native.bundle / "fifo")
    document = configuration("true")
    spaces = [one for one in document["linux"]["namespaces"] if one["type"] != "ipc"]
    path = str(native.bundle / "fifo")
    document["linux"]["namespaces"] = [*spaces, {"type": "ipc", "path": path}]
    assert "Invalid argument" in native.run(document, 1, timeout=10).stderr


def _user(native: Native, document: dict[str, Any], **members: Any) -> None:
    subprocess.run(["chown", "-R", "100000:100000", native.rootfs], check=True)
    for directory in (native.directory, native.bundle):
        directory.chmod(0o755)
    document["linux"]["namespaces"].append({"type": "user", **members})


def test_ids_that_are_not_mapped_are_named(native: Native) -> None:
    document = configuration("true")
    _user(native, document)
    document["linux"].update(uidMappings=MAPPINGS, gidMappings=MAPPINGS)
    document["process"]["user"]["uid"] = 70000
    said = native.run(document, 1).stderr
    assert "become 70000 0: Invalid argument (is each of them mapped" in said


def test_devices_in_a_user_namespace_that_is_joined(native: Native) -> None:
    """The node has a name that the host has not, and the owner that the configuration wants."""
    with subprocess.Popen(["unshare", "-U", "sleep", "100"]) as holder:
        try:
            space = Path(f"/proc/{holder.pid}/ns/user")
            while os.readlink(space) == os.readlink("/proc/self/ns/user"):
                continue
            for name in ("uid_map", "gid_map"):
                Path(f"/proc/{holder.pid}/{name}").write_text("0 100000 65536")
            document = configuration("ls", "-ln", "/dev/other")
            _user(native, document, path=str(space))
            node = {"path": "/dev/other", "type": "c", "major": 1, "minor": 3}
            document["linux"]["devices"] = [{**node, "fileMode": 0o640, "uid": 5, "gid": 6}]
            fields = native.run(document).stdout.split()
        finally:
            holder.kill()
    assert fields[0] == "crw-r-----"
    assert fields[2:6] == ["5", "6", "1,", "3"]


def test_a_flag_for_listeners_without_one(native: Native) -> None:
    document = configuration("true")
    flags = ["SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"]
    document["linux"]["seccomp"] = {"defaultAction": "SCMP_ACT_ALLOW", "flags": flags}
    native.run(document)


def test_time_offsets_that_cannot_be(native: Native) -> None:
    document = configuration("true")
    document["linux"]["namespaces"].append({"type": "time"})
    document["linux"]["timeOffsets"] = {"monotonic": {"secs": -100_000_000}}
    assert "linux.timeOffsets: Numerical result out of range" in native.run(document, 1).stderr


def test_time_offsets_beside_a_new_user_namespace(native: Native) -> None:
    """Its root makes the time namespace, and writes to a file that other ids may not open."""
    document = configuration("sh", "-c", "cat /proc/self/timens_offsets; ls /proc/self/fd | wc -l")
    _user(native, document)
    document["linux"].update(uidMappings=MAPPINGS, gidMappings=MAPPINGS)
    document["linux"]["namespaces"].append({"type": "time"})
    document["linux"]["timeOffsets"] = {"boottime": {"secs": 2000}}
    inside = native.run(document).stdout.split()
    assert inside == ["monotonic", "0", "0", "boottime", "2000", "0", "4"]


def _memory(native: Native, name: str) -> Path:
    """The container's directory in the v1 hierarchy of memory."""
    if cgroupfs.version() == 2:
        pytest.skip("on v2 swap has a limit of its own")
    pid = native.state(name)["pid"]
    lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    path = next(line.split(":", 2)[2] for line in lines if line.split(":")[1] == "memory")
    return Path(f"/sys/fs/cgroup/memory{path}")


def test_a_swap_limit_is_lifted_for_another_one_alone(native: Native) -> None:
    mega = 1 << 20
    name = native.start("sleep", "100")
    place = _memory(native, name)
    files = [place / "memory.limit_in_bytes", place / "memory.memsw.limit_in_bytes"]

    def update(memory: str, swap: str, status: int = 0) -> list[int]:
        words = ["--memory", memory, *(["--memory-swap", swap] if swap else [])]
        native("update", *words, name, status=status)
        return [int(file.read_text()) for file in files]

    assert update("50m", "100m") == [50 * mega, 100 * mega]
    assert update("200m", "", 1) == [50 * mega, 100 * mega]
    assert update("200m", "300m") == [200 * mega, 300 * mega]
    assert update("-1", "")[1] > 1 << 60


def test_with_a_document_the_options_of_update_do_not_count(native: Native) -> None:
    name = native.start("sleep", "100")
    words = ("update", "--resources", "-", "--pids-limit", "9", name)
    native(*words, input='{"pids": {"limit": 8}, "memory": null}')
    pid = native.state(name)["pid"]
    lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    place = next(path for key, path in _places(lines) if key in ("pids", ""))
    assert (place / "pids.max").read_text() == "8\n"


def _places(lines: list[str]) -> list[tuple[str, Path]]:
    """Key and directory of each line of /proc/PID/cgroup, v1 before v2."""
    found = [line.split(":", 2)[1:] for line in lines]
    return sorted(((key, Path(f"/sys/fs/cgroup/{key}{path}")) for key, path in found), reverse=True)


def test_a_block_device_that_is_not_there(native: Native) -> None:
    if cgroupfs.version() == 2:
        pytest.skip("v2 says the same in words of its own")
    document = configuration("true")
    limit = {"major": 99, "minor": 0, "rate": 1000}
    document["linux"]["resources"]["blockIO"] = {"throttleReadBpsDevice": [limit]}
    assert "No such device (writing 99:0 1000)" in native.run(document, 1).stderr


def test_a_node_of_a_device_that_is_denied_after_all_was_allowed(native: Native) -> None:
    (native.rootfs / "bin/head").symlink_to("busybox")
    document = configuration("sh", "-c", "ls /dev/made; head -c 1 /dev/made")
    node = {"type": "c", "major": 1, "minor": 11}
    document["linux"]["devices"] = [{**node, "path": "/dev/made"}]
    rules = [{"allow": True, "access": "rwm"}, {**node, "allow": False, "access": "rwm"}]
    document["linux"]["resources"]["devices"] = rules
    done = native.run(document, 1)
    assert done.stdout == "/dev/made\n"
    assert "Operation not permitted" in done.stderr
