"""The frame of a hook program: options, a time limit, and failures that never break a start.

Options, given in the hooks.d file's args: --state=DIR --policy=FILE --mode=MODE --krun=PATH
--config=FILE --seconds=N.
"""

from __future__ import annotations

import _signal
import posix

from krun.errors import KrunError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    Options = dict[str, str]

POLICY = "/etc/krun/images-policy.json"
# A hook that takes longer gives up: podman's own hook timeout would fail the start.
SECONDS = 2.0
MODES = ("record", "warn", "refuse")


def options_of(argv: list[str]) -> Options:
    """Return the options; unknown ones are left for a newer hook's sake."""
    options = {"policy": POLICY, "mode": "", "krun": "", "config": "", "seconds": str(SECONDS)}
    for word in argv[1:]:
        name, equals, value = word.removeprefix("--").partition("=")
        if equals:
            options[name] = value
    if "state" not in options:
        options["state"] = _default_state()
    return options


def _default_state() -> str:
    if posix.geteuid() == 0:
        return "/var/lib/krun/images"
    import os

    home = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return f"{home}/krun/images"


def say(program: str, text: str) -> None:
    """Write one line to stderr, which the runtime passes on to its caller or log."""
    try:
        posix.write(2, f"{program}: {text}\n".encode("utf-8", "backslashreplace"))
    except OSError:
        pass


def main(argv: list[str], act: Callable[[Options], int]) -> int:
    """Run a hook: its status, or 0 when it is broken or slow and its mode is not refuse."""
    program = argv[0].rpartition("/")[2]
    options = options_of(argv)

    def failed() -> int:
        # The hook itself sets the mode as soon as it knows the container's.
        return 1 if options["mode"] == "refuse" else 0

    def give_up(number: int, frame: object) -> None:
        say(program, f"no result in {options['seconds']} s, given up")
        posix._exit(failed())

    _signal.signal(_signal.SIGALRM, give_up)
    _signal.setitimer(_signal.ITIMER_REAL, float(options["seconds"]))
    try:
        return act(options)
    except KrunError as error:
        say(program, str(error))
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        say(program, f"{where}{error.strerror}")
    return failed()
