"""What runc's own integration tests look for: its words, statuses and descriptors."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
from native_parts import Native, configuration

from krun.linux import cgroupfs
from krun.schema import explain

SLEEP = ("sleep", "100")


def _namespaces(native: Native, *options: str) -> set[str]:
    native("spec", "--bundle", native.bundle, *options)
    document = json.loads((native.bundle / "config.json").read_text())
    (native.bundle / "config.json").unlink()
    assert explain(document) == []
    return {one["type"] for one in document["linux"]["namespaces"]}


@pytest.mark.parametrize("options", [(), ("--rootless",)])
def test_spec_lists_a_cgroup_namespace_on_v2_alone(native: Native, options: Any) -> None:
    kinds = _namespaces(native, *options)
    assert {"pid", "mount"} <= kinds
    assert ("cgroup" in kinds) == (cgroupfs.version() == 2)


def test_exec_that_fails_ends_with_255(native: Native) -> None:
    name = native.start(*SLEEP)
    assert native("exec", name, "sh", "-c", "exit 7", status=7)
    native("exec", name, "no-such-binary", status=255)
    native("exec", "--pid-file", "/none/x", name, "true", status=255)
    native("exec", "no-such-container", "true", status=255)
    assert native("exec", status=2)


def test_exec_below_the_cgroup(native: Native) -> None:
    name = native.start(*SLEEP)
    for path, said in (
        ("..", " .. is not a sub cgroup path"),
        ("a/../..", " a/../.. is not a sub cgroup path"),
        ("none", f"/{name}/none/cgroup.procs: no such file "),
        ("whaaat:/", "unknown controller whaaat"),
    ):
        assert said in native("exec", "--cgroup", path, name, "true", status=255).stderr
    place = next(one for one in cgroupfs.directories(f"/{name}", cgroupfs.hierarchies()))
    below = Path(place.path) / "below"
    below.mkdir()
    words = ("--cgroup", "below", "--cgroup", "none", name, "true")
    assert " adding pid " in native("exec", *words, status=255).stderr
    native("exec", "--cgroup", "below", name, "true")
    below.rmdir()


def test_unified_limits_on_v1(native: Native) -> None:
    if cgroupfs.version() == 2:
        pytest.skip("needs cgroup v1 (or hybrid): on v2 such limits are right")
    document = configuration("true")
    document["linux"]["resources"]["unified"] = {"memory.min": "131072"}
    said = native.run(document, 1).stderr
    assert "invalid configuration: cannot use unified on cgroup v1" in said


def test_a_cgroup_that_is_not_empty(native: Native) -> None:
    document = configuration(*SLEEP)
    other = native.name()
    document["linux"]["cgroupsPath"] = f"/{other}"
    native.write(document)
    words = ("--bundle", native.bundle)
    native("run", "--detach", *words, other, stdout=subprocess.DEVNULL)
    said = native("create", *words, native.name(), status=1).stderr
    assert "container's cgroup is not empty: 1 process(es) found" in said
    assert native.state(other)["status"] == "running"


def _filter(call: str, action: str, listener: str = "") -> dict[str, Any]:
    rule = {"names": [call], "action": action}
    section: dict[str, Any] = {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [rule]}
    return {**section, "listenerPath": listener} if listener else section


def test_seccomp_agents(native: Native) -> None:
    document = configuration("true")
    gone = str(native.directory / "none.sock")
    document["linux"]["seccomp"] = _filter("mkdir", "SCMP_ACT_NOTIFY", gone)
    said = native.run(document, 1).stderr
    assert f"failed to connect with seccomp agent specified in the seccomp profile: {gone}" in said
    with socket.socket(socket.AF_UNIX) as agent:
        agent.bind(gone)
        agent.listen()
        document["linux"]["seccomp"] = _filter("write", "SCMP_ACT_NOTIFY", gone)
        said = native.run(document, 1).stderr
    assert "SCMP_ACT_NOTIFY cannot be used for the write syscall" in said


@pytest.mark.parametrize(
    "kind", ["prestart", "createRuntime", "createContainer", "startContainer", "poststart"]
)
def test_the_hook_that_failed(native: Native, kind: str) -> None:
    os.symlink("busybox", native.rootfs / "bin/false")
    document = configuration(*SLEEP)
    document["hooks"] = {kind: [{"path": "/bin/true"}, {"path": "/bin/false"}]}
    said = native.run(document, 1).stderr
    assert f"error running {kind} hook #1: error running hook /bin/false: exit status 1" in said


def test_the_hook_that_a_signal_ended(native: Native) -> None:
    os.symlink("busybox", native.rootfs / "bin/mkdir")
    document = configuration("true")
    document["linux"]["seccomp"] = _filter("mkdir", "SCMP_ACT_KILL")
    hook = {"path": "/bin/sh", "args": ["sh", "-c", "exec mkdir /x"]}
    document["hooks"] = {"startContainer": [hook]}
    said = native.run(document, 1).stderr
    assert "error running hook /bin/sh: signal: bad system call" in said


def test_create_container_hooks_begin_in_the_root(native: Native) -> None:
    (native.rootfs / "lib").mkdir()
    (native.rootfs / "lib/file").touch()
    document = configuration("cat", "/lib/file")
    script = f"mount --bind {native.bundle}/config.json ./lib/file"
    hook = {"path": "/bin/sh", "args": ["sh", "-c", script], "env": [f"PATH={os.environ['PATH']}"]}
    document["hooks"] = {"createContainer": [hook]}
    assert '"createContainer"' in native.run(document).stdout


def test_start_container_hooks_have_the_payloads_environment(native: Native) -> None:
    (native.rootfs / "out").touch()
    document = configuration("cat", "/out")
    document["process"]["env"].append("ONE=two")
    hook = {"path": "/bin/sh", "args": ["sh", "-c", "env > /out"]}
    document["hooks"] = {"startContainer": [hook]}
    variables = dict(line.split("=", 1) for line in native.run(document).stdout.splitlines())
    variables = {name: variables[name] for name in variables.keys() - {"PWD", "SHLVL"}}
    assert variables == {"PATH": "/bin", "TERM": "xterm", "ONE": "two", "HOME": "/"}
    hook["env"] = ["PATH=/bin", "THREE=four"]  # type: ignore[assignment]
    said = native.run(document).stdout
    assert "THREE=four" in said
    assert "ONE=" not in said


def test_an_interpreter_that_is_not_there(native: Native) -> None:
    (native.rootfs / "script").write_text("#!/none\n")
    (native.rootfs / "script").chmod(0o755)
    done = native.run(configuration("/script"), 127)
    assert done.stderr == "exec /script: no such file or directory\n"
    name = native.start(*SLEEP)
    done = native("exec", name, "/script", status=255)
    assert done.stderr == "krun: exec /script: no such file or directory\n"


DEBUG = ("nsexec container setup", "child process in init()")


def test_debug_lines(native: Native) -> None:
    native.write(configuration("true"))
    words = ("run", "--bundle", native.bundle)
    done = native("--debug", *words, native.name())
    for said in (*DEBUG, "init: closing the pipe to signal completion"):
        assert any(said in line and "level=debug" in line for line in done.stderr.splitlines())
    log = native.directory / "log"
    done = native("--debug", "--log", log, *words, native.name())
    assert done.stderr == ""
    assert "level=debug" in log.read_text()
    name = native.start(*SLEEP)
    done = native("--debug", "exec", name, "true")
    for said in (*DEBUG, "setns_init: about to exec"):
        assert any(said in line and "level=debug" in line for line in done.stderr.splitlines())
    assert native("exec", name, "true").stderr == ""


def _created(native: Native, *args: str) -> tuple[str, int]:
    native.write(configuration(*args))
    name = native.name()
    native("create", "--bundle", native.bundle, name, stdout=subprocess.DEVNULL)
    return name, native.state(name)["pid"]


def test_waiting_init_has_the_fifo_alone_of_the_state(native: Native) -> None:
    name, pid = _created(native, "true")
    links = [os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir()]
    own = {link for link in links if link.startswith(str(native.directory))}
    assert own == {str(native.root / name / "exec.fifo")}
    native("start", name)


def test_start_after_the_word_was_lost(native: Native) -> None:
    """Killed with the word still in the fifo, init is gone, and start says so."""
    name, pid = _created(native, "true")
    os.kill(pid, signal.SIGSTOP)
    start = [*native.words, "start", name]
    with subprocess.Popen(start, stderr=subprocess.PIPE, text=True) as started:
        fifo = native.root / name / "exec.fifo"
        reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
        assert select.select([reader], [], [], 10)[0]
        os.close(reader)
        os.kill(pid, signal.SIGKILL)
        _, said = started.communicate(timeout=10)
    assert "init process is gone" in said
    assert started.returncode == 1


@pytest.mark.parametrize("access", ["rwa", "awm", "rwm", ""])
def test_device_access(native: Native, access: str) -> None:
    document = configuration("sh", "-c", "head -c 0 /dev/full")
    os.symlink("busybox", native.rootfs / "bin/head")
    rule = {"allow": False, "type": "c", "major": 1, "minor": 11, "access": access}
    document["linux"]["resources"]["devices"].append(rule)
    assert explain(document) == []
    native.run(document)
    rule["access"] = "a"
    assert explain(document)
    assert "access: must be made of the letters" in native.run(document, 1).stderr


KNOWN = """
    access arch_prctl brk capget capset chdir close close_range dup2 execve execveat exit exit_group
    faccessat faccessat2 fchdir fchown fcntl fstat futex getcwd getdents64 getegid geteuid getgroups
    getpid getrandom getuid ioctl lseek madvise mmap mprotect munmap newfstatat open openat openat2
    pipe2 prctl pread64 prlimit64 read readlink readlinkat rseq rt_sigaction rt_sigprocmask
    rt_sigreturn set_robust_list set_tid_address setgid setgroups setresgid setresuid setuid
    sigaltstack sigreturn stat statfs umask uname write writev
"""

CALLS = r"""
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <unistd.h>
#include <sys/syscall.h>
static int number(long call) { errno = 0; syscall(call, 0, 0, 0); return errno; }
int main(void) { printf("%d %d\n", number(SYS_unshare), number(1000)); return 0; }
"""


@pytest.mark.parametrize(
    ("default", "seen"),
    [({}, "1 38"), ({"defaultErrnoRet": 6}, "6 6"), ({"defaultErrnoRet": 1}, "1 1")],
)
def test_calls_that_a_filter_does_not_know(
    native: Native, default: dict[str, int], seen: str
) -> None:
    """They get ENOSYS, unless the filter says what they get."""
    native.compile("calls", CALLS)
    document = configuration("calls")
    known = [{"names": KNOWN.split(), "action": "SCMP_ACT_ALLOW"}]
    document["linux"]["seccomp"] = {
        "defaultAction": "SCMP_ACT_ERRNO",
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "syscalls": known,
        **default,
    }
    assert native.run(document).stdout == f"{seen}\n"
