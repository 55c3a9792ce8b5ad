"""The launcher: what it hands to crun is what Python would, and everything else goes to Python."""

from __future__ import annotations

import json
import os
import random
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from krun import host
from krun.install import launcher
from krun.policy import Policy

ROOT = Path(__file__).resolve().parent.parent.parent

# Prints the words it got, each ended by NUL, and the marked variables of its environment.
ECHO = """#!/bin/sh
printf '{name}\\0'
printf '%s\\0' "$@"
exit 7
"""

# krun itself, with the same crun; grammar, verbs and engine are the real ones.
PYTHON = """
import sys
sys.path.insert(0, {root!r})
from krun import host
host.CRUN_PATHS = ({crun!r},)
from krun.__main__ import console
console()
"""


class Bench:
    """A launcher whose crun and Python print what they were given, and krun with the same crun."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.crun = self.script("crun")
        self.python = self.script("python")
        self.policy = directory / "etc"
        self.root = directory / "root"
        self.launcher = directory / "krun"
        self.write(None)

    def script(self, name: str) -> str:
        path = self.directory / name
        path.write_text(ECHO.format(name=name))
        path.chmod(0o755)
        return str(path)

    def write(self, found: Policy | None) -> None:
        rules = found or Policy(crun=self.crun)
        text = launcher.text(str(self.launcher), [self.python], rules, str(self.policy))
        self.launcher.write_text(text)
        self.launcher.chmod(0o755)

    def container(self, name: str, *files: str) -> None:
        place = self.root / name
        place.mkdir(parents=True, exist_ok=True)
        for file in files:
            (place / file).write_text("{}")

    def launch(self, argv: list[str], **more: object) -> tuple[str, list[str], int]:
        """Return who was called, its words, and the status."""
        done = subprocess.run([str(self.launcher), *argv], capture_output=True, **more)
        assert done.stderr == b"", done.stderr
        name, *words = [os.fsdecode(word) for word in done.stdout.split(b"\0")[:-1]]
        return name, words, done.returncode

    def expected(self, argv: list[str], **more: object) -> tuple[str, list[str], int]:
        """Return the same of krun in Python."""
        text = PYTHON.format(root=str(ROOT), crun=self.crun)
        done = subprocess.run([sys.executable, "-c", text, *argv], stdout=subprocess.PIPE, **more)
        name, *words = [os.fsdecode(word) for word in done.stdout.split(b"\0")[:-1]]
        return name, words, done.returncode


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    made = Bench(tmp_path_factory.mktemp("launcher"))
    for name in ("c1", "a.b_c+d-e", "X" * 200, "state"):
        made.container(name, "status", "config.json")
    made.container("native", "state.json", "config.json")
    made.container("both", "status", "state.json")
    made.container("empty")
    (made.root / "file").write_text("")
    return made


IDS = ("c1", "a.b_c+d-e", "X" * 200, "state", "native", "both", "empty", "file", "gone")
HOSTILE = (
    "",
    ".",
    "..",
    "../root/c1",
    "c1/",
    "c1 c1",
    "c1\n",
    "$(touch PWNED)",
    "`touch PWNED`",
    "c1;touch PWNED",
    "'",
    '"',
    "*",
    "?1",
    "[c]1",
    "\\",
    "é",
    "\udcff",
    "-",
    "--",
    "--help",
    "-h",
    "=",
    "X" * 1025,
    "--root",
)
GLOBALS = (
    ["--log", "LOG"],
    ["--log=LOG"],
    ["--log", "-x"],
    ["--log", "a b"],
    ["--log="],
    ["--log", ""],
    ["--log-format", "json"],
    ["--log-format=json"],
    ["--log-format=text"],
    ["--log-format", "xml"],
    ["--log-format"],
    ["--log-level", "debug"],
    ["--debug"],
    ["--debug=true"],
    ["--systemd-cgroup"],
    ["--cgroup-manager", "systemd"],
    ["--cgroup-manager=disabled"],
    ["--cgroup-manager=none"],
    ["--rootless", "auto"],
    ["--rootless=true"],
    ["--rootless"],
    ["--mode=label"],
    ["--mode", "label"],
    ["--engine=native"],
    ["--engine", "native"],
    ["--engine", "other"],
    ["--monitor", "km"],
    ["--monitor"],
    ["--monitor=km"],
    ["--engine=other"],
    ["--policy", "/nonexistent"],
    ["--criu", "/usr/bin/criu"],
    ["--version"],
    ["-v"],
    ["--"],
    ["*"],
)
VERBS = ("start", "state", "kill", "delete", "pause", "resume", "create", "list", "exec", "stat")
EXTRAS = (
    "--all",
    "-a",
    "--force",
    "-f",
    "--regex",
    "-r",
    "--",
    "9",
    "KILL",
    "SIGTERM",
    "SIGRTMIN+3",
    "SIGFOO",
    "SIG9",
    "64",
    "65",
    "term",
    "-9",
    "a b",
    "--all=true",
)


def lines(bench: Bench, seed: int, number: int) -> Iterator[list[str]]:
    """Yield command lines: most are near the plain shape, every fourth has something hostile."""
    dice = random.Random(seed)
    for _ in range(number):
        argv = [word for _ in range(dice.choice((0, 0, 1, 2, 4))) for word in dice.choice(GLOBALS)]
        root = dice.choice((["--root", str(bench.root)], [f"--root={bench.root}"], ["--root", "."]))
        place = dice.randrange(len(argv) + 1) if dice.random() < 0.1 else len(argv)
        argv[place:place] = root
        argv.append(dice.choice(VERBS[:6]) if dice.random() < 0.9 else dice.choice(VERBS))
        rest = [dice.choice(IDS[:5])] if dice.random() < 0.7 else [dice.choice(IDS)]
        if dice.random() < 0.25:
            rest.append(dice.choice(HOSTILE))
        rest += [dice.choice(EXTRAS) for _ in range(dice.choice((0, 0, 1, 1, 2)))]
        dice.shuffle(rest)
        yield argv + rest


@pytest.mark.parametrize("seed", range(4))
def test_it_does_what_python_does(bench: Bench, seed: int) -> None:
    """Either Python gets the line as it is, or crun is called in Python's very words."""
    passed = handed = 0
    for argv in lines(bench, seed, 220):
        if any("\0" in word for word in argv):
            continue
        answer = bench.launch(argv, cwd=bench.root)
        if answer[0] == "python":
            handed += 1
            assert answer == ("python", argv, 7)
        else:
            passed += 1
            assert answer == bench.expected(argv, cwd=bench.root), argv
    assert passed >= 20 and handed >= 20, (passed, handed)
    assert not list(bench.directory.rglob("PWNED"))


def test_every_recorded_line_that_can_be_passed_on_is(bench: Bench) -> None:
    """What podman, docker and containerd send for these verbs does not start Python."""
    seen = 0
    for line in (ROOT / "tests" / "data" / "command_lines.txt").read_text().splitlines():
        if line.startswith("#") or not line.strip():
            continue
        _, *argv = json.loads(line)
        verbs = [word for word in argv if word in VERBS[:6]]
        if not verbs or "features" in argv:
            continue
        container = argv[argv.index(verbs[0]) + 1 :]
        name = next(word for word in container if not word.startswith("-"))
        bench.container(name, "status")
        if "--root" in argv:
            argv[argv.index("--root") + 1] = str(bench.root)
        else:
            argv = ["--root", str(bench.root), *argv]
        name, _, status = bench.launch(argv)
        assert (name, status) == ("crun", 7), argv
        seen += 1
    assert seen > 100


@pytest.mark.parametrize(
    "verb", ["start", "state", "kill", "delete", "pause", "resume", "delete --force"]
)
def test_verbs_are_passed_on(bench: Bench, verb: str) -> None:
    argv = ["--root", str(bench.root), *verb.split(), "c1"]
    assert bench.launch(argv) == ("crun", ["--root", str(bench.root), *verb.split(), "c1"], 7)


def test_default_root_is_pythons(bench: Bench) -> None:
    if host.rootless():
        pytest.skip("the host's default root is root's alone")
    name = f"launcher-test-{os.getpid()}"
    place = Path("/run/krun") / name
    place.mkdir(parents=True)
    try:
        (place / "status").write_text("{}")
        answer = bench.launch(["state", name])
        assert answer == ("crun", ["--root", "/run/krun", "state", name], 7)
        assert answer == bench.expected(["state", name])
    finally:
        (place / "status").unlink()
        place.rmdir()


@pytest.mark.parametrize("mapping", ["--map-root-user", "--map-current-user"])
def test_default_root_in_a_user_namespace(bench: Bench, mapping: str, tmp_path: Path) -> None:
    place = tmp_path / "krun" / "c2"
    place.mkdir(parents=True)
    (place / "status").write_text("{}")
    text = PYTHON.format(root=str(ROOT), crun=bench.crun)
    results = []
    for command in ([str(bench.launcher)], [sys.executable, "-c", text]):
        done = subprocess.run(
            ["unshare", "--user", mapping, *command, "state", "c2"],
            env={**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)},
            capture_output=True,
        )
        results.append((done.stdout, done.returncode))
    assert results[0] == results[1]
    assert f"--root\0{tmp_path}/krun\0".encode() in results[0][0]


def test_environment_and_descriptors_stay(bench: Bench, tmp_path: Path) -> None:
    """Not even variables with the names of the launcher's thoughts are changed."""
    shown = tmp_path / "crun"
    shown.write_text(
        "#!/usr/bin/python3 -IS\nimport os, sys\n"
        "fds = [fd for fd in range(3, 40) if os.path.exists(f'/proc/self/fd/{fd}')]\n"
        "print(sorted(os.environ.items()), fds, os.getcwd(), sys.argv[1:])\n"
    )
    shown.chmod(0o755)
    text = launcher.text("/x", [bench.python], Policy(crun=str(shown)), str(bench.policy))
    copy = tmp_path / "krun"
    copy.write_text(text)
    copy.chmod(0o755)
    names = ("root", "log", "id", "word", "verb", "signal", "crun", "LISTEN_FDS")
    env = {"PATH": "/usr/bin:/bin", "PWD": str(tmp_path), **dict.fromkeys(names, "a b")}
    reads, writes = os.pipe()
    held = [reads, writes, *(os.dup(reads) for _ in range(12))]
    answers = []
    for command in ([str(copy)], [str(shown)]):
        done = subprocess.run(
            [*command, "--root", str(bench.root), "state", "c1"],
            capture_output=True,
            text=True,
            env=env,
            cwd=tmp_path,
            pass_fds=held,
        )
        answers.append(done.stdout)
        assert not done.stderr
    for fd in held:
        os.close(fd)
    assert "('root', 'a b')" in answers[0]
    assert answers[0] == answers[1]


def test_other_names_select_a_mode(bench: Bench) -> None:
    for name, words in (("kontain", ["list"]), ("krun-label-trigger", ["--mode", "label", "list"])):
        link = bench.directory / name
        link.symlink_to("krun")
        done = subprocess.run([link, "list"], capture_output=True)
        assert done.stdout.split(b"\0")[1:-1] == [word.encode() for word in words]


def _age(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


def test_policy_unknown_to_the_launcher_goes_to_python(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.container("c1", "status")
    argv = ["--root", str(bench.root), "state", "c1"]
    bench.policy.mkdir()
    assert bench.launch(argv)[0] == "crun"
    (bench.policy / "policy.toml").write_text("")
    assert bench.launch(argv)[0] == "python"
    (bench.policy / "policy.toml").unlink()
    assert bench.launch(argv)[0] == "crun"

    # The launcher was written after the policy, and knows the crun that it names.
    other = bench.script("other")
    file = bench.policy / "policy.json"
    file.write_text("{}")
    _age(file, 100)
    _age(bench.policy, 100)
    bench.write(Policy(crun=other, source=str(file)))
    assert bench.launch(argv)[0] == "other"
    _age(file, -100)
    assert bench.launch(argv)[0] == "python", "changed in place"
    _age(file, 100)
    assert bench.launch(argv)[0] == "other"
    _age(bench.policy, -100)
    assert bench.launch(argv)[0] == "python", "replaced by an older file"
    _age(bench.policy, 100)
    (bench.policy / "policy.toml").write_text("")
    assert bench.launch(argv)[0] == "python", "there are two"
    (bench.policy / "policy.toml").unlink()
    file.unlink()
    _age(bench.policy, 100)
    assert bench.launch(argv)[0] == "python", "it went"


def test_without_crun_python_explains(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.container("c1", "status")
    argv = ["--root", str(bench.root), "state", "c1"]
    Path(bench.crun).chmod(0o644)
    assert bench.launch(argv) == ("python", argv, 7)
    Path(bench.crun).unlink()
    Path(bench.crun).mkdir()
    assert bench.launch(argv) == ("python", argv, 7)


def test_a_network_of_kruns_is_pythons_to_release(bench: Bench, tmp_path: Path) -> None:
    argv = ["--root", str(bench.root), "delete", "c1"]
    env = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)}
    assert bench.launch(argv, env=env)[0] == "crun"
    (tmp_path / "krun-network" / "containers" / "%2Frun%2Fkrun" / "c1").mkdir(parents=True)
    assert bench.launch(argv, env=env) == ("python", argv, 7)
    argv[2] = "state"
    assert bench.launch(argv, env=env)[0] == "crun"


def test_python_words_survive_any_prefix() -> None:
    """Blanks and quotes in the prefix stay what they are."""
    archive = '/opt/it\'s $HOME "x"/lib/archive'
    words = launcher.python_words("/usr/bin/python3", archive)
    warm = "/opt/it's $HOME/warm"
    text = launcher.text("/opt/it's/bin/krun", words, None, warm=warm)
    *_, command, fast, last = text.strip().splitlines()
    assert shlex.split(command)[2:-1] == words
    assert repr(archive) in words[-1]
    assert shlex.split(fast) == ["[", "!", "-x", warm, "]", "||", "exec", warm, "$@"]
    assert last == 'exec "$@"'
    subprocess.run(["sh", "-n"], input=text, text=True, check=True)


@pytest.mark.parametrize("shell", ["dash", "bash", "busybox"])
def test_other_shells_read_it_alike(bench: Bench, shell: str) -> None:
    """/bin/sh is bash in other distributions, and busybox in small ones."""
    words = {"dash": ["dash"], "bash": ["bash", "--posix"], "busybox": ["busybox", "sh"]}[shell]
    for argv in (
        ["--root", str(bench.root), "--log", "a  b", "--debug", "kill", "--all", "c1", "9"],
        ["--root", str(bench.root), "kill", "c1", "a b"],
        ["--root", str(bench.root), "delete", "native"],
    ):
        done = subprocess.run([*words, str(bench.launcher), *argv], capture_output=True)
        name, *rest = [os.fsdecode(word) for word in done.stdout.split(b"\0")[:-1]]
        assert (name, rest, done.returncode) == bench.launch(argv)
        assert not done.stderr
