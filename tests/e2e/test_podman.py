"""podman --runtime krun: the payload runs in a VM, the rest is what podman asked for."""

from __future__ import annotations

import difflib
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from e2e.machine import (
    IMAGE,
    Client,
    Machine,
    Record,
    remove_rootless,
    rootless_podman,
    wait_for,
)

NONE = ("--network", "none")
# SIGTERM reaches a payload in km through an init; 128+15 as with any other runtime.
TERMINATED = 128 + signal.SIGTERM
ENDED_BY_HANDLER = 42


@pytest.fixture
def run(podman: Client, record: Record) -> Callable[..., Any]:
    """podman run --rm --network none, with the record mounted."""

    def run(*argv: object, **keywords: Any) -> Any:
        return podman("run", "--rm", *NONE, "-v", record.volume, *argv, **keywords)

    return run


@pytest.fixture
def start(podman: Client, record: Record, request: pytest.FixtureRequest) -> Any:
    """podman run -d, with the record mounted; the container is removed afterwards."""
    names = []

    def start(*argv: object, ready: str = "") -> str:
        name = f"krun-test-{os.urandom(6).hex()}"
        names.append(name)
        podman("run", "-d", "--name", name, *NONE, "-v", record.volume, *argv)
        if ready:
            wait_for(ready, lambda: ready in podman("logs", name).stdout)
        return name

    yield start
    for name in names:
        podman("rm", "-f", "-t", "0", name, status=None)


def inspect(podman: Client, name: str, form: str) -> str:
    """One field of podman inspect."""
    return podman("inspect", "--format", form, name).stdout.strip()


def test_run(run: Any, record: Record) -> None:
    done = run(IMAGE, "/payload", "args", "a b", "-v", "--putenv", "")
    assert done.stdout == "a b\n-v\n--putenv\n\n"
    assert done.stderr == ""
    if given := record.last():
        assert given["payload_argv"] == ["/payload", "args", "a b", "-v", "--putenv", ""]
        assert given["argv"][0] == given["exe"]
        assert given["exe"].endswith("/km")
        assert given["exe_read_only"]
        assert "--km-log-to=stderr" in given["argv"]
        assert given["device"] in ("/dev/kvm", "/dev/kontain")
        assert given["rlimits"]["nofile"][0] >= 737
        assert sorted(given["fds"]) == ["0", "1", "2"]
        record.count(1)


def test_default_command_and_status(run: Any, record: Record) -> None:
    assert run(IMAGE).stdout == "default\n"
    assert run(IMAGE, "/payload", "exit", 7, status=7).stdout == ""
    assert run("-i", IMAGE, "/payload", "cat", input="typed\n").stdout == "typed\n"
    assert run(IMAGE, "/payload", "err", "to stderr").stderr == "to stderr\n"
    record.count(4)


def test_kernel_release_says_it_is_a_vm(run: Any, km_is_real: bool) -> None:
    if not km_is_real:
        pytest.skip("the stand-in runs payloads on the host's kernel; set KRUN_TEST_KM to a km")
    assert re.search(r"\.kontain\.(KVM|KKM)$", run(IMAGE, "/payload", "uname").stdout.strip())


def test_environment_and_directory(run: Any, record: Record) -> None:
    done = run("--env", "A=b c", "--workdir", "/data", IMAGE, "/payload", "env")
    variables = done.stdout.splitlines()
    assert "A=b c" in variables
    assert "FROM=image" in variables
    assert not [name for name in variables if name.startswith(("KM_", "SNAP_", "KRUN_", "_K"))]
    if given := record.last():
        assert given["cwd"] == "/data"
        assert sorted(given["payload_env"]) == sorted(variables)


@pytest.mark.parametrize("name", ["in-path", "a-link", "/bin/../payload", "script"])
def test_program_is_looked_up(run: Any, record: Record, name: str) -> None:
    program = "/script" if name == "script" else name
    done = run(IMAGE, program, "args", "x")
    assert done.stdout == ("/script\nargs\nx\n" if name == "script" else "x\n")
    record.count(1)


def test_entrypoint_that_is_km_already(run: Any, record: Record) -> None:
    assert (
        run("--entrypoint", "/opt/kontain/bin/km", IMAGE, "/payload", "args", "x").stdout == "x\n"
    )
    if given := record.last():
        assert given["payload_argv"] == ["/payload", "args", "x"]
        record.count(1)


@pytest.mark.parametrize(
    ("program", "status", "words"),
    [
        ("/no/such", 127, "/no/such"),
        ("no-such", 127, "no-such"),
        ("/not-executable", 126, "not-executable"),
        ("/data", 126, "/data"),
    ],
)
def test_cannot_execute(run: Any, record: Record, program: str, status: int, words: str) -> None:
    done = run(IMAGE, program, status=status)
    assert words in done.stderr
    assert "traceback" not in done.stderr.lower()
    record.count(0)


def test_payload_that_no_vm_can_run(run: Any, record: Record) -> None:
    done = run(IMAGE, "/text", status=126)
    assert "/text" in done.stderr
    record.count(0)


def test_detached_life(podman: Client, start: Any, record: Record) -> None:
    name = start(IMAGE, "/payload", "nap", ready="napping")
    assert inspect(podman, name, "{{.State.Status}} {{.OCIRuntime}}") == "running krun"
    assert "payload" in podman("top", name, "args").stdout
    podman("stop", "-t", "10", name)
    assert inspect(podman, name, "{{.State.ExitCode}}") == str(ENDED_BY_HANDLER)
    podman("start", name)
    wait_for("a second life", lambda: podman("logs", name).stdout.count("napping") == 2)
    podman("rm", "-f", "-t", "0", name)
    record.count(2)


def test_stop_and_kill_give_what_other_runtimes_give(podman: Client, start: Any) -> None:
    name = start(IMAGE, "/payload", "wait", ready="waiting")
    podman("stop", "-t", "10", name)
    assert inspect(podman, name, "{{.State.ExitCode}}") == str(TERMINATED)
    podman("start", name)
    wait_for("a second life", lambda: podman("logs", name).stdout.count("waiting") == 2)
    podman("kill", "--signal", "KILL", name)
    assert podman("wait", name).stdout.strip() == str(128 + signal.SIGKILL)


def test_restart(podman: Client, start: Any, record: Record) -> None:
    name = start(IMAGE, "/payload", "nap", ready="napping")
    podman("restart", "-t", "5", name)
    wait_for("a second life", lambda: podman("logs", name).stdout.count("napping") == 2)
    record.count(2)


def test_pause(podman: Client, start: Any) -> None:
    name = start(IMAGE, "/payload", "nap", ready="napping")
    podman("pause", name)
    assert inspect(podman, name, "{{.State.Status}}") == "paused"
    podman("unpause", name)
    assert inspect(podman, name, "{{.State.Status}}") == "running"


def test_exec(podman: Client, start: Any, record: Record) -> None:
    name = start(IMAGE, "/payload", "nap", ready="napping")
    assert podman("exec", name, "/payload", "args", "a b", "").stdout == "a b\n\n"
    assert podman("exec", name, "/payload", "exit", 9, status=9).stdout == ""
    assert podman("exec", "-i", name, "/payload", "cat", input="in").stdout == "in"
    uid, gid, pid = podman("exec", "--user", "1000:1000", name, "/payload", "ids").stdout.split()
    assert (uid, gid) == ("1000", "1000")
    assert int(pid) > 1
    variables = podman("exec", "--env", "A=b", name, "/payload", "env").stdout.splitlines()
    assert "A=b" in variables
    podman("exec", "-d", name, "/payload", "write", "/tmp/done", "x")
    record.wait(7)
    assert podman("exec", name, "/payload", "read", "/tmp/done").stdout == "x\n"
    record.count(8)


@pytest.mark.parametrize(("program", "status"), [("/no/such", 127), ("/not-executable", 126)])
def test_exec_cannot_execute(podman: Client, start: Any, program: str, status: int) -> None:
    name = start(IMAGE, "/payload", "nap", ready="napping")
    assert program in podman("exec", name, program, status=status).stderr


def test_terminal(podman: Client, start: Any, record: Record) -> None:
    arguments = ["run", "--rm", "-it", *NONE, "-v", record.volume, IMAGE]
    status, said = podman.terminal(
        *arguments, "/payload", "talk", after="talking", typed="line\n\x04"
    )
    assert status == 0, said
    assert said.count("line\n") == 2, "once echoed by the terminal, once by the payload"
    if given := record.last():
        assert given["terminal"] == [True, True, True]
    name = start(IMAGE, "/payload", "nap", ready="napping")
    status, said = podman.terminal("exec", "-it", name, "/payload", "args", "on a terminal")
    assert (status, "on a terminal" in said) == (0, True)
    if given := record.last():
        assert given["terminal"] == [True, True, True]


def test_init(podman: Client, start: Any, record: Record) -> None:
    name = start("--init", IMAGE, "/payload", "wait", ready="waiting")
    if given := record.last():
        assert given["pid"] != 1
        assert given["payload_argv"] == ["/payload", "wait"]
    top = podman("top", name, "pid", "comm").stdout
    assert re.search(r"^1 +(podman-init|catatonit|tini)", top, re.MULTILINE), top
    podman("stop", "-t", "10", name)
    assert inspect(podman, name, "{{.State.ExitCode}}") == str(TERMINATED)


@pytest.mark.parametrize("user", ["1000:1000", "guest"])
def test_user(run: Any, record: Record, user: str) -> None:
    uid, gid, _ = run("--user", user, IMAGE, "/payload", "ids").stdout.split()
    assert (uid, gid) == ("1000", "1000")
    if given := record.last():
        assert (given["uid"], given["gid"]) == (1000, 1000)
        assert int(given["status"]["CapEff"], 16) == 0


def test_privileges_are_what_was_asked_for(run: Any, record: Record) -> None:
    run("--cap-drop", "all", "--security-opt", "no-new-privileges", IMAGE, "/payload")
    if given := record.last():
        status = given["status"]
        assert [status[name] for name in ("NoNewPrivs", "Seccomp")] == ["1", "2"]
        assert {int(status[name], 16) for name in status if name.startswith("Cap")} == {0}
    run("--privileged", IMAGE, "/payload")
    if given := record.last():
        assert given["status"]["Seccomp"] == "0"
        assert int(given["status"]["CapEff"], 16) & (1 << 21), "CAP_SYS_ADMIN"


def test_read_only_root(run: Any, record: Record) -> None:
    assert run("--read-only", IMAGE, "/payload", "args", "x").stdout == "x\n"
    run("--read-only", IMAGE, "/payload", "write", "/data/f", "x", status=7)
    record.count(2)


def test_volumes(run: Any, tmp_path: Path) -> None:
    (tmp_path / "volume").mkdir()
    (tmp_path / "volume/in").write_text("from the host\n")
    volume = f"{tmp_path}/volume:/data"
    assert run("-v", volume, IMAGE, "/payload", "read", "/data/in").stdout == "from the host\n"
    run("-v", volume, IMAGE, "/payload", "write", "/data/out", "from the payload")
    assert (tmp_path / "volume/out").read_text() == "from the payload\n"
    run("-v", f"{volume}:ro", IMAGE, "/payload", "write", "/data/no", "x", status=7)


def test_limits(run: Any, record: Record) -> None:
    assert run("--pids-limit", 1, IMAGE, "/payload", "args", "x").stdout == "x\n"
    assert run("-m", "64m", "--cpus", "0.5", IMAGE, "/payload", "args", "x").stdout == "x\n"
    run("--ulimit", "nofile=64:1024", "--ulimit", "nproc=1024:1024", IMAGE, "/payload")
    if given := record.last():
        assert given["rlimits"]["nofile"] == [1024, 1024]


def test_descriptor_limit_too_low_is_found_before(run: Any, record: Record) -> None:
    limits = ["--ulimit", "nofile=64:64", "--ulimit", "nproc=1024:1024"]
    done = run(*limits, IMAGE, "/payload", status=126)
    assert "nofile" in done.stderr.lower()
    record.count(0)


@pytest.mark.parametrize(
    "variable", ["KM_EXEC_VERS=3", "KM_VERBOSE=", "SNAP_LISTEN_TIMEOUT=1", "KM_MGTPIPE=/x"]
)
def test_monitor_is_not_steered_by_the_environment(run: Any, record: Record, variable: str) -> None:
    """Whether refused or taken out: km never sees it."""
    done = run("--env", variable, IMAGE, "/payload", "env", status=None)
    assert "traceback" not in done.stderr.lower()
    if done.returncode:
        record.count(0)
        assert variable.partition("=")[0] in done.stderr
    else:
        given = record.last()
        assert given is None or variable not in given["env"]


def test_long_string_is_found_before(run: Any, record: Record) -> None:
    done = run(IMAGE, "/payload", "args", "x" * 5000, status=126)
    assert "4096" in done.stderr
    record.count(0)


def test_cgroups_disabled(run: Any, record: Record) -> None:
    assert run("--cgroups", "disabled", IMAGE, "/payload", "args", "x").stdout == "x\n"
    done = run("--cgroups", "disabled", IMAGE, "cat", "/proc/self/cgroup", status=None)
    if not record.km_is_real:
        # The cgroup is the caller's, not one of the container's own.
        assert ":/" in done.stdout
        assert "libpod-" not in done.stdout
        record.count(2)


def test_user_namespace(run: Any, record: Record, open_device: None) -> None:
    done = run("--uidmap", "0:100000:5000", "--gidmap", "0:100000:5000", IMAGE, "/payload", "ids")
    assert done.stdout.split()[:2] == ["0", "0"]
    assert run("--userns=auto", IMAGE, "/payload", "ids").stdout.split()[:2] == ["0", "0"]
    record.count(2)


def test_network_bridge(podman: Client, record: Record, km_is_real: bool) -> None:
    podman("network", "create", "--subnet", "10.213.77.0/24", "krun-test", status=None)
    command = ["run", "--rm", "--network", "krun-test", "-v", record.volume, IMAGE]
    if km_is_real:
        assert podman(*command, "/payload", "args", "x").stdout == "x\n"
    else:
        assert "inet 10.213.77." in podman(*command, "ip", "-4", "addr", "show", "eth0").stdout
    podman("network", "rm", "-f", "krun-test")
    record.count(1)


def test_healthcheck(podman: Client, start: Any) -> None:
    health = ["--health-interval", "disable", "--health-cmd"]
    name = start(*health, '["/payload", "exit", "0"]', IMAGE, "/payload", "nap")
    podman("healthcheck", "run", name)
    sick = start(*health, '["/payload", "exit", "1"]', IMAGE, "/payload", "nap")
    podman("healthcheck", "run", sick, status=1)


def test_pod(podman: Client, record: Record) -> None:
    pod = f"krun-test-{os.urandom(4).hex()}"
    infra = ["--infra-image", IMAGE, "--infra-command", "/payload wait"]
    podman("pod", "create", "--name", pod, *NONE, *infra)
    try:
        member = ["run", "--rm", "--pod", pod, "-v", record.volume, IMAGE]
        assert podman(*member, "/payload", "args", "x").stdout == "x\n"
        assert "Running" in podman("pod", "ps", "--filter", f"name={pod}").stdout
        record.count(1)
    finally:
        podman("pod", "rm", "-f", "-t", "0", pod)


def test_nothing_is_left_in_the_root_filesystem(run: Any, machine: Machine, tmp_path: Path) -> None:
    """crun makes missing mount points; krun's own must not stay in a user's directory."""
    machine.run("cp", "-a", machine.directory / "rootfs", tmp_path / "rootfs")
    before = sorted(str(path) for path in (tmp_path / "rootfs").rglob("*"))
    before.append(str(tmp_path / "rootfs/km-record"))
    assert run("--rootfs", tmp_path / "rootfs", "/payload", "args", "x").stdout == "x\n"
    after = {str(path) for path in (tmp_path / "rootfs").rglob("*")}
    left = sorted(path for path in after - set(before) if "kontain" in path or "krun" in path)
    assert left == []


def test_errors_are_json_for_podman(podman: Client, record: Record, machine: Machine) -> None:
    """podman shows the last line of the runtime's JSON log: it must be the cause."""
    done = podman(
        "run", "--rm", *NONE, "--annotation", "app.kontain.monitor=nonsense", IMAGE, status=None
    )
    assert done.returncode in (125, 126)
    assert "app.kontain.monitor" in done.stderr
    assert "{" not in done.stderr.partition("Error")[2]
    record.count(0)


# What differs between krun and crun by design: the extra mount, device and init.
PROBE = r"""
exec 2>&1
echo limits; cat /proc/self/limits | grep -v 'open files'
echo status; grep -E '^(Cap|NoNew|Seccomp:|Umask|Sig(Blk|Ign)|Uid|Gid|Groups)' /proc/self/status
echo mounts
cut -d' ' -f5-7 /proc/self/mountinfo | grep -vE '/(km-record|dev/k(m|vm|run-init)) ' | sort
echo cgroup; cut -d: -f1-2 /proc/self/cgroup
echo namespaces
for n in cgroup ipc mnt net pid user uts time; do
  [ "$(readlink /proc/self/ns/$n)" = "$(cat /host-ns/$n)" ] && echo $n shared || echo $n own
done
echo host; hostname; id; pwd; env | sort
echo devices; ls -ln /dev | awk '{print $1, $3, $4, $NF}' | grep -vE 'kvm|km|krun-init|total'
echo oom; cat /proc/self/oom_score_adj
"""

OPTIONS: dict[str, list[str]] = {
    "defaults": [],
    "privileged": ["--privileged"],
    "user": ["--user", "1000:1000", "--group-add", "5"],
    "read-only": ["--read-only", "--tmpfs", "/scratch:size=1m"],
    "capabilities": ["--cap-drop", "all", "--cap-add", "net_admin"],
    "limits": ["-m", "64m", "--pids-limit", "50", "--oom-score-adj", "900"],
    "host-namespaces": ["--pid", "host", "--ipc", "host", "--uts", "host"],
    "security": ["--security-opt", "no-new-privileges", "--security-opt", "seccomp=unconfined"],
    "sysctl": ["--sysctl", "net.ipv4.ip_forward=1", "--hostname", "krun-host", "--shm-size", "1m"],
    "init": ["--init"],
    "devices": ["--device", "/dev/null:/dev/mynull:r"],
    "userns": ["--uidmap", "0:100000:5000", "--gidmap", "0:100000:5000"],
}


def _alike(engine: str, text: str) -> str:
    """Leave out where the native engine is stricter than runc 1.1.

    Masked files are read-only, and so is the directory of cgroup mounts that are to be.
    """
    if engine == "crun":
        return text
    # Where nodes cannot be made, the host's are bound with the flags that /dev has.
    text = re.sub(r"^(/dev/\w+ rw),nosuid,noexec(,relatime)", r"\1\2", text, flags=re.M)
    # runc leaves the group of mqueue to nobody in a user namespace.
    text = re.sub(r"^(drwxrwxrwt 0) \d+ mqueue", r"\1 mqueue", text, flags=re.M)
    return re.sub(
        r"^(/proc/(?:keys|timer_list|kcore)|/sys/fs/cgroup) r[ow]\S*", r"\1", text, flags=re.M
    )


@pytest.mark.parametrize("case", OPTIONS)
def test_container_is_what_others_make(
    engine: str,
    podman: Client,
    podman_base: Client,
    record: Record,
    km_is_real: bool,
    open_device: None,
    case: str,
) -> None:
    """All but the VM is as with crun, or runc for the native engine.

    That is: limits, privileges, mounts, devices, namespaces.
    """
    if km_is_real:
        pytest.skip("a payload in a real km does not see the process around it")
    own = record.path.parent / "namespaces"
    own.mkdir()
    for name in os.listdir("/proc/self/ns"):
        (own / name).write_text(os.readlink(f"/proc/self/ns/{name}"))
    arguments = ["run", "--rm", *NONE, "-v", record.volume, "-v", f"{own}:/host-ns:ro"]
    if case not in ("sysctl", "host-namespaces"):
        arguments += ["--hostname", "krun-test"]
    arguments += [*OPTIONS[case], IMAGE, "sh", "-c", PROBE]
    other = {"crun": "crun", "native": "runc"}[engine]
    plain = Client(podman_base.machine, [*podman_base.argv, "--runtime", other], podman_base.env)
    expected = _alike(engine, plain(*arguments).stdout)
    assert expected.count("\n") > 30
    made = _alike(engine, podman(*arguments).stdout)
    difference = difflib.unified_diff(expected.splitlines(), made.splitlines(), lineterm="", n=0)
    assert "\n".join(difference) == ""
    record.count(1)


@pytest.fixture
def rootless(machine: Machine, engine: str) -> Iterator[Client]:
    """An ordinary user's podman --runtime krun."""
    home = machine.directory / f"home-{engine}"
    client = rootless_podman(machine, home, engine)
    yield client
    # With the namespaces go the mounts that a test made in them.
    remove_rootless(client, home)


@pytest.mark.usefixtures("open_checkout")
def test_rootless(open_device: None, rootless: Client, record: Record) -> None:
    command = ["run", "--rm", *NONE, "-v", record.volume, IMAGE, "/payload"]
    assert rootless(*command, "args", "x").stdout == "x\n"
    assert rootless(*command, "ids").stdout.split()[:2] == ["0", "0"]
    record.count(2)


@pytest.mark.usefixtures("open_checkout")
def test_rootless_without_permission(closed_device: None, rootless: Client) -> None:
    done = rootless("run", "--rm", *NONE, IMAGE, "/payload", status=126)
    assert "/dev/kvm" in done.stderr
    assert "ermission" in done.stderr
