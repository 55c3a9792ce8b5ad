"""poststart hook: pull, in the background, the images that the started container names."""

from __future__ import annotations

from krun.errors import KrunError
from krun.images.hooks import container
from krun.images.references import parse

_KRUN = ("/usr/local/bin/krun", "/usr/bin/krun")
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def detach(argv: list[str], log: str) -> None:
    """Start a program that outlives the hook: in no session, without the runtime's descriptors."""
    import os

    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return
    try:
        os.setsid()
        if os.fork():
            os._exit(0)
        null = os.open("/dev/null", os.O_RDWR)
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
        out = os.open(log, flags, 0o600)
        for number, fd in enumerate((null, out, out)):
            os.dup2(fd, number)
        # The runtime waits for its pipes to close; crun leaves some open for hooks.
        os.closerange(3, 1 << 20)
        os.chdir("/")
        home = {"HOME": os.environ.get("HOME", "/root"), "PATH": _PATH}
        os.execve(argv[0], argv, home)
    finally:
        os._exit(127)


def act(options: dict[str, str]) -> int:
    """Start the pulls of one container's annotation; never fails or delays a start."""
    state = container.read_state()
    words = container.settings_of(state["annotations"]).get("prefetch") or []
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise container.BadState("images.prefetch: must be a list of image references")
    names = [str(parse(word)) for word in words]
    if not names:
        return 0
    import os

    krun = options["krun"] or next((path for path in _KRUN if os.access(path, os.X_OK)), "")
    if not krun:
        raise KrunError("krun: not found", f"give --krun=PATH; looked for {', '.join(_KRUN)}")
    argv = [krun, "images", "warm", "--background", "--state", options["state"]]
    if options["config"]:
        argv += ["--config", options["config"]]
    os.makedirs(options["state"], 0o755, exist_ok=True)
    detach([*argv, *names], f"{options['state']}/prefetch.log")
    return 0
