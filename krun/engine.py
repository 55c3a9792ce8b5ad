"""Who acts: hand a call over to the crun binary by execve, or let the native engine do it."""

from __future__ import annotations

import os
import posix

from krun import host
from krun.errors import KrunError, NotFound

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

    from krun.grammar import Call, Option

# Container ids as runc takes them (libcontainer) and crun does: names of one directory (NAME_MAX).
ID_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_+-.")
ID_MAX = 255
# Global options that are krun's own, or runc's, and unknown to crun.
_NOT_CRUNS = ("engine", "monitor", "mode", "network", "policy", "criu", "log_level")


def root_of(call: Call) -> str:
    """Return the state directory of this call."""
    return call.settings.root or host.default_root()


def check_id(container: str) -> str:
    """Return a container id that is one path component; raises KrunError."""
    if not container or container in (".", "..") or len(container) > ID_MAX:
        shown = container if len(container) < 80 else container[:77] + "..."
        raise KrunError(f"invalid container ID {shown!r}", f"1 to {ID_MAX} of [a-zA-Z0-9_+-.]")
    if not ID_CHARACTERS.issuperset(container):
        raise KrunError(f"invalid container ID {container!r}", "use [a-zA-Z0-9_+-.] only")
    if container.startswith("-"):
        raise KrunError(f"invalid container ID {container!r}", "it must not begin with -")
    return container


def of(root: str, container: str) -> str:
    """Return the engine that holds a container: native, crun, or empty for none."""
    directory = f"{root}/{container}"
    if os.path.exists(f"{directory}/state.json"):
        return "native"
    # crun's own state: the native engine's code need not be loaded to see that.
    if os.path.exists(f"{directory}/status"):
        return "crun"
    if not os.path.isdir(directory):
        return ""
    from krun import store

    return "native" if store.owns(directory) else "crun"


def find(call: Call) -> tuple[str, str, str]:
    """Return root, id and engine of the container a call names; raises NotFound."""
    root = root_of(call)
    container = check_id(call.arguments[0])
    engine = of(root, container)
    if not engine:
        raise NotFound(f"container `{container}` does not exist")
    return root, container, engine


def crun_path(call: Call) -> str:
    """Return crun's path; raises KrunError where it is not installed."""
    from krun import policy

    wanted = policy.load(call.settings.policy).crun
    path = host.first_executable((wanted,) if wanted else host.CRUN_PATHS)
    if not path and wanted:
        raise KrunError(f"crun: no executable file at {wanted}", "the policy's paths.crun names it")
    if not path:
        raise KrunError(
            f"crun is not installed (looked at {', '.join(host.CRUN_PATHS)})",
            "apt-get install crun, or set paths.crun in /etc/krun/policy.json",
        )
    return path


def _words(
    options: tuple[Option, ...], values: dict[str, object], skip: tuple[str, ...]
) -> list[str]:
    words: list[str] = []
    for option in options:
        value = values.get(option.key)
        if option.key in skip or value in (None, False, []):
            continue
        name = option.names[0]
        if not option.metavar:
            words.append(name)
        elif option.repeat:
            assert isinstance(value, list)
            for item in value:
                words += [name, str(item)]
        elif value != option.default:
            words += [name, str(value)]
    return words


def crun_words(call: Call, skip: tuple[str, ...] = ()) -> list[str]:
    """Return crun's command line for a call, up to the verb's options; without arguments."""
    from krun import grammar

    settings = call.settings._asdict()
    settings["root"] = root_of(call)
    if settings["log_level"] == "debug":
        settings["debug"] = True
    return [
        "crun",
        *_words(grammar.GLOBAL_OPTIONS, settings, _NOT_CRUNS),
        call.verb,
        *_words(call.command.options, call.options, skip),
    ]


def hand_over(path: str, argv: list[str]) -> NoReturn:
    """Become another program; raises OSError when it cannot be executed.

    Descriptors, cwd, environment, signal mask and session stay: nothing of krun remains.  The
    interpreter ignores SIGPIPE and SIGXFSZ, which would last beyond execve (signal(7)).
    """
    from _signal import SIG_DFL, SIGPIPE, SIGXFSZ, signal

    signal(SIGPIPE, SIG_DFL)
    signal(SIGXFSZ, SIG_DFL)
    try:
        os.execv(path, argv)
    except OSError as error:
        raise KrunError(f"{path}: {error.strerror}", "see krun check") from error


def pass_on(call: Call, skip: tuple[str, ...] = ()) -> NoReturn:
    """Let crun do what was asked, with nothing lost."""
    hand_over(crun_path(call), [*crun_words(call, skip), *call.arguments])


def document_fd(text: str, lowest: int) -> str:
    """Return a path, good in this process and what it execs, of a document held in memory.

    `lowest` keeps it clear of descriptors that the container is given.
    """
    fd = os.memfd_create("krun-config", 0)
    data = text.encode("utf-8", "surrogatepass")
    while data:
        data = data[os.write(fd, data) :]
    number = max(lowest, 64)
    while True:
        try:
            os.fstat(number)
        except OSError:
            break
        number += 1
    try:
        os.dup2(fd, number, inheritable=True)
    except OSError:
        # Above RLIMIT_NOFILE: any free number is right as long as none is preserved.
        if lowest > 3:
            raise
        os.set_inheritable(fd, True)
        return f"/proc/self/fd/{fd}"
    os.close(fd)
    return f"/proc/self/fd/{number}"


def listen_fds() -> int:
    """Return how many descriptors systemd handed over (sd_listen_fds(3))."""
    # Not os.environ: it costs more than all the rest of os.
    text = os.fsdecode(posix.environ.get(b"LISTEN_FDS", b""))
    return int(text) if text.isascii() and text.isdigit() else 0


def refuse(call: Call, *names: str) -> None:
    """Raise KrunError for options that crun lacks."""
    for name in names:
        if call.options.get(name):
            raise KrunError(
                f"{call.verb} --{name.replace('_', '-')}: the crun engine cannot do it",
                "use --engine native",
            )
