"""The launcher's text, from packaging/launcher.sh.in; pure."""

from __future__ import annotations

import os
import shlex

from krun import host, policy
from krun.install.boot import LARGEST

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

PACKAGING = f"{os.path.dirname(os.path.dirname(os.path.abspath(__file__)))}/packaging"
# -I: no environment variable, no user's packages, no cwd on sys.path.  -S: no site packages with
# their .pth files.  -B: nothing is written beside the library.
FLAGS = ("-I", "-S", "-B")
# What tells a launcher of krun's from other programs of the same name.
MARK = b"# krun's launcher, written by"


def template(name: str) -> str:
    """Return the text of a file in packaging/."""
    with open(f"{PACKAGING}/{name}", encoding="utf-8") as file:
        return file.read()


def fill(text: str, values: dict[str, str]) -> str:
    """Replace each @NAME@ of a template."""
    for name, value in values.items():
        text = text.replace(f"@{name}@", value)
    return text


def policy_condition(launcher: str, found: policy.Policy | None, directory: str) -> str:
    """Return the shell condition under which the launcher knows which crun the policy names.

    `launcher` is its own path, `found` the policy of now; None, or one from no file, means that
    the condition holds as long as there is no file.
    """
    files = [f"{directory}/policy.json", f"{directory}/policy.toml", policy.ORIGINAL_LIST]
    tests = []
    if found is not None and found.source in files:
        files.remove(found.source)
        own = shlex.quote(launcher)
        for path in (found.source, directory):
            tests.append(f"[ {own} -nt {shlex.quote(path)} ]")
    tests = [f"[ ! -e {shlex.quote(path)} ]" for path in files] + tests
    return " && ".join(tests)


# Until a verb begins there is nothing to undo: Ctrl-C ends the process, without a traceback.
_BEGIN = (
    "import _signal as s,marshal,posix;"
    "s.getsignal(2)is s.default_int_handler and s.signal(2,s.SIG_DFL);"
    "f=posix.open({archive!r},posix.O_CLOEXEC);a=marshal.loads(posix.read(f,{largest}));"
    "posix.close(f);exec(a[0]);"
)


def _words(python: str, archive: str, program: str) -> list[str]:
    begin = _BEGIN.format(archive=archive, largest=LARGEST)
    return [python, *FLAGS, "-c", begin + program]


def python_words(python: str, archive: str) -> list[str]:
    """Return the command that runs krun from its archive, before krun's own arguments."""
    return _words(python, archive, "begin(*a[1:])")


def seed_words(python: str, archive: str) -> list[str]:
    """Return the command that prepares an interpreter for krun.install.warm."""
    count = len(python_words(python, archive))
    sow = f"sow([*a[3],*a[4]],{count},{os.getpid()})"
    program = f"ready(*a[1:]);from krun.install.seed import sow;{sow}"
    return _words(python, archive, program)


def text(
    launcher: str,
    python: Sequence[str],
    found: policy.Policy | None,
    directory: str = policy.DIRECTORY,
    warm: str = "",
) -> str:
    """Return the launcher's text.

    `python` are the words that run krun in the interpreter, `warm` a program that does the same
    faster and is given them (krun.install.warm); an empty string where there is none.
    """
    crun = (found.crun,) if found is not None and found.crun else host.CRUN_PATHS
    return fill(
        template("launcher.sh.in"),
        {
            "POLICY": policy_condition(launcher, found, directory),
            "CRUN": shlex.join(crun),
            "PYTHON": shlex.join(python),
            "WARM": warm and f'[ ! -x {shlex.quote(warm)} ] || exec {shlex.quote(warm)} "$@"\n',
        },
    )
