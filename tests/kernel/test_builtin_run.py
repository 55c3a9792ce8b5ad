"""The built-in monitor on a real KVM: what a payload sees is what it sees without a monitor.

The cases are words of tests/payloads/builtin.c; most are run twice, natively and in the monitor,
and must say and end the same.
"""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import needs
import pytest
from kernel.builtin_host import MONITOR, NEEDS_KVM, ROOT, both, run
from km import build

EFAULT = "-14"

pytestmark = NEEDS_KVM


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("builtin") / "builtin"
    return build.compile_static(build.TESTS / "payloads" / "builtin.c", target, *build.FREESTANDING)


@pytest.mark.parametrize(
    "case", ["hello", "memory", "faults", "signals", "threads", "forks", "polls", "to a thread"]
)
def test_case_is_as_without_a_monitor(program: Path, case: str) -> None:
    said = both(program, case)
    assert said
    assert "failed" not in said


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (("exit", 0), 0),
        (("exit", 300), 44),
        (("end", 4), 4),
        (("raise", 15), -15),
        (("raise", 6), -6),
        (("raise", 17), 0),
        (("touch", 0), -11),
        (("end by thread",), 9),
        (("leader ends",), 0),
        (("spinning thread",), 3),
        (("executing thread",), 0),
        # Many in a row: a thread that takes itself for the last would end the process.
        (("executing threads", 300 * "."), 0),
        (("red zone",), 0),
    ],
)
def test_status_is_the_payloads(program: Path, words: tuple[object, ...], status: int) -> None:
    both(program, *words)
    assert run(program, *words).returncode == status
    assert run(*MONITOR, program, *words).returncode == status


@pytest.mark.parametrize("case", ["vectors", "execute"])
def test_initial_stack_is_as_without_a_monitor(program: Path, case: str) -> None:
    variables = {"A": "b", "C": "d e", "LONG": "x" * 5000}
    here = run(program, case, "", "two words", "y" * 9000, env=variables)
    there = run(*MONITOR, program, case, "", "two words", "y" * 9000, env=variables)
    # The auxiliary vector's order is nobody's business; a vDSO is there if it works.
    said = [sorted(set(done.stdout.splitlines()) - {"vdso 1"}) for done in (here, there)]
    assert said[0] == said[1]
    assert there.returncode == here.returncode == 0
    assert "headers 1" in there.stdout


def test_ring_0_serves_where_it_is_faster(program: Path) -> None:
    for case in ("memory", "signals", "threads"):
        both(program, case, options=("--ring", "0"))


def test_bad_pointers_are_efault_and_touch_nothing(program: Path) -> None:
    assert both(program, "pointers").count(f" {EFAULT}\n") > 300


@pytest.mark.parametrize("seed", range(1, 5))
def test_odd_calls_do_no_harm(program: Path, seed: int) -> None:
    done = run(*MONITOR, program, "fuzz", seed, 3000)
    assert (done.returncode, done.stdout, done.stderr) == (0, "survived\n", "")


def test_kontains_hypercalls_are_served(program: Path) -> None:
    done = run(*MONITOR, program, "hypercall")
    assert (done.returncode, done.stdout) == (4, "by port\nwritten 8\nunknown -38\n")


def test_copies_a_file(program: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(os.urandom(1 << 20))
    assert run(*MONITOR, program, "copy", source, tmp_path / "copy").returncode == 0
    assert (tmp_path / "copy").read_bytes() == source.read_bytes()


def test_serves_a_real_client(program: Path) -> None:
    with subprocess.Popen(
        [*MONITOR, program, "serve", "3"], stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        port = int(server.stdout.readline().split()[1])
        for _ in range(3):
            with socket.create_connection(("127.0.0.1", port), 10) as client:
                client.sendall(b"GET / HTTP/1.0\r\n\r\n")
                answer = b"".join(iter(lambda: client.recv(4096), b""))
            assert answer.endswith(b"\r\n\r\nhello\n")
        assert server.wait(20) == 0


@contextlib.contextmanager
def started(*argv: object) -> Iterator[subprocess.Popen[str]]:
    """A program that has said its first line; killed in the end, whatever the test finds.

    In a process group of its own: terminal stops do nothing in an orphaned one (setpgid(2)), such
    as that of a test run that nobody's shell started.
    """
    words = [*map(str, argv)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, process_group=0) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline()
            yield child
        finally:
            child.kill()


@pytest.mark.parametrize("case", ["spin", "wait"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_signal_from_outside_ends_it(program: Path, case: str, number: int) -> None:
    with started(*MONITOR, program, case) as child:
        child.send_signal(number)
        assert child.wait(10) == -number


def test_stop_and_continue(program: Path) -> None:
    with started(*MONITOR, program, "spin") as child:
        child.send_signal(signal.SIGTSTP)
        assert os.WIFSTOPPED(os.waitpid(child.pid, os.WUNTRACED)[1])
        child.send_signal(signal.SIGCONT)


def test_pid_1_drops_what_it_has_no_handler_for(program: Path) -> None:
    private = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")
    assert run(*private, *MONITOR, program, "raise", 15).returncode == 0
    assert run(*private, program, "raise", 15).returncode == 0
    # A fault ends even init.
    assert run(*private, *MONITOR, program, "touch", 0).returncode == 128 + signal.SIGSEGV


INIT = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from krun.monitor.builtin import run; "
INIT += "sys.exit(run.run(sys.argv[1:], [], {'init': True}))"


def test_with_an_init_pid_1_is_not_the_payload(program: Path) -> None:
    private = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")
    init = (*private, sys.executable, "-I", "-S", "-c", INIT, program)
    assert run(*init, "exit", 7).returncode == 7
    assert run(*init, "raise", 15).returncode == 128 + signal.SIGTERM
    assert run(*init, "touch", 0).returncode == 128 + signal.SIGSEGV
    with subprocess.Popen([*map(str, init), "wait"], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "waiting\n"
        children = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
        os.kill(int(children[0]), signal.SIGTERM)
        assert child.wait(10) == 128 + signal.SIGTERM


def test_a_closed_standard_output_is_no_matter(program: Path) -> None:
    done = run(
        sys.executable,
        "-c",
        "import os, sys; os.close(1); os.close(0); os.close(2); "
        "os.execv(sys.argv[1], sys.argv[1:])",
        *MONITOR,
        program,
        "exit",
        6,
    )
    assert done.returncode == 6


def test_monitors_descriptors_are_hidden(program: Path) -> None:
    both(program, "descriptors")


def test_others_see_the_payloads_command_line_only(program: Path) -> None:
    variables = {"SECRET": "of the caller"}
    with subprocess.Popen(
        [*MONITOR, program, "wait", "x"], stdout=subprocess.PIPE, env=variables
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        shown = Path(f"/proc/{child.pid}/cmdline").read_bytes()
        environment = Path(f"/proc/{child.pid}/environ").read_bytes()
        name = Path(f"/proc/{child.pid}/comm").read_text()
        child.kill()
    assert shown.rstrip(b"\0").split(b"\0") == [bytes(program), b"wait", b"x"]
    assert not environment.strip(b"\0")
    assert name == "builtin\n"


def test_unusable_programs(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("hello")
    for path, status, word in (
        (tmp_path / "none", 127, "no such file"),
        (tmp_path, 126, "ermission denied"),
        (text, 126, "ermission denied"),
    ):
        done = run(*MONITOR, path)
        assert done.returncode == status
        assert word in done.stderr
        assert done.stderr.count("\n") == 1
    text.chmod(0o755)
    done = run(*MONITOR, text)
    assert done.returncode == 126
    assert "exec format error" in done.stderr


def test_scripts(program: Path, tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text(f"#! {program} vectors and\n")
    script.chmod(0o755)
    here = run(script, "x", env={})
    there = run(*MONITOR, script, "x", env={})
    said = [sorted(set(done.stdout.splitlines()) - {"vdso 1"}) for done in (here, there)]
    assert said[0] == said[1]


def test_bad_devices() -> None:
    for device, word in (("/nonexistent", "No such file"), ("/dev/null", "no KVM device")):
        done = run(*MONITOR, "-F", device, "/bin/true")
        assert done.returncode == 1
        assert word in done.stderr


@pytest.mark.usefixtures("open_checkout")
def test_no_permission_names_the_way_out(tmp_path: Path) -> None:
    node = tmp_path / "kvm"
    os.mknod(node, 0o20600, os.stat("/dev/kvm").st_rdev)
    done = run(*MONITOR, "-F", node, "/bin/true", user=65534, group=65534, cwd="/")
    assert done.returncode == 1
    assert f"give the user read and write permission on {node}" in done.stderr


def test_statistics_print_a_table(program: Path) -> None:
    done = run(*MONITOR, "-S", program, "calls", 50)
    assert re.search(r"^getpid +50 +0 ", done.stderr, re.M)
    assert re.search(r"^total ", done.stderr, re.M)


def test_core_file_is_readable(program: Path, tmp_path: Path) -> None:
    core = tmp_path / "core"
    assert run(*MONITOR, "-C", core, program, "touch", 0).returncode == -signal.SIGSEGV
    assert oct(core.stat().st_mode & 0o777) == "0o600"
    shown = run("readelf", "-h", "-n", core).stdout
    assert "CORE (Core file)" in shown
    assert "NT_PRSTATUS" in shown
    assert [each.name for each in tmp_path.iterdir()] == ["core"]


def test_no_core_file_takes_the_place_of_a_device(program: Path, tmp_path: Path) -> None:
    node = tmp_path / "null"
    os.mknod(node, 0o20666, os.makedev(1, 3))
    assert run(*MONITOR, "-C", node, program, "touch", 0).returncode == -signal.SIGSEGV
    assert node.is_char_device()
    assert list(tmp_path.iterdir()) == [node]


def test_environment_options(program: Path) -> None:
    done = run(*MONITOR, "-e", "X=1", "--putenv", "Y=2", program, "vectors", env={"A": "b"})
    assert "X=1\nY=2\n" in done.stdout
    assert "A=b" not in done.stdout
    done = run(*MONITOR, "--copyenv", "PA=Z", program, "vectors", env={"PAGER": "x", "B": "c"})
    assert "B=c\n" in done.stdout
    assert "PAGER" not in done.stdout
    assert run(*MONITOR, "-e", "X=1", "--copyenv", "Y", program).returncode == 2


def test_memory_beyond_the_guests(program: Path) -> None:
    """At most 15 MB more than Python's own and what the payload uses."""
    with subprocess.Popen([*MONITOR, program, "wait"], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        child.stdout.readline()
        used = _resident(child.pid)
        child.kill()
    words = [sys.executable, "-I", "-S", "-c", "print(flush=True); input()"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as bare:
        assert bare.stdout is not None
        bare.stdout.readline()
        idle = _resident(bare.pid)
        bare.kill()
    assert used - idle < 15 << 10


def _resident(pid: int) -> int:
    text = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", text)
    assert found
    return int(found[1])


def _refuses_ordinary_code() -> bool:
    """Whether KVM says that it cannot run SSE code; any other failure is for the tests to find."""
    return needs.KVM and "KVM internal error" in run(*MONITOR, "/bin/true").stderr


ORDINARY = pytest.mark.skipif(
    _refuses_ordinary_code(),
    reason="needs hardware virtualization (vmx or svm): KVM without it runs no SSE code",
)


@ORDINARY
def test_ordinary_programs() -> None:
    script = "echo a | cat | tr a b; (exit 3); echo $?; trap 'echo got' TERM; kill $$; echo done"
    done = run(*MONITOR, "/bin/sh", "-c", script)
    assert (done.returncode, done.stdout) == (0, "b\n3\ngot\ndone\n")
    assert run(*MONITOR, "/bin/uname", "-r").stdout.endswith(".kontain.KVM\n")


@ORDINARY
def test_monitors_descriptors_are_not_listed() -> None:
    listed = run("/bin/ls", "/proc/self/fd").stdout
    assert listed == "0\n1\n2\n3\n"
    assert run(*MONITOR, "/bin/ls", "/proc/self/fd").stdout == listed


@ORDINARY
@pytest.mark.parametrize(
    "compiler", [("gcc", "-pthread"), ("gcc", "-static", "-pthread"), ("musl-gcc", "-static")]
)
def test_c_libraries(compiler: tuple[str, ...], tmp_path: Path) -> None:
    needs.need(compiler[0])
    target = tmp_path / "libc"
    source = build.TESTS / "payloads" / "libc.c"
    done = run(*compiler, "-O1", "-Wall", "-Werror", "-o", target, source, "-lm")
    assert done.returncode == 0, done.stderr
    assert "missing: 2\n" in both(target)


class Terminal:
    """A session on a pseudo-terminal."""

    def __init__(self, *argv: str) -> None:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.execv(MONITOR[0], [*MONITOR, *argv])
        self.said = b""

    def until(self, text: bytes) -> None:
        while text not in self.said:
            assert select.select([self.fd], [], [], 20)[0], (text, self.said)
            self.said += os.read(self.fd, 4096)
        self.said = self.said.split(text, 1)[1]

    def type(self, text: bytes) -> None:
        os.write(self.fd, text)

    def end(self) -> int:
        status = os.waitpid(self.pid, 0)[1]
        os.close(self.fd)
        return os.waitstatus_to_exitcode(status)


@ORDINARY
def test_a_terminals_keys() -> None:
    terminal = Terminal("/bin/cat")
    terminal.type(b"hi\n")
    terminal.until(b"hi\r\nhi\r\n")
    terminal.type(b"\x03")
    assert terminal.end() == -signal.SIGINT


@ORDINARY
def test_a_shells_job_control() -> None:
    terminal = Terminal("/bin/bash", "--norc", "-i")
    terminal.type(b"PS1=; echo $((6*7)); echo go; cat\n")
    terminal.until(b"42\r\ngo\r\n")
    terminal.type(b"line\n")
    terminal.until(b"line\r\nline\r\n")
    terminal.type(b"\x1a")
    terminal.until(b"Stopped")
    terminal.type(b"kill %1; fg; echo $((700+77))\n")
    terminal.until(b"777")
    terminal.type(b"exit 7\n")
    assert terminal.end() == 7


PYTHON = """
import os, signal, socket, subprocess, threading, time
done = []
threads = [threading.Thread(target=done.append, args=(n,)) for n in range(8)]
[t.start() for t in threads]
[t.join() for t in threads]
print(sorted(done))
print(subprocess.run(["/bin/echo", "x"], capture_output=True).stdout)
got = []
signal.signal(signal.SIGALRM, lambda *_: got.append(1))
signal.setitimer(signal.ITIMER_REAL, 0.05)
start = time.monotonic()
time.sleep(0.2)
print(got, time.monotonic() - start >= 0.2)
a, b = socket.socketpair()
socket.send_fds(a, [b"m"], [0])
print(socket.recv_fds(b, 10, 2)[0])
print(open("/proc/self/cmdline").read().startswith("/usr/bin/python3"))
print("[stack]" in open("/proc/self/maps").read())
print(os.readlink("/proc/self/exe"))
for path in ("/proc/self/mem", f"/proc/{os.getppid()}/mem", "/dev/kvm", "/proc/self/task/../mem"):
    try:
        os.open(path, os.O_RDWR)
    except OSError as error:
        print(error.errno in (1, 13))
"""


@ORDINARY
def test_cpython() -> None:
    done = run(*MONITOR, "/usr/bin/python3", "-I", "-S", "-c", PYTHON)
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        "[0, 1, 2, 3, 4, 5, 6, 7]",
        "b'x\\n'",
        "[1] True",
        "b'm'",
        "True",
        "True",
        os.path.realpath("/usr/bin/python3"),
        *["True"] * 4,
    ]


TIME = """
import os, threading, time
def ask():
    times = [time.monotonic_ns() for _ in range(1000)]
    assert times == sorted(times), "goes back"
    assert abs(time.time() - START) < 30
    return times
START = float(os.environ["START"])
before = ask()[-1]
thread = threading.Thread(target=ask)
thread.start()
thread.join()
if os.fork() == 0:
    os._exit(ask()[0] < before)
print(os.waitpid(-1, 0)[1], ask()[0] > before, os.sched_getaffinity(0) != set())
"""


CLOCK = Path("/sys/devices/system/clocksource/clocksource0/current_clocksource")


@ORDINARY
@pytest.mark.skipif(
    not CLOCK.exists() or CLOCK.read_text() != "tsc\n",
    reason="needs a kernel whose clock source is tsc, which the vDSO can read",
)
def test_the_time_is_no_system_call() -> None:
    words = (sys.executable, "-I", "-S", "-c", TIME)
    done = run(*MONITOR, "-S", *words, env={"START": str(time.time())})
    assert done.stdout == "0 True True\n", done.stderr
    assert not re.search(r"^(clock_gettime|gettimeofday) ", done.stderr, re.M)


BROKEN = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
from krun.monitor.builtin import run, vdso
prepare = vdso.prepare
def broken():
    found = prepare()
    code = bytes.fromhex(sys.argv[1])
    found.image = found.image[:found.clock] + code + found.image[found.clock + len(code):]
    return found
vdso.prepare = broken
sys.exit(run.run(sys.argv[2:], [], {{"statistics": True}}))
"""


# ud2, hlt, a system call, a time of the year 1970, a return to nowhere
@pytest.mark.parametrize("code", ["0f0b", "f4", "0f05c3", "31c0c3", "58c3"])
def test_without_a_vdso_that_works_the_time_is_a_system_call(program: Path, code: str) -> None:
    done = run(sys.executable, "-I", "-S", "-c", BROKEN, code, program, "vectors")
    assert done.returncode == 0
    assert "aligned 0\n" in done.stdout
    assert "vdso" not in done.stdout
    assert "vdso 1\n" in run(*MONITOR, program, "vectors").stdout


@ORDINARY
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_many_threads(number: int) -> None:
    script = "import threading, time\nfor _ in range(3): "
    script += "threading.Thread(target=time.sleep, args=(60,)).start()\nprint(1, flush=True)"
    with subprocess.Popen(
        [*MONITOR, sys.executable, "-I", "-S", "-c", script], stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "1\n"
        child.send_signal(number)
        assert child.wait(10) == -number


@ORDINARY
def test_own_files_of_proc_after_a_change_of_user() -> None:
    script = "import os; os.setuid(65534); print(open('/proc/self/environ').read()); "
    script += "print('[stack]' in open('/proc/self/maps').read(), os.listdir('/proc/self/fd'))"
    done = run(*MONITOR, "-e", "A=b", sys.executable, "-I", "-S", "-c", script)
    assert done.stdout.startswith("A=b\0\nTrue ['0', '1', '2'")


@ORDINARY
@needs.mark("go")
def test_go(tmp_path: Path) -> None:
    target = tmp_path / "server"
    variables = {**os.environ, "CGO_ENABLED": "0"}
    done = run("go", "build", "-o", target, build.TESTS / "payloads" / "server.go", env=variables)
    assert done.returncode == 0, done.stderr
    with subprocess.Popen([*MONITOR, target], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        lines = [child.stdout.readline() for _ in range(5)]
        assert lines[:4] == ["count 5000\n", "child\n", "<nil>\n", "recovered true\n"]
        for number in range(5):
            with urllib.request.urlopen(f"http://127.0.0.1:{int(lines[4])}/{number}") as answer:
                assert answer.read() == b"go /%d" % number
        child.send_signal(signal.SIGTERM)
        assert child.wait(10) == 5


@ORDINARY
@needs.mark("node")
def test_node() -> None:
    script = "setTimeout(() => console.log(require('fs').readdirSync('/').includes('usr')), 5)"
    done = run(*MONITOR, "/usr/bin/node", "-e", script)
    assert (done.returncode, done.stdout) == (0, "true\n")
