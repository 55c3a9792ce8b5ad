"""The verbs of the native engine on the real kernel."""

from __future__ import annotations

import json
import os
import random
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from native_parts import REPOSITORY, Native, configuration

from krun.linux import cgroupfs, proc

SLEEP = ("sleep", "100")


def wait_for_status(native: Native, name: str, status: str) -> None:
    end = time.monotonic() + 10
    while native.state(name)["status"] != status:
        assert time.monotonic() < end, f"{name} does not become {status}"
        time.sleep(0.02)


def test_life(native: Native, tmp_path: Path) -> None:
    native.write(configuration("sh", "-c", "echo $$ > /pid; exec sleep 100"))
    name = native.name()
    pid_file = tmp_path / "pid"
    native(
        "create", "--bundle", native.bundle, "--pid-file", pid_file, name, stdout=subprocess.DEVNULL
    )
    state = native.state(name)
    assert (state["status"], state["id"], state["bundle"]) == ("created", name, str(native.bundle))
    assert state["pid"] == int(pid_file.read_text())
    assert not (native.rootfs / "pid").exists(), "the payload must wait for start"
    native("start", name)
    wait_for_status(native, name, "running")
    again = native("start", name, status=1)
    assert "cannot start an already running container" in again.stderr
    assert "not stopped" in native("delete", name, status=1).stderr
    native("kill", name, "KILL")
    wait_for_status(native, name, "stopped")
    assert (native.rootfs / "pid").read_text() == "1\n"
    assert "container not running" in native("kill", name, "TERM", status=1).stderr
    native("delete", name)
    assert "does not exist" in native("state", name, status=1).stderr
    native("delete", "--force", name)


def test_options_that_come_to_nothing(native: Native, tmp_path: Path) -> None:
    """A console without a terminal, a pid file without a directory, no memory to start in."""
    native.write(configuration(*SLEEP))
    name = native.name()
    create = ("create", "--bundle", native.bundle)
    said = native(*create, "--console-socket", tmp_path / "socket", name, status=1).stderr
    assert "--console-socket needs a terminal" in said
    gone = tmp_path / "none" / "pid"
    said = native(*create, "--pid-file", gone, name, status=1).stderr
    assert said == f"krun: {gone}: No such file or directory\n"
    assert "does not exist" in native("state", name, status=1).stderr
    document = configuration(*SLEEP)
    document["linux"]["resources"] = {"memory": {"limit": 4096}}
    native.write(document)
    assert "memory.limit is too low" in native(*create, name, status=1).stderr


def test_a_pid_file_that_is_a_device_stays_one(native: Native, tmp_path: Path) -> None:
    native.write(configuration(*SLEEP))
    create = ("create", "--bundle", native.bundle, "--pid-file")
    device = tmp_path / "null"
    os.mknod(device, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    native(*create, device, native.name(), stdout=subprocess.DEVNULL)
    assert device.is_char_device()
    full = tmp_path / "full"
    os.mknod(full, 0o666 | stat.S_IFCHR, os.makedev(1, 7))
    name = native.name()
    for place, why in ((full, "No space left on device"), (tmp_path, "Is a directory")):
        said = native(*create, place, name, status=1).stderr
        assert said == f"krun: {place}: {why}\n"
        assert "does not exist" in native("state", name, status=1).stderr
    assert sorted(path.name for path in tmp_path.glob("*.tmp")) == []
    assert not list(tmp_path.parent.glob("*.tmp"))


def test_exec_that_cannot_tell_its_pid_ends(native: Native, tmp_path: Path) -> None:
    native.write(configuration(*SLEEP))
    name = native.name()
    native("run", "--detach", "--bundle", native.bundle, name, stdout=subprocess.DEVNULL)
    gone = tmp_path / "none" / "pid"
    words = ("exec", "--detach", "--pid-file", gone, name, "sleep", "77")
    assert str(gone) in native(*words, status=255).stderr
    deadline = time.monotonic() + 20
    while "sleep 77" in native("ps", name).stdout:
        assert time.monotonic() < deadline, "the process goes on"
        time.sleep(0.02)


def test_waiting_init_is_one_page(native: Native) -> None:
    native.write(configuration(*SLEEP))
    name = native.name()
    native("create", "--bundle", native.bundle, name, stdout=subprocess.DEVNULL)
    pid = native.state(name)["pid"]
    memory = dict(
        line.split(":") for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    )
    private = sum(int(memory[key].split()[0]) for key in ("Private_Clean", "Private_Dirty"))
    assert private < 64, f"{private} kB are private to a waiting init"


def test_id_is_taken_once(native: Native) -> None:
    name = native.start(*SLEEP)
    done = native("create", "--bundle", native.bundle, name, status=1)
    assert "already exists" in done.stderr


def test_ids_stay_below_the_root(native: Native) -> None:
    native.write(configuration("true"))
    for name in ("../x", ".", "..", "a/b", ""):
        assert native("create", "--bundle", native.bundle, name, status=1).stderr


def test_run_passes_output_input_and_status(native: Native) -> None:
    document = configuration("sh", "-c", "read x; echo got $x; echo bad >&2; exit 7")
    done = native.run(document, 7, input="word\n")
    assert (done.stdout, done.stderr) == ("got word\n", "bad\n")


def test_run_tells_how_a_signal_ended_it(native: Native) -> None:
    assert native.run(configuration("sh", "-c", "sh -c 'kill -9 $$'; exit $?"), 137)


def test_run_passes_signals_on(native: Native) -> None:
    native.write(configuration("sh", "-c", "trap 'exit 5' USR1; echo ready; sleep 100 & wait"))
    words = [*native.words, "run", "--bundle", str(native.bundle), native.name()]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGUSR1)
        assert process.wait(10) == 5


@pytest.mark.parametrize(
    ("args", "status", "text"),
    [
        (["nothing"], 127, "executable file not found in $PATH"),
        (["/bin/nothing"], 127, "no such file or directory"),
        (["/bin"], 126, "is a directory"),
        (["/plain"], 126, "permission denied"),
        (["/bad"], 126, "exec format error"),
    ],
)
def test_what_cannot_be_executed(native: Native, args: list[str], status: int, text: str) -> None:
    (native.rootfs / "plain").write_text("x")
    (native.rootfs / "bad").write_bytes(b"\0\1\2\3")
    (native.rootfs / "bad").chmod(0o755)
    assert text in native.run(configuration(*args), status).stderr
    name = native.start(*SLEEP)
    assert text in native("exec", name, *args, status=255).stderr


def test_start_tells_of_a_failed_execve(native: Native) -> None:
    (native.rootfs / "bad").write_bytes(b"\0\1\2\3")
    (native.rootfs / "bad").chmod(0o755)
    native.write(configuration("/bad"))
    name = native.name()
    native("create", "--bundle", native.bundle, name, stdout=subprocess.DEVNULL)
    assert "krun: exec /bad: exec format error" in native("start", name, status=1).stderr
    wait_for_status(native, name, "stopped")


def test_exec(native: Native, tmp_path: Path) -> None:
    name = native.start(*SLEEP)
    assert native("exec", name, "sh", "-c", "exit 3", status=3)
    done = native(
        "exec",
        "--cwd",
        "/bin",
        "--env",
        "A=b",
        "--user",
        "5:6",
        name,
        "sh",
        "-c",
        "id; pwd; echo $A",
    )
    assert done.stdout == "uid=5 gid=6\n/bin\nb\n"
    listed = native("exec", name, "ps").stdout
    assert "sleep 100" in listed
    assert "python" not in listed
    pid_file = tmp_path / "pid"
    native(
        "exec", "--detach", "--pid-file", pid_file, name, "sleep", "50", stdout=subprocess.DEVNULL
    )
    pid = int(pid_file.read_text())
    own = os.readlink(f"/proc/{pid}/ns/mnt")
    assert own == os.readlink(f"/proc/{native.state(name)['pid']}/ns/mnt")
    assert name in Path(f"/proc/{pid}/cgroup").read_text()
    process = {"args": ["sh", "-c", "id -u"], "cwd": "/", "user": {"uid": 9, "gid": 9}}
    (tmp_path / "process.json").write_text(json.dumps(process | {"env": ["PATH=/bin"]}))
    assert native("exec", "--process", tmp_path / "process.json", name).stdout == "9\n"


def test_exec_does_not_wait_for_what_it_left_behind(native: Native) -> None:
    name = native.start(*SLEEP)
    before = time.monotonic()
    native("exec", name, "sh", "-c", "sleep 20 > /dev/null 2>&1 < /dev/null &")
    assert time.monotonic() - before < 10


def test_pause_and_resume(native: Native) -> None:
    name = native.start(*SLEEP)
    native("pause", name)
    assert native.state(name)["status"] == "paused"
    assert "paused" in native("exec", name, "true", status=255).stderr
    native("resume", name)
    assert native.state(name)["status"] == "running"
    native("pause", name)
    native("delete", "--force", name)


def test_ps_events_and_update(native: Native) -> None:
    name = native.start(*SLEEP)
    pid = native.state(name)["pid"]
    assert json.loads(native("ps", "--format", "json", name).stdout) == [pid]
    assert "sleep 100" in native("ps", name).stdout
    native("update", "--pids-limit", "77", "--cpu-share", "512", name)
    stats = json.loads(native("events", "--stats", name).stdout)
    assert stats["type"] == "stats"
    assert stats["data"]["pids"] == {"current": 1, "limit": 77}
    assert stats["data"]["memory"]["usage"]["usage"] > 0
    if Path("/sys/fs/cgroup/cpuset").is_dir():
        cpus = sorted(os.sched_getaffinity(0))
        assert set(cpus) <= set(stats["data"]["cpuset"]["cpus"])
        assert stats["data"]["cpuset"]["sched_relax_domain_level"] == -1
        usage = stats["data"]["cpu"]["usage"]
        assert len(usage["percpu"]) == len(usage["percpu_kernel"]) == len(usage["percpu_user"])
        assert sum(usage["percpu_kernel"]) + sum(usage["percpu_user"]) <= usage["total"] * 2


def _two_without_a_pid_namespace(native: Native) -> str:
    """Start a container of two processes that do not end with its init; returns its id."""
    document = configuration("sh", "-c", "sleep 100 & sleep 100")
    kinds = [one for one in document["linux"]["namespaces"] if one["type"] != "pid"]
    document["linux"]["namespaces"] = kinds
    native.write(document)
    name = native.name()
    native("run", "--detach", "--bundle", native.bundle, name, stdout=subprocess.DEVNULL)
    end = time.monotonic() + 10
    while len(json.loads(native("ps", "--format", "json", name).stdout)) < 2:
        assert time.monotonic() < end
    return name


def test_kill_all_without_a_pid_namespace(native: Native) -> None:
    name = _two_without_a_pid_namespace(native)
    native("kill", "--all", name, "KILL")
    wait_for_status(native, name, "stopped")
    assert json.loads(native("ps", "--format", "json", name).stdout) == []


HANDSHAKE = """
import os, sys
sys.path.insert(0, {repository!r})
from krun import launch, native, removal, store
from krun.jsontext import loads
from krun.linux import cgroupfs
from krun.plan.build import build
spec = loads(open({config!r}).read())
root = {root!r}
for number in range({count}):
    name = f"{name}-{{number}}"
    plan = build(spec, name, {bundle!r}, cgroupfs.version())
    born = launch.create(root, plan, spec, launch.Options())
    native.start(root, name)
    os.waitpid(born.state.pid, 0)
    removal.delete(root, name, False)
print("done")
"""


def test_start_right_after_create_never_races(native: Native) -> None:
    native.write(configuration("/bin/true"))
    count = int(os.environ.get("KRUN_TEST_RACES", "500"))
    script = HANDSHAKE.format(
        repository=str(REPOSITORY),
        config=str(native.bundle / "config.json"),
        root=str(native.root),
        bundle=str(native.bundle),
        name=native.name(),
        count=count,
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=110 + count / 10
    )
    assert (done.stdout, done.stderr) == ("done\n", "")


def test_two_starts_have_one_winner(native: Native) -> None:
    native.write(configuration(*SLEEP))
    for _ in range(5):
        name = native.name()
        native("create", "--bundle", native.bundle, name, stdout=subprocess.DEVNULL)
        words = [*native.words, "start", name]
        both = [subprocess.Popen(words, stderr=subprocess.PIPE) for _ in range(2)]
        assert sorted(process.wait(20) for process in both) == [0, 1]
        for process in both:
            assert process.stderr is not None
            process.stderr.close()
        native("delete", "--force", name)


def test_start_of_a_dead_init_does_not_hang(native: Native) -> None:
    native.write(configuration(*SLEEP))
    name = native.name()
    native("create", "--bundle", native.bundle, name, stdout=subprocess.DEVNULL)
    os.kill(native.state(name)["pid"], signal.SIGKILL)
    wait_for_status(native, name, "stopped")
    assert "stopped" in native("start", name, status=1).stderr


def test_preserved_descriptors_and_no_others(native: Native, tmp_path: Path) -> None:
    (tmp_path / "given").write_text("from outside")
    native.write(configuration("sh", "-c", "cat <&3 2>/dev/null; ls /proc/self/fd"))
    # ls itself has its directory open, as the lowest free number.
    for options, seen in (
        (["--preserve-fds", "1"], "from outside0\n1\n2\n3\n4\n"),
        ([], "0\n1\n2\n3\n"),
    ):
        words = [*native.words, "run", *options, "--bundle", str(native.bundle), native.name()]
        script = f'exec 3<{tmp_path}/given 9</etc; exec "$@"'
        done = subprocess.run(
            ["sh", "-c", script, "sh", *words], capture_output=True, text=True, timeout=20
        )
        assert (done.stdout, done.returncode) == (seen, 0), done.stderr


def test_capabilities_that_cannot_be_granted_are_told(native: Native) -> None:
    document = configuration("grep", "CapBnd", "/proc/self/status")
    sets = document["process"]["capabilities"]
    sets["bounding"] = ["CAP_KILL", "CAP_UNHEARD_OF", "CAP_SYS_NICE"]
    done = native.run(document)
    assert done.stdout == "CapBnd:\t0000000000800020\n"
    said = "krun: warning: ignoring unknown or unavailable capabilities: CAP_UNHEARD_OF\n"
    assert done.stderr == said
    sets["bounding"] = ["CAP_KILL", "CAP_SYS_NICE"]
    assert native.run(document).stderr == ""
    native.write(document)
    words = [*native.words, "run", "--bundle", str(native.bundle), native.name()]
    # Without CAP_SYS_NICE there is none to give.
    less = subprocess.run(
        ["setpriv", "--bounding-set", "-sys_nice", *words], capture_output=True, text=True
    )
    assert less.stdout == "CapBnd:\t0000000000000020\n"
    assert less.stderr == said.replace("CAP_UNHEARD_OF", "CAP_SYS_NICE")
    name = native.start(*SLEEP)
    done = native("exec", "--cap", "CAP_WHATEVER", name, "true")
    assert done.stderr == said.replace("CAP_UNHEARD_OF", "CAP_WHATEVER")


def test_without_resctrl_it_says_so(native: Native) -> None:
    if "resctrl" in Path("/proc/self/mountinfo").read_text():
        pytest.skip("resctrl is mounted: the failure this test looks for does not happen")
    document = configuration("true")
    document["linux"]["intelRdt"] = {"closID": "shared"}
    assert "linux.intelRdt: resctrl is not mounted" in native.run(document, 1).stderr
    name = native.start(*SLEEP)
    done = native("update", "--l3-cache-schema", "L3:0=f", name, status=1)
    assert "created without linux.intelRdt" in done.stderr


def test_a_filter_that_does_not_know_new_calls(native: Native) -> None:
    """Profiles older than a call answer it with EPERM, and are in force before krun is done."""
    document = configuration("echo", "ran")
    os.symlink("busybox", native.rootfs / "bin/echo")
    document["process"]["noNewPrivileges"] = False
    refused = {"names": ["faccessat2", "close_range"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1}
    document["linux"]["seccomp"] = {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [refused]}
    assert native.run(document).stdout == "ran\n"
    (native.rootfs / "plain").write_text("x")
    for user in (0, 5):
        document["process"]["user"] = {"uid": user, "gid": user}
        document["process"]["args"] = ["/plain"]
        assert '"/plain": permission denied' in native.run(document, 126).stderr


def test_ambient_capabilities(native: Native) -> None:
    document = configuration("grep", "CapAmb", "/proc/self/status")
    sets = document["process"]["capabilities"]
    sets |= {"inheritable": ["CAP_KILL"], "ambient": ["CAP_KILL", "CAP_NET_BIND_SERVICE"]}
    done = native.run(document)
    assert done.stdout == "CapAmb:\t0000000000000020\n"
    why = "can't raise ambient capabilities: not permitted and inheritable: CAP_NET_BIND_SERVICE"
    assert done.stderr == f"krun: warning: {why}\n"
    document["process"]["args"] = ["sleep", "100"]
    native.write(document)
    name = native.name()
    native("run", "--detach", "--bundle", native.bundle, name, stdout=subprocess.DEVNULL)
    assert native("exec", name, "true").stderr == "", "create has said it"
    assert native("exec", "--cap", "CAP_KILL", name, "true").stderr == f"krun: warning: {why}\n"
    sets["ambient"] = []
    native.write(document)
    name = native.name()
    native("run", "--detach", "--bundle", native.bundle, name, stdout=subprocess.DEVNULL)
    words = ("grep", "CapAmb", "/proc/self/status")
    done = native("exec", "--cap", "CAP_KILL", "--cap", "CAP_CHOWN", name, *words)
    assert done.stdout == "CapAmb:\t0000000000000020\n", "only what is inheritable"


def test_loopback_is_up(native: Native) -> None:
    assert native.shell("cat /sys/class/net/lo/flags") == "0x9\n"


@pytest.mark.parametrize("offsets", [None, {"boottime": {"secs": 100, "nanosecs": 0}}])
def test_time_namespace(native: Native, offsets: dict[str, object] | None) -> None:
    document = configuration("readlink", "/proc/self/ns/time")
    document["linux"]["namespaces"].append({"type": "time"})
    if offsets:
        document["linux"]["timeOffsets"] = offsets
    inside = native.run(document).stdout.strip()
    assert inside.startswith("time:")
    assert inside != os.readlink("/proc/self/ns/time")


def test_kill_of_what_outlived_init(native: Native) -> None:
    name = _two_without_a_pid_namespace(native)
    end = time.monotonic() + 10
    os.kill(native.state(name)["pid"], signal.SIGKILL)
    wait_for_status(native, name, "stopped")
    native("kill", name, "KILL")
    while json.loads(native("ps", "--format", "json", name).stdout):
        assert time.monotonic() < end
    assert "not running" in native("kill", name, "KILL", status=1).stderr


def test_what_runc_does_without_being_asked(native: Native) -> None:
    script = "echo $HOME; ls -ld /new /old; grep -c /masked /proc/self/mountinfo"
    document = configuration("sh", "-c", script)
    document["process"]["env"].append("HOME=")
    (native.rootfs / "etc").mkdir()
    (native.rootfs / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
    (native.rootfs / "old").mkdir(mode=0o711)
    (native.rootfs / "masked").mkdir()
    for place in ("/new", "/old"):
        document["mounts"].append({"destination": place, "type": "tmpfs", "source": "tmpfs"})
    document["linux"]["maskedPaths"] += ["/masked", "/masked"]
    home, new, old, masks = native.run(document).stdout.splitlines()
    assert (home, masks) == ("/root", "1")
    assert (new.split()[0], old.split()[0]) == ("drwxrwxrwt", "drwx--x--x")


def test_exec_has_the_personality_of_the_container(native: Native) -> None:
    document = configuration("sleep", "100")
    document["linux"]["personality"] = {"domain": "LINUX32"}
    native.write(document)
    name = native.name()
    native("run", "--detach", "--bundle", native.bundle, name, stdout=subprocess.DEVNULL)
    os.symlink("busybox", native.rootfs / "bin/uname")
    assert native("exec", name, "uname", "-m").stdout == "i686\n"


@pytest.mark.parametrize("call", ["clone3", "mkdir:when=2", "mkdir:when=4"])
@pytest.mark.parametrize("verb", ["create", "run"])
def test_interrupt_before_it_is_noted_what_is_there(native: Native, verb: str, call: str) -> None:
    """Ctrl-C when init or a cgroup is there; the fixture looks at what is left."""
    native.write(configuration("sleep", "100"))
    name = native.name()
    kind, _, when = call.partition(":")
    strace = ["strace", "-qq", "-o", "/dev/null", "-e", f"trace={kind}"]
    strace += ["-e", f"inject={kind}:signal=INT:{when or 'when=1'}"]
    words = [*strace, *native.words, verb, "--bundle", str(native.bundle), name]
    start = time.monotonic()
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 130, done.stderr
    # Less than what a killed init is given.
    assert time.monotonic() - start < 9
    assert name not in os.listdir(native.root)


SYS_SETNS = 308


def _in_call(number: int, program: str) -> bool:
    """Whether a process with this word in its command line is in a call (proc_pid_syscall(5))."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            now = (entry / "syscall").read_text().split()[0]
            if now == str(number) and program in (entry / "cmdline").read_text():
                return True
        except OSError:
            continue
    return False


@pytest.mark.parametrize("when", ["delay_enter", "delay_exit"])
def test_exec_while_the_container_ends(native: Native, when: str) -> None:
    """Its init is killed before the joiner is in its namespaces, or before the payload is born."""
    name = native.start(*SLEEP)
    strace = ["strace", "-f", "-qq", "-o", "/dev/null"]
    strace += ["-e", "trace=setns", "-e", f"inject=setns:{when}=2000000"]
    words = [*strace, *native.words, "exec", name, "true"]
    with subprocess.Popen(
        words, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        while not _in_call(SYS_SETNS, native.words[0]):
            assert process.poll() is None
            time.sleep(0.01)
        native("kill", name, "KILL")
        assert process.stderr is not None
        said = process.stderr.read()
    assert (process.returncode, said) == (255, "krun: cannot exec in a stopped container\n")


def test_start_of_what_is_deleted_at_once(native: Native) -> None:
    native.write(configuration("true"))
    name = native.name()
    native("create", "--bundle", native.bundle, name, stdout=subprocess.DEVNULL)
    strace = ["strace", "-qq", "-o", "/dev/null", "-e", "inject=unlink:error=ENOENT"]
    words = [*strace, *native.words, "start", name]
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("start", ["warm", "cold"])
def test_a_life_from_either_start(
    native: Native, monkeypatch: pytest.MonkeyPatch, start: str
) -> None:
    """All other tests have the warm start; a machine without one has the plain interpreter."""
    monkeypatch.setenv("KRUN_TEST_START", start)
    assert native.shell("echo $((6 * 7))") == "42\n"
    name = native.name()
    native.write(configuration("sleep", "60"))
    native("create", "--bundle", native.bundle, name, stdout=subprocess.DEVNULL)
    assert native.state(name)["status"] == "created"
    native("start", name)
    assert native.state(name)["status"] == "running"
    assert native("exec", name, "id", "-u").stdout == "0\n"
    assert native("exec", name, "sh", "-c", "exit 7", status=7).stdout == ""
    native("kill", name, "KILL")
    while native.state(name)["status"] != "stopped":
        time.sleep(0.01)
    native("delete", name)
    assert native.left() == []


@pytest.mark.parametrize("start", ["warm", "cold"])
def test_closed_descriptors_become_the_null_device(
    native: Native, monkeypatch: pytest.MonkeyPatch, start: str
) -> None:
    """Without them a file of krun's would be the payload's standard input or output."""
    monkeypatch.setenv("KRUN_TEST_START", start)
    native.write(
        configuration("sh", "-c", "for n in 0 1 2; do readlink /proc/self/fd/$n; done >/o")
    )
    script = 'exec "$@" <&- >&- 2>&-'
    words = [*native.words, "run", "--bundle", str(native.bundle), native.name()]
    assert subprocess.run(["sh", "-c", script, "sh", *words]).returncode == 0
    assert (native.rootfs / "o").read_text() == "/dev/null\n/o\n/dev/null\n"


def test_update_names_what_is_wrong_in_its_resources(native: Native) -> None:
    name = native.start("sleep", "100")
    before = (
        native.state(name),
        json.loads(native("events", "--stats", name).stdout)["data"]["pids"],
    )
    for document, words in (
        ({"pids": {"limit": "y"}}, "pids.limit: must be an integer"),
        ({"memory": {"limit": 1.5}}, "memory.limit: must be an integer"),
        ({"memory": []}, "memory: must be an object"),
        ({"cpu": {"shares": -5}}, "cpu.shares: must be"),
        ({"cpu": {"cpus": 7}}, "cpu.cpus: must be a string"),
        ([], "must be an object"),
    ):
        text = json.dumps(document)
        done = native("update", "--resources", "-", name, input=text, status=1)
        assert words in done.stderr
        assert len(done.stderr.splitlines()) == 1
    after = native.state(name), json.loads(native("events", "--stats", name).stdout)["data"]["pids"]
    assert after == before


def _damage(chance: random.Random, content: bytes) -> bytes:
    """Cut off, emptied, with other bytes, or JSON with a value of another kind."""
    kind = chance.randrange(4)
    if kind == 0:
        return content[: chance.randrange(len(content))]
    if kind == 1:
        return chance.choice((b"", b"[]", b"{}", b"null", b"7"))
    if kind == 2:
        changed = bytearray(content)
        for _ in range(4):
            changed[chance.randrange(len(changed))] = chance.randrange(256)
        return bytes(changed)
    try:
        document = json.loads(content)
    except ValueError:
        return b"-1 -1 -1\n{}"
    document[chance.choice(list(document))] = chance.choice((None, -1, "x", [], {}, 1.5, True))
    return json.dumps(document).encode()


def test_damaged_files_of_a_container_are_named(native: Native) -> None:
    """No verb ends in a traceback or asks for a defect to be reported."""
    chance = random.Random(5)
    name = native.start("sleep", "100")
    directory = native.root / name
    files = {path: path.read_bytes() for path in directory.iterdir() if path.is_file()}
    assert {path.name for path in files} >= {"state.json", "config.json", "launcher"}
    verbs = [
        *(("state", name), ("list",), ("ps", name), ("exec", name, "true"), ("kill", name, "0")),
        *(("events", "--stats", name), ("update", "--pids-limit", "50", name), ("start", name)),
    ]
    for _ in range(80):
        path = chance.choice(list(files))
        path.write_bytes(_damage(chance, files[path]))
        done = native(*chance.choice(verbs), status=None)
        assert "traceback" not in done.stderr.lower(), path.read_bytes()
        for other, content in files.items():
            other.write_bytes(content)


@pytest.mark.parametrize("content", ["", '{"id":', '{"pid": -1}', "[]"])
def test_delete_clears_up_after_a_damaged_state(native: Native, content: str) -> None:
    """What the launcher reads tells of the process and, by it, of the cgroups."""
    name = native.start("sleep", "100")
    pid = native.state(name)["pid"]
    (native.root / name / "state.json").write_text(content)
    done = native("delete", name, status=1)
    assert "state.json is damaged" in done.stderr
    assert f"krun delete --force {name} removes" in done.stderr
    native("delete", "--force", name)
    found = proc.stat(pid)
    assert found is None or found.state in "ZX"
    assert native.left() == []


def test_delete_of_a_damaged_state_spares_a_shared_cgroup(native: Native) -> None:
    """A cgroup that merely contains the short id in its name may be anybody's."""
    name = native.name()
    group = f"shared-{name}-session"
    document = configuration("sleep", "100")
    document["linux"]["cgroupsPath"] = f"/{group}"
    native.write(document)
    native("run", "--detach", "--bundle", native.bundle, name, stdout=subprocess.DEVNULL)
    pid = native.state(name)["pid"]
    directory = Path(f"/sys/fs/cgroup/cpu/{group}")
    with subprocess.Popen(["sleep", "100"]) as other:
        (directory / "cgroup.procs").write_text(str(other.pid))
        (native.root / name / "state.json").write_text("")
        native("delete", "--force", name)
        found = proc.stat(pid)
        assert found is None or found.state in "ZX"
        assert other.poll() is None
        other.kill()
    for place in cgroupfs.directories(f"/{group}", cgroupfs.hierarchies()):
        cgroupfs.remove_tree(place.path)
