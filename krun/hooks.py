"""OCI hooks: programs that get the container's state on their standard input (config.md, Hooks)."""

from __future__ import annotations

import os
import select
import time

from krun import jsontext
from krun.errors import HookFailed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

# How much of a failed hook's error output its user sees.
_SAID = 4096


def run_hooks(kind: str, hooks: Iterable[Any], state: dict[str, Any]) -> str:
    """Run hooks in order and return what they said on their error output.

    Raises HookFailed at the first that fails or runs out of time.
    """
    document = jsontext.dumps(state).encode()
    words = []
    for index, hook in enumerate(hooks):
        status, said = _run(hook, document)
        where = f"error running hook: hooks.{kind}[{index}]: {hook['path']}"
        if status is None:
            raise HookFailed(f"{where} took longer than {hook['timeout']} s")
        text = said.decode("utf-8", "replace").strip()
        if status:
            end = f": {text}" if text else ""
            raise HookFailed(f"{where}: exit status {status}{end}")
        if text:
            words.append(text)
    return "; ".join(words)


def _run(hook: Any, document: bytes) -> tuple[int | None, bytes]:
    """Run one hook; returns its status (None: killed after its timeout) and error output."""
    state_reader, state_writer = os.pipe()
    said_reader, said_writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        _become(hook, state_reader, said_writer)
    os.close(state_reader)
    os.close(said_writer)
    child = os.pidfd_open(pid)
    try:
        said, in_time = _feed(child, state_writer, document, said_reader, hook.get("timeout"))
    finally:
        os.close(child)
        os.close(said_reader)
    if not in_time:
        os.kill(pid, 9)
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    return (code if code >= 0 else 128 - code) if in_time else None, said


def _become(hook: Any, state: int, said: int) -> None:
    """Exec the hook in the forked child."""
    try:
        os.setsid()
        os.dup2(state, 0)
        null = os.open("/dev/null", os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(said, 2)
        os.closerange(3, 1024)
        from _signal import SIG_DFL, SIGPIPE, signal

        signal(SIGPIPE, SIG_DFL)
        variables = dict(os.environb)
        if hook.get("env") is not None:
            variables = {
                os.fsencode(name): os.fsencode(value)
                for name, _, value in (one.partition("=") for one in hook["env"])
            }
        os.execve(hook["path"], hook.get("args") or [hook["path"]], variables)
    except OSError as error:
        os.write(2, f"{error.strerror}".encode())
    finally:
        os._exit(127)


def _feed(
    child: int, writer: int, document: bytes, reader: int, timeout: int | None
) -> tuple[bytes, bool]:
    """Write the state, collect error output, until the child ends or its time is up."""
    os.set_blocking(writer, False)
    poll = select.poll()
    poll.register(child, select.POLLIN)
    poll.register(writer, select.POLLOUT)
    poll.register(reader, select.POLLIN)
    end = time.monotonic() + timeout if timeout else None
    said = b""
    try:
        while True:
            left = None if end is None else max(0.0, end - time.monotonic()) * 1000
            events = poll.poll(left)
            if not events:
                return said, False
            for fd, event in events:
                if fd == writer and writer != -1:
                    try:
                        document = document[os.write(writer, document) :]
                    except BlockingIOError:
                        continue
                    except BrokenPipeError:
                        # A hook need not read its input.
                        document = b""
                    if not document:
                        poll.unregister(writer)
                        os.close(writer)
                        writer = -1
                elif fd == reader and event & select.POLLIN:
                    said = (said + os.read(reader, 65536))[-_SAID:]
                elif fd == reader:
                    poll.unregister(reader)
            if any(fd == child for fd, _ in events):
                return said, True
    finally:
        if writer != -1:
            os.close(writer)
