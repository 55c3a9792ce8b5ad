"""Bad input, bad machines, bad luck: one clear line, no traceback, nothing left behind."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from documents import places
from e2e.machine import REPOSITORY, Client, Machine, cgroups, finished, wait_for
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from krun import __main__ as program

Bundle = Callable[..., Path]
Refused = Callable[..., str]
ROOTFS = "the root filesystem"
BUNDLES = sorted(path.parent for path in (REPOSITORY / "tests/data/bundles").glob("*/config.json"))


def leftovers(krun: Client, name: str) -> list[str]:
    """What the container `name` left: state, cgroups, mounts, processes."""
    root = Path(krun.argv[krun.argv.index("--root") + 1])
    found = [str(path) for path in root.rglob("*")] if root.is_dir() else []
    found += cgroups(name)
    mounts = krun.machine.run("cat", "/proc/self/mountinfo").stdout
    found += [line for line in mounts.splitlines() if name in line]
    # The launcher's process that begins a grace period is gone when the kernel lets it go.
    deadline = time.monotonic() + 10
    while (living := processes(name)) and time.monotonic() < deadline:
        time.sleep(0.005)
    return found + living


def processes(name: str) -> list[str]:
    """Every process but this one that has the container's name among its words."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (process / "cmdline").read_bytes().split(b"\0")
            if name.encode() in words and process.name != str(os.getpid()):
                found.append(f"process {process.name}: {b' '.join(words)!r}")
    return found


@pytest.fixture
def krun(machine: Machine, engine: str, tmp_path: Path) -> Client:
    """krun with one engine and a root that no other test uses."""
    launcher = machine.directory / f"krun-{engine}"
    return Client(machine, [launcher, "--root", tmp_path / "root"], {})


@pytest.fixture
def name(krun: Client) -> Iterator[str]:
    name = f"krun-test-{os.urandom(6).hex()}"
    yield name
    krun("delete", "--force", name, status=None)


@pytest.fixture
def refused(krun: Client, name: str, tmp_path: Path) -> Refused:
    """Run krun, which must fail in one line with `words`, as text and as JSON; leave nothing."""

    def refused(*argv: object, words: tuple[str, ...] = (), status: int | None = None) -> str:
        log = tmp_path / "log.json"
        log.unlink(missing_ok=True)
        text = krun(*argv, status=None)
        logged = krun("--log", log, "--log-format", "json", *argv, status=None)
        for done in (text, logged):
            assert done.returncode > 0, f"killed by {-done.returncode}: {done.stderr}"
            if status is not None:
                finished(done, status)
            assert "traceback" not in done.stderr.lower()
        lines = text.stderr.splitlines()
        assert len(lines) == 1, text.stderr
        assert len(lines[0]) < 1000
        for word in words:
            assert word in lines[0]
        [*_, last] = [json.loads(line) for line in log.read_text().splitlines()]
        assert last["level"] == "error"
        assert set(last) == {"level", "msg", "time"}
        for word in words:
            assert word in last["msg"]
        assert leftovers(krun, name) == []
        return lines[0]

    return refused


# Bundles


def test_no_bundle(refused: Refused, name: str, tmp_path: Path) -> None:
    refused("create", "--bundle", tmp_path / "none", name, words=(str(tmp_path / "none"),))
    (tmp_path / "empty").mkdir()
    said = refused("create", "--bundle", tmp_path / "empty", name, words=("config.json",))
    assert "krun spec" in said, "the way out"
    (tmp_path / "file").touch()
    refused("run", "--bundle", tmp_path / "file", name, words=("not a directory",))
    (tmp_path / "dir/config.json").mkdir(parents=True)
    refused("create", "--bundle", tmp_path / "dir", name, words=("directory",))


def test_no_working_directory(krun: Client, machine: Machine, name: str, tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    script = 'cd "$0" && rmdir "$0" && exec "$@"'
    words = [tmp_path / "gone", *krun.argv, "run", name]
    said = machine.run("sh", "-c", script, *words, status=1).stderr
    assert "krun: bundle .: the working directory: No such file or directory" in said


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "config.json"),
        ('{"ociVersion": "1.0.2", "process": {"args"', "config.json"),
        ("[" * 100_000, "config.json"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "config.json"),
        ("null", "config.json"),
        ("[]", "config.json"),
        ("{}", "ociVersion"),
        ('{"ociVersion": "1.0.2"}', "required"),
        ('"\ud800"'.encode("utf-8", "surrogatepass").decode("latin-1"), "config.json"),
        ("\0" * 100, "config.json"),
        ('{"ociVersion": NaN}', "config.json"),
    ],
    ids=lambda value: repr(value[:12]) if isinstance(value, str) else None,
)
def test_config_that_is_none(
    refused: Refused, name: str, tmp_path: Path, text: str, words: str
) -> None:
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    refused("create", "--bundle", tmp_path, name, words=(words,))


def test_config_of_100_megabytes(refused: Refused, name: str, tmp_path: Path) -> None:
    with open(tmp_path / "config.json", "wb") as file:
        file.write(b'{"ociVersion": "1.0.2", "annotations": {"a": "')
        file.seek(100 << 20, os.SEEK_CUR)
        file.write(b'"}}')
    start = time.monotonic()
    refused("create", "--bundle", tmp_path, name, words=("large",))
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("process.args", [], "process.args"),
        ("process.args", [7], "process.args[0]"),
        ("process.args", ["/payload", "a\0b"], "process.args"),
        ("process.cwd", "relative", "process.cwd"),
        ("process.env", ["novalue", 3], "process.env[1]"),
        ("process.user", {"uid": -1, "gid": 0}, "process.user.uid"),
        ("process.user", {"uid": 1 << 40, "gid": 0}, "process.user.uid"),
        ("root", {"path": ""}, "root.path"),
        ("root", {"path": "/no/such/rootfs"}, "/no/such/rootfs"),
        ("mounts", [{"destination": 5}], "mounts[0].destination"),
        ("linux.namespaces", [{"type": "pit"}], "linux.namespaces[0].type"),
        ("linux.resources", {"pids": {"limit": "many"}}, "linux.resources.pids.limit"),
        ("hooks", {"prestart": [{"path": "relative"}]}, "hooks.prestart[0].path"),
        ("hostname", "x" * 65, "hostname"),
    ],
)
def test_value_that_is_wrong(
    refused: Refused, name: str, bundle: Bundle, path: str, value: Any, words: str
) -> None:
    def edit(config: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        table = config
        for parent in parents:
            table = table.setdefault(parent, {})
        table[last] = value

    refused("create", "--bundle", bundle("/payload", edit=edit), name, words=(words,))


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)


@st.composite
def damaged(draw: Callable[..., Any]) -> Any:
    """A real configuration with a few values replaced by any JSON, or taken out."""
    directory = draw(st.sampled_from(BUNDLES))
    config = json.loads((directory / "config.json").read_text())
    config["root"]["path"] = ROOTFS
    config["process"]["args"][0] = "/payload"
    if "seccomp" in config.get("linux", {}):
        config["linux"]["seccomp"]["syscalls"] = config["linux"]["seccomp"]["syscalls"][:2]
    for _ in range(draw(st.integers(1, 3))):
        found = places(config)[1:]
        if not found:
            break
        *parents, last = draw(st.sampled_from(found))
        table = config
        for parent in parents:
            table = table[parent]
        if draw(st.booleans()):
            table[last] = draw(JSON_VALUES)
        elif isinstance(table, dict):
            del table[last]
        else:
            table.append(copy.deepcopy(table[last]))
    return config


def call(*argv: str) -> tuple[int, str]:
    """krun in this process: (status, what it wrote to stderr).  Exceptions come through."""
    read, write = os.pipe()
    saved = os.dup(2)
    os.dup2(write, 2)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            status = program.main(list(argv))
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(write)
    with open(read, encoding="utf-8", errors="replace") as stream:
        return status, stream.read()


@pytest.mark.parametrize("verb", ["translate", "validate"])
@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    derandomize=True,
)
@given(config=damaged())
def test_any_damage_is_named(machine: Machine, verb: str, config: Any) -> None:
    """Whatever is wrong in a configuration, krun says it in one line and with a status."""
    directory = machine.directory / "damaged"
    directory.mkdir(exist_ok=True)
    text = json.dumps(config).replace(json.dumps(ROOTFS), json.dumps(f"{machine.directory}/rootfs"))
    (directory / "config.json").write_text(text)
    rules = policy(directory, km=str(machine.directory / "km"))
    status, said = call("--policy", str(rules), verb, "--bundle", str(directory))
    assert status in (0, 1, 2, 126, 127, 255)
    errors = [line for line in said.splitlines() if not line.startswith("krun: warning")]
    if status and verb == "translate":
        assert len(errors) == 1, said
        assert errors[0].startswith("krun: ")


@settings(
    max_examples=12,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    derandomize=True,
)
@given(data=st.data())
def test_damage_leaves_nothing_behind(
    krun: Client, bundle: Bundle, name: str, data: st.DataObject
) -> None:
    """The same through create, with a bundle that would run: engines fail cleanly too."""

    def edit(config: dict[str, Any]) -> None:
        # Without a mount namespace crun mounts over the host's files, and leaves it so.
        found = [
            path
            for path in places(config)
            if path[:1] in (("process",), ("linux",), ("mounts",))
            and path not in (("linux",), ("linux", "namespaces"))
        ]
        *parents, last = data.draw(st.sampled_from(found))
        table: Any = config
        for parent in parents:
            table = table[parent]
        table[last] = data.draw(JSON_VALUES)

    nowhere = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
    with open(Path(krun.argv[2]).parent / "stderr", "w+") as stderr:
        done = krun(
            "create", "--bundle", bundle("/payload", edit=edit), name,
            status=None, stderr=stderr, **nowhere,
        )  # fmt: skip
        stderr.seek(0)
        said = stderr.read()
    assert "traceback" not in said.lower()
    if done.returncode:
        assert said.strip()
    krun("delete", "--force", name)
    assert leftovers(krun, name) == []


# Names


@pytest.mark.parametrize(
    "bad", ["a/b", "..", ".", "", "x" * 5000, "x" * 256, "a\nb", "../x", "-x", "é", "a b"]
)
def test_id_that_is_none(refused: Refused, bundle: Bundle, bad: str) -> None:
    said = refused("create", "--bundle", bundle("/payload"), "--", bad)
    assert "invalid container ID" in said
    for verb in ("state", "start", "kill", "delete"):
        refused(verb, "--", bad)


def test_id_in_use(krun: Client, bundle: Bundle, name: str, tmp_path: Path) -> None:
    nowhere = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    krun("create", "--bundle", bundle("/payload", "nap"), name, **nowhere)
    done = krun("create", "--bundle", tmp_path / "bundle", name, status=None)
    assert done.returncode not in (0, 2)
    assert name in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert json.loads(krun("state", name).stdout)["status"] == "created"
    krun("delete", "--force", name)
    assert leftovers(krun, name) == []


@pytest.mark.parametrize("verb", ["state", "start", "kill", "delete", "pause", "exec"])
def test_no_such_container(refused: Refused, name: str, verb: str) -> None:
    more = ("/payload",) if verb == "exec" else ()
    refused(verb, name, *more, words=(name,))


def test_two_creates_of_one_id(krun: Client, bundle: Bundle, name: str) -> None:
    """One wins, the other says so and takes nothing from the winner."""
    command = krun.machine.inside(*krun.argv, "create", "--bundle", bundle("/payload", "nap"), name)
    logs = [Path(krun.argv[2]).parent / f"create-{number}" for number in range(4)]
    racers = []
    for log in logs:
        with open(log, "wb") as stream:
            racers.append(subprocess.Popen(command, stdout=stream, stderr=stream))
    statuses = sorted(racer.wait(30) for racer in racers)
    said = [log.read_text() for log in logs]
    assert statuses[0] == 0, said
    assert all(statuses[1:]), said
    assert "traceback" not in "".join(said).lower()
    assert json.loads(krun("state", name).stdout)["status"] == "created"
    krun("start", name)
    krun("delete", "--force", name)
    assert leftovers(krun, name) == []


# Machines


def policy(tmp_path: Path, **paths_: str) -> Path:
    """A policy file that names programs."""
    file = tmp_path / "policy.json"
    file.write_text(json.dumps({"paths": paths_, "defaults": {"monitor": "km"}}))
    return file


def test_programs_that_are_missing(
    refused: Refused, bundle: Bundle, name: str, tmp_path: Path
) -> None:
    none = ("--policy", policy(tmp_path, km="/no/such/km"))
    said = refused(*none, "create", "--bundle", bundle("/payload"), name)
    assert "/no/such/km" in said
    (tmp_path / "km").write_text("text")
    dull = ("--policy", policy(tmp_path, km=str(tmp_path / "km")))
    said = refused(*dull, "run", "--bundle", bundle("/payload"), name)
    assert str(tmp_path / "km") in said
    directory = ("--policy", policy(tmp_path, km=str(tmp_path)))
    assert str(tmp_path) in refused(*directory, "run", "--bundle", bundle("/payload"), name)


@pytest.mark.parametrize("engine", ["crun"])
def test_crun_that_is_missing(
    refused: Refused, bundle: Bundle, name: str, tmp_path: Path, machine: Machine
) -> None:
    km = str(machine.directory / "km")
    gone = ("--policy", policy(tmp_path, km=km, crun="/no/such/crun"))
    refused(*gone, "create", "--bundle", bundle("/payload"), name, words=("/no/such/crun",))
    refused(*gone, "state", name)


def test_no_device(refused: Refused, machine: Machine, bundle: Bundle, name: str) -> None:
    machine.run("mount", "-t", "tmpfs", "tmpfs", "/dev")
    try:
        machine.run("mknod", "-m", "666", "/dev/null", "c", "1", "3")
        refused("create", "--bundle", bundle("/payload"), name, words=("/dev/kvm",))
    finally:
        machine.run("umount", "/dev")


@pytest.mark.parametrize("kind", ["read-only", "full", "a file"])
def test_state_directory(
    krun: Client, machine: Machine, bundle: Bundle, name: str, kind: str
) -> None:
    root = Path(krun.argv[2])
    if kind == "a file":
        root.touch()
    else:
        root.mkdir()
        machine.run("mount", "-t", "tmpfs", "-o", "size=4k,nr_inodes=2", "tmpfs", root)
        options = "remount,ro" if kind == "read-only" else "remount,nr_inodes=1"
        machine.run("mount", "-o", options, root, status=None)
    try:
        for verb in ("create", "run"):
            done = krun(verb, "--bundle", bundle("/payload"), name, status=None)
            assert done.returncode > 0
            assert "traceback" not in done.stderr.lower()
            assert len(done.stderr.splitlines()) == 1, done.stderr
            assert re.search(r"read.only|space|directory|exist", done.stderr, re.IGNORECASE)
        assert krun("list", "-q", status=None).returncode in (0, 1)
        below = [krun.argv[0], "--root", root / "below"]
        done = machine.run(*below, "run", "--bundle", bundle("/payload"), name, status=1)
        why = {"read-only": "Read-only", "full": "No space left", "a file": "Not a directory"}
        assert f"{root}/below" in done.stderr and why[kind] in done.stderr
    finally:
        if kind == "a file":
            root.unlink()
        else:
            machine.run("umount", root)
    assert leftovers(krun, name) == []


def test_damaged_state(krun: Client, bundle: Bundle, name: str) -> None:
    """A state that was cut off does not keep delete --force from its work."""
    nowhere = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    krun("create", "--bundle", bundle("/payload", "nap"), name, **nowhere)
    pid = json.loads(krun("state", name).stdout)["pid"]
    for path in (Path(krun.argv[2]) / name).iterdir():
        if path.is_file() and path.name in ("state.json", "status"):
            path.write_text(path.read_text()[:20])
    for verb in ("state", "start", "kill"):
        done = krun(verb, name, status=None)
        assert done.returncode > 0
        assert "traceback" not in done.stderr.lower()
    assert "traceback" not in krun("list", status=None).stderr.lower()
    krun("delete", "--force", name)
    assert not (Path(krun.argv[2]) / name).exists()
    if "krun-native" in str(krun.argv[0]):
        # What the launcher reads tells enough.
        assert leftovers(krun, name) == []
        return
    # Without its state crun does not know the process and the cgroups.
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 9)
    wait_for("the process ends", lambda: not os.path.exists(f"/proc/{pid}"))
    for cgroup in cgroups(name):
        os.rmdir(cgroup)


# Luck


def trace(krun: Client, argv: list[object], log: Path) -> list[str]:
    """The names of the system calls that one krun makes, in order."""
    command = ["strace", "-qq", "-o", log, *krun.argv, *argv]
    krun.machine.run(*command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return re.findall(r"^(\w+)\(", log.read_text(), re.MULTILINE)


POINTS = 10


@pytest.mark.parametrize("verb", ["create", "start", "delete"])
def test_killed_at_any_point(
    krun: Client, bundle: Bundle, name: str, verb: str, tmp_path: Path
) -> None:
    """SIGKILL on entering a system call, at points spread over a call: delete --force clears up.

    With the crun engine, create also where krun has become crun, whose own delete --force does
    not find the cgroups then.
    """
    directory = bundle("/payload", "nap")
    nowhere = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    argv = {
        "create": ["create", "--bundle", directory, name],
        "start": ["start", name],
        "delete": ["delete", "--force", name],
    }[verb]

    def prepare() -> None:
        if verb != "create":
            krun("create", "--bundle", directory, name, **nowhere)

    prepare()
    calls = trace(krun, argv, tmp_path / "calls")
    krun("delete", "--force", name)
    executions = [number for number, call in enumerate(calls) if call == "execve"]
    if len(executions) > 1 and verb != "create":
        del calls[executions[1] + 1 :]
    # From where krun itself begins: opening its first module is far behind the interpreter's start.
    first = len(calls) // 4
    killed = 0
    for point in range(POINTS):
        at = first + (len(calls) - first) * point // POINTS
        prepare()
        kill = f"inject={calls[at]}:signal=SIGKILL:when={calls[: at + 1].count(calls[at])}"
        command = ["strace", "-qq", "-o", "/dev/null", "-e", kill, *krun.argv, *argv]
        done = krun.machine.run(*command, status=None, **nowhere)
        killed += done.returncode == -9
        assert "traceback" not in krun("state", name, status=None).stderr.lower()
        krun("delete", "--force", name)
        end = time.monotonic() + 20
        while left := leftovers(krun, name):
            assert time.monotonic() < end, f"left after {kill}: {left}"
        # And the id is free again.
        krun("create", "--bundle", directory, name, **nowhere)
        krun("delete", "--force", name)
    assert killed > POINTS // 2, "system calls differ too much from one run to the next"


# Command lines

WORDS = [
    *("create", "start", "state", "kill", "delete", "run", "exec", "list", "ps", "pause", "resume"),
    *("update", "events", "checkpoint", "restore", "features", "translate", "validate", "check"),
    *("--root", "--log", "--log-format", "json", "text", "--debug", "--systemd-cgroup", "--engine"),
    *("--bundle", "-b", "--pid-file", "--console-socket", "--preserve-fds", "--process", "--tty"),
    *("--force", "--all", "--regex", "--format", "table", "-q", "--resources", "-", "--", "-x"),
    *("", "7", "-1", "nobody", "/nonexistent", "--help", "-h", "--version", "--root=", "--=", "="),
    *(
        "--no-pivot",
        "--stats",
        "--interval",
        "--config",
        "--user",
        "a:b",
        "--cap",
        "é\n",
        "x" * 300,
    ),
]


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    derandomize=True,
)
@given(words=st.lists(st.sampled_from(WORDS), max_size=7))
def test_any_command_line(krun: Client, tmp_path: Path, words: list[str]) -> None:
    """Any words: a status, one line that says what is wrong (usage adds a few), no traceback."""
    done = krun(*words, status=None, cwd=tmp_path)
    assert done.returncode in (0, 1, 2, 126, 127, 255), (words, done)
    assert "traceback" not in done.stderr.lower(), words
    if done.returncode:
        assert done.stderr.strip(), words
        assert len(done.stderr.splitlines()) < 8, words
