"""Tab completion in the real shells: verbs, options, choices and the ids of containers."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import installed
import needs
import pytest

TOP = Path(__file__).parents[2]
# What is typed, and what the line is after the tabulator key; {root} has the containers
# apple and banana.
TYPED = [
    ("krun trans", "krun translate "),
    ("krun create --no-p", "krun create --no-pivot "),
    ("krun network insp", "krun network inspect "),
    ("krun --log-format j", "krun --log-format json "),
    ("krun --root {root} start app", "krun --root {root} start apple "),
    ("krun --root {root} delete --force ban", "krun --root {root} delete --force banana "),
    ("krun --root {root} kill app", "krun --root {root} kill apple "),
    ("krun --root {root} kill apple WIN", "krun --root {root} kill apple WINCH "),
    ("krun completion fi", "krun completion fish "),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = tmp_path_factory.mktemp("state")
    for name in ("apple", "banana"):
        (top / name).mkdir()
    return top


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which `krun` is this checkout, and shells find no settings."""
    home = tmp_path_factory.mktemp("home")
    launcher = home / "krun"
    launcher.write_text(
        f'#!/bin/sh\nPYTHONPATH={TOP} exec {sys.executable} -m krun "$@"\n', encoding="utf-8"
    )
    launcher.chmod(0o755)
    return {
        "PATH": f"{home}:/usr/bin:/bin",
        "HOME": str(home),
        "TERM": "xterm",
        "LANG": "C.UTF-8",
        "PS1": "READY> ",
    }


@pytest.mark.parametrize("start", ["warm", "cold"])
@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("krun trans", "plain,translate\n"),
        ("krun nonsense x", "\n"),
        ("krun help re", "plain,resume\nplain,restore\n"),
    ],
)
def test_nothing_but_the_offer_is_printed(start: str, typed: str, offered: str) -> None:
    """What an installed krun says when a shell asks; an error would stand in the line."""
    number = len(typed.split()) - 1
    asking = {"_KRUN_COMPLETE": "bash_complete", "COMP_WORDS": typed, "COMP_CWORD": str(number)}
    command = installed.words(start)
    done = subprocess.run(command, env=os.environ | asking, capture_output=True, text=True)
    assert (done.stdout, done.stderr, done.returncode) == (offered, "", 0)


def script(shell: str, environment: dict[str, str]) -> Path:
    """Write the completion script as a user would, and return its path."""
    path = Path(environment["HOME"]) / f"completion.{shell}"
    text = subprocess.run(
        ["krun", "completion", shell], env=environment, check=True, capture_output=True
    ).stdout
    path.write_bytes(text)
    return path


class Terminal:
    """A shell on a pseudo-terminal."""

    def __init__(self, argv: list[str], environment: dict[str, str]) -> None:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            # Wide enough that no line is wrapped.
            termios.tcsetwinsize(0, (50, 1000))
            os.execve(argv[0], argv, environment)
        self.seen = ""

    def send(self, text: str) -> None:
        """Type text."""
        self.seen = ""
        os.write(self.fd, text.encode())

    def expect(self, text: str) -> None:
        """Wait until text is on the screen; escape sequences do not count."""
        end = time.monotonic() + 20
        raw = b""
        while text not in self.seen:
            ready, _, _ = select.select([self.fd], [], [], max(0, end - time.monotonic()))
            assert ready, f"{text!r} did not come, but {self.seen!r}"
            raw += os.read(self.fd, 4096)
            plain = re.sub(r"\x1b[\[(?][0-9;?]*[A-Za-z]|\x1b[=>]|[\r\x07]", "", raw.decode())
            while "\x08" in plain:
                plain = re.sub(r"[^\x08]?\x08", "", plain, count=1)
            self.seen = plain

    def close(self) -> None:
        """End the shell."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self.fd)


@pytest.mark.parametrize(
    ("shell", "options", "setup"),
    [
        ("bash", ["--norc", "--noprofile", "-i"], "bind 'set bell-style none'; source {script}"),
        pytest.param(
            "zsh",
            ["-f", "-i"],
            "autoload -Uz compinit && compinit -u -D && source {script}",
            marks=needs.mark("zsh"),
        ),
    ],
    ids=["bash", "zsh"],
)
def test_on_a_terminal(
    shell: str, options: list[str], setup: str, environment: dict[str, str], root: Path
) -> None:
    line = setup.format(script=script(shell, environment))
    terminal = Terminal([str(needs.find(shell)), *options], environment)
    try:
        terminal.expect("READY> ")
        # The echo of this line holds DO''NE; only its execution writes DONE.
        terminal.send(f"{line}; echo DO''NE\r")
        terminal.expect("DONE")
        terminal.expect("READY> ")
        for typed, completed in TYPED:
            terminal.send(typed.format(root=root) + "\t")
            terminal.expect(completed.format(root=root))
            # Ctrl-U: an empty line again.
            terminal.send("\x15")
    finally:
        terminal.close()


def fish_completes(source: Path, line: str, environment: dict[str, str]) -> str:
    """What fish offers for a line: a row for each word, with its summary."""
    return subprocess.run(
        ["fish", "-N", "-c", f"source {source}; complete -C {line!r}"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout


@needs.mark("fish")
def test_fish(environment: dict[str, str], root: Path) -> None:
    source = script("fish", environment)
    for typed, completed in TYPED:
        answer = fish_completes(source, typed.format(root=root), environment)
        words = [row.split("\t")[0] for row in answer.splitlines() if row]
        assert words == [completed.format(root=root).split()[-1]]


@needs.mark("fish")
def test_fish_shows_whole_summaries(environment: dict[str, str]) -> None:
    """They hold commas, at which click's own script cuts."""
    answer = fish_completes(script("fish", environment), "krun crea", environment)
    assert "create\tcreate a container: everything is ready, the payload waits" in answer


def test_another_shell_is_refused(environment: dict[str, str]) -> None:
    done = subprocess.run(
        ["krun", "completion", "csh"], env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "csh" in done.stderr and "bash, zsh or fish" in done.stderr
