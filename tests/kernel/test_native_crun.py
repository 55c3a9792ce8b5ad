"""What crun's own tests expect of a runtime, and its annotations, with the native engine."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from native_parts import Native, configuration
from needs import need

SLEEP = ("sleep", "100")
ALL_IDS = [{"containerID": 0, "hostID": 0, "size": 0xFFFFFFFF}]


def with_users(document: dict[str, Any], maps: list[dict[str, int]]) -> dict[str, Any]:
    """Add a user namespace."""
    linux = document["linux"]
    linux["namespaces"].append({"type": "user"})
    linux["uidMappings"] = linux["gidMappings"] = maps
    return document


def device(**members: Any) -> dict[str, Any]:
    return {"path": "/dev/made", "type": "c", "major": 1, "minor": 7, **members}


@pytest.mark.parametrize("shift", [0, 100000])
def test_nodes_in_a_user_namespace(native: Native, shift: int) -> None:
    """The host has no /dev/made; owner and mode are the configuration's."""
    script = "stat -c '%u:%g %a %t:%T' /dev/made /dev/other; head -c 1 /dev/made | od -An -tx1"
    for name in ("stat", "head", "od"):
        os.symlink("busybox", native.rootfs / "bin" / name)
    maps = [{"containerID": 0, "hostID": shift, "size": 65536}]
    document = with_users(configuration("sh", "-c", script), maps)
    document["linux"]["devices"] = [
        device(uid=10, gid=11, fileMode=0o640),
        device(path="/dev/other", type="b", major=7, minor=9, uid=70000, gid=3),
    ]
    document["process"]["user"] = {"uid": 10, "gid": 11}
    del document["linux"]["resources"]
    # The container's root makes what is missing there.
    os.chown(native.rootfs, shift, shift)
    done = native.run(document)
    # 70000 is nobody's inside.
    assert done.stdout == "10:11 640 1:7\n65534:3 666 7:9\n 00\n", done.stderr
    assert "made" not in os.listdir("/dev")


def test_nodes_need_the_right_to_make_them(native: Native) -> None:
    document = with_users(configuration("true"), ALL_IDS)
    document["linux"]["devices"] = [device()]
    native.write(document)
    words = [*native.words, "run", "--bundle", str(native.bundle), native.name()]
    done = subprocess.run(
        ["setpriv", "--bounding-set", "-mknod", *words], capture_output=True, text=True, timeout=20
    )
    text = "krun: mknod /dev/made: not allowed in a user namespace, and the host has no such node\n"
    assert (done.returncode, done.stderr) == (1, text)


def test_domainname_and_its_sysctl_must_agree(native: Native) -> None:
    document = configuration("cat", "/proc/sys/kernel/domainname")
    document["domainname"] = "one.test"
    document["linux"]["sysctl"] = {"kernel.domainname": "two.test"}
    done = native.run(document, 1)
    assert "linux.sysctl.kernel.domainname: contradicts domainname" in done.stderr
    document["linux"]["sysctl"] = {"kernel.domainname": "one.test"}
    assert native.run(document).stdout == "one.test\n"
    del document["domainname"]
    assert native.run(document).stdout == "one.test\n"


@pytest.mark.parametrize("verb", ["run", "exec"])
def test_preserving_more_than_is_open(native: Native, tmp_path: Path, verb: str) -> None:
    (tmp_path / "given").write_text("")
    command = ("sh", "-c", "ls /proc/self/fd")
    if verb == "exec":
        name = native.start(*SLEEP)
        words = ["exec", "--preserve-fds", "5", name, *command]
    else:
        native.write(configuration(*command))
        words = ["run", "--preserve-fds", "5", "--bundle", str(native.bundle), native.name()]
    script = f'exec 5<{tmp_path}/given 9</etc; exec "$@"'
    done = subprocess.run(
        ["sh", "-c", script, "sh", *native.words, *words], capture_output=True, text=True
    )
    # 3 is the directory that ls reads.
    assert (done.returncode, done.stdout) == (0, "0\n1\n2\n3\n5\n"), done.stderr
    assert done.stderr == "krun: warning: --preserve-fds 5: descriptor 3 is not open\n"


@pytest.mark.parametrize("verb", ["run", "exec"])
def test_files_on_stdio_are_the_users(native: Native, tmp_path: Path, verb: str) -> None:
    user = {"uid": 1001, "gid": 1002}
    document = configuration("true")
    if verb == "exec":
        name = native.start(*SLEEP)
        words: list[object] = ["exec", "--user", "1001:1002", name, "true"]
    else:
        document["process"]["user"] = user
        native.write(document)
        words = ["run", "--bundle", native.bundle, native.name()]
    with (tmp_path / "out").open("w") as file:
        native(*words, stdout=file)
    found = (tmp_path / "out").stat()
    assert (found.st_uid, found.st_gid) == (1001, 1002)


def test_environment_of_exec_has_names(native: Native) -> None:
    name = native.start(*SLEEP)
    for wrong in ("A", "=b"):
        done = native("exec", "--env", wrong, name, "true", status=2)
        assert done.stderr == f"krun: --env {wrong}: must be KEY=VALUE\n"
    assert native("exec", "--env", "A=", name, "sh", "-c", "echo ${A-unset}").stdout == "\n"


def groups(native: Native, *words: object) -> list[str]:
    """Run with the groups 7 and 8; returns those of the process inside."""
    found = subprocess.run(
        ["setpriv", "--groups", "7,8", *native.words, *map(str, words)],
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert found.returncode == 0, found.stderr
    return found.stdout.split()[1:]


@pytest.mark.parametrize(("value", "kept"), [("1", True), ("", True), ("0", False), (None, False)])
def test_original_groups(native: Native, value: str | None, kept: bool) -> None:
    show = ("grep", "Groups:", "/proc/self/status")
    document = configuration(*show)
    document["process"]["user"]["additionalGids"] = [9]
    if value is not None:
        document["annotations"] = {"run.oci.keep_original_groups": value}
    native.write(document)
    expected = ["7", "8"] if kept else ["9"]
    assert groups(native, "run", "--bundle", native.bundle, native.name()) == expected
    document["process"]["args"] = list(SLEEP)
    native.write(document)
    name = native.name()
    native("run", "--detach", "--bundle", native.bundle, name, stdout=subprocess.DEVNULL)
    assert groups(native, "exec", name, *show) == expected


def test_output_of_hooks(native: Native, tmp_path: Path) -> None:
    kinds = ("prestart", "createRuntime", "createContainer", "poststart", "poststop")
    document = configuration("true")
    document["hooks"] = {
        kind: [{"path": "/bin/sh", "args": ["sh", "-c", f"echo out {kind}; echo err {kind} >&2"]}]
        for kind in kinds
    }
    document["hooks"]["startContainer"] = [
        {"path": "/bin/sh", "args": ["sh", "-c", "echo out startContainer; echo err inside >&2"]}
    ]
    out, err = tmp_path / "out", tmp_path / "err"
    out.write_text("before\n")
    document["annotations"] = {
        "run.oci.hooks.stdout": str(out),
        "run.oci.hooks.stderr": str(err),
    }
    native.run(document)
    order = (*kinds[:3], "startContainer", *kinds[3:])
    assert out.read_text() == "before\n" + "".join(f"out {kind}\n" for kind in order)
    assert err.read_text().splitlines() == [
        f"err {'inside' if kind == 'startContainer' else kind}" for kind in order
    ]
    assert err.stat().st_mode & 0o777 == 0o600
    # A hook's own words stay in the message of its failure.
    document["hooks"] = {
        "prestart": [{"path": "/bin/sh", "args": ["sh", "-c", "echo no >&2; false"]}]
    }
    assert native.run(document, 1).stderr.endswith(": exit status 1: no\n")
    document["annotations"]["run.oci.hooks.stdout"] = str(tmp_path / "none/out")
    done = native.run(document, 1)
    assert f"open {tmp_path}/none/out: No such file or directory" in done.stderr


def test_unknown_system_calls_can_be_errors(native: Native) -> None:
    document = configuration("true")
    document["linux"]["seccomp"] = {
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [{"names": ["unheard_of"], "action": "SCMP_ACT_ERRNO"}],
    }
    name = "run.oci.seccomp_fail_unknown_syscall"
    # The first fills the cache of compiled filters.
    native.run(document)
    document["annotations"] = {name: "1"}
    for _ in range(2):
        done = native.run(document, 1)
        assert done.stderr == "krun: seccomp: unheard_of is not a system call\n"
    document["annotations"] = {name: "0"}
    native.run(document)


def realtime_directory() -> Path:
    """The cgroup that the test's containers are below, where real-time shares exist."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, names, path = line.split(":", 2)
        if "cpu" in names.split(","):
            place = Path(f"/sys/fs/cgroup/{names}{path}")
            if (place / "cpu.rt_runtime_us").exists():
                return place
    pytest.skip("this kernel has no real-time shares of cgroups (v1, CONFIG_RT_GROUP_SCHED)")


@pytest.mark.parametrize("policy", ["SCHED_FIFO", "SCHED_RR"])
def test_real_time_takes_half_of_what_is_left(native: Native, policy: str) -> None:
    above = realtime_directory()
    need("chrt")
    names = []
    document = configuration(*SLEEP)
    document["process"]["scheduler"] = {"policy": policy, "priority": 10}
    native.write(document)
    shares = []
    for _ in range(2):
        name = native.name()
        native("run", "--detach", "--bundle", native.bundle, name, stdout=subprocess.DEVNULL)
        names.append(name)
        shares.append(int((above / name / "cpu.rt_runtime_us").read_text()))
        shown = subprocess.check_output(["chrt", "-p", str(native.state(name)["pid"])], text=True)
        assert policy in shown
        assert "priority: 10" in shown
    # Shares of cgroups that were removed come back a little later.
    assert 0 < shares[1] <= shares[0] * 2
    # What the configuration says is what it gets, and an ordinary container gets nothing.
    document["linux"]["resources"] = {"cpu": {"realtimeRuntime": 5000}}
    native.write(document)
    name = native.name()
    native("run", "--detach", "--bundle", native.bundle, name, stdout=subprocess.DEVNULL)
    assert (above / name / "cpu.rt_runtime_us").read_text() == "5000\n"
    name = native.start(*SLEEP)
    assert (above / name / "cpu.rt_runtime_us").read_text() == "0\n"


def test_what_is_being_created_is_not_there_yet(native: Native, tmp_path: Path) -> None:
    """A hook sees what others would: neither state nor exec take what is half made."""
    script = tmp_path / "hook"
    for verb in ("create", "run"):
        name = native.name()
        words = shlex.join(native.words)
        script.write_text(
            f"{words} state {name} >{tmp_path}/state 2>&1; echo $? >>{tmp_path}/state\n"
            f"{words} exec {name} true >{tmp_path}/exec 2>&1; echo $? >>{tmp_path}/exec\n"
            f"{words} list >{tmp_path}/list\n"
        )
        document = configuration("true")
        document["hooks"] = {"createRuntime": [{"path": "/bin/sh", "args": ["sh", str(script)]}]}
        native.write(document)
        native(verb, "--bundle", native.bundle, name, stdout=subprocess.DEVNULL)
        text = f"krun: container `{name}` does not exist yet: it is being created\n1\n"
        assert (tmp_path / "state").read_text() == text
        assert (tmp_path / "exec").read_text() == "krun: cannot exec in a creating container\n255\n"
        assert "creating" in (tmp_path / "list").read_text()


def test_mount_context() -> None:
    from krun.errors import BadSpec
    from krun.plan.build import build

    document = configuration("true")
    document["annotations"] = {"run.oci.mount_context_type": "rootcontext"}
    assert build(document, "one", "/bundle", 1).mount_context == "rootcontext"  # type: ignore[arg-type]
    document["annotations"] = {"run.oci.mount_context_type": "other"}
    with pytest.raises(BadSpec, match="must be one of context, fscontext"):
        build(document, "one", "/bundle", 1)  # type: ignore[arg-type]


def test_receiver_of_the_listener() -> None:
    from krun.plan.build import plan_seccomp

    section = {"defaultAction": "SCMP_ACT_ALLOW"}
    name = "run.oci.seccomp.receiver"
    assert plan_seccomp(section, {name: "/s"}) == {**section, "listenerPath": "/s"}
    assert plan_seccomp(section, {}) == section
    assert plan_seccomp(None, {name: "/s"}) is None


def test_builtin_monitor_shuts_what_is_its_own(tmp_path: Path) -> None:
    """Of the descriptors to preserve those that were open stay: krun's own are close-on-exec."""
    script = (
        "import os\nfrom krun.native import _close_own\n"
        "own = os.open('/', os.O_RDONLY)\ngiven = os.dup(own)\nos.set_inheritable(given, True)\n"
        "kept = os.dup(own)\n_close_own(3, 20, kept)\n"
        "print(*sorted(int(n) for n in os.listdir('/proc/self/fd') if 2 < int(n) < 10))\n"
        "print(own, given, kept)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    # The lowest number is free again, and the one that lists.
    assert done.stdout == "3 4 5\n3 4 5\n", done.stderr


def unwanted(annotations: dict[str, str], **allow: Any) -> tuple[str, ...]:
    from krun.extension import unwanted as decide
    from krun.policy import parse

    return decide(annotations, parse({"allow": allow}, "policy.json"))


def test_which_annotations_of_crun_are_kept() -> None:
    groups_, hooks = "run.oci.keep_original_groups", "run.oci.hooks.stdout"
    asked = {groups_: "1", hooks: "/etc/x", "other": ""}
    assert unwanted(asked) == ()
    # podman passes on what an image says.
    for mark in ("io.container.manager", "io.kubernetes.cri.container-type"):
        assert unwanted({**asked, mark: "x"}) == (hooks,)
        assert unwanted({**asked, mark: "x"}, crunAnnotations=[hooks]) == (groups_,)
        assert unwanted({**asked, mark: "x"}, crunAnnotations=True) == ()
    assert unwanted(asked, crunAnnotations=False) == (groups_, hooks)


def test_dropped_annotations_are_told(native: Native, tmp_path: Path) -> None:
    document = json.loads(json.dumps(configuration("/bin/busybox", "true")))
    document["annotations"] = {"run.oci.hooks.stdout": "/x", "io.container.manager": "libpod"}
    native.write(document)
    rules = {"allow": {"crunAnnotations": False}, "defaults": {"monitor": "builtin"}}
    policy = tmp_path / "policy.json"
    policy.write_text(json.dumps(rules))
    words = ("--engine", "native", "--policy", policy, "translate", "--bundle", native.bundle)
    done = native(*words)
    assert "krun: warning: annotation run.oci.hooks.stdout dropped" in done.stderr
    kept = json.loads(done.stdout)["annotations"]
    assert "run.oci.hooks.stdout" not in kept
    assert kept["io.container.manager"] == "libpod"
