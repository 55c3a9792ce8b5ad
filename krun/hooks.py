"""OCI hooks: programs that get the container's state on their standard input (config.md, Hooks)."""

from __future__ import annotations

import os
import posix
import select
import time

from krun import jsontext
from krun.errors import HookFailed
from krun.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any


class Outputs(Record):
    """Where hooks write besides: descriptors, -1 for none (crun(1), Extensions to OCI)."""

    stdout: int = -1
    stderr: int = -1


def open_outputs(annotations: dict[str, str]) -> Outputs:
    """Open the files that annotations name for the output of hooks; raises HookFailed."""
    return Outputs(*[_open_output(annotations, name) for name in ("stdout", "stderr")])


def _open_output(annotations: dict[str, str], name: str) -> int:
    path = annotations.get(f"run.oci.hooks.{name}")
    if path is None:
        return -1
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOCTTY | os.O_CLOEXEC
    try:
        return os.open(path, flags, 0o600)
    except OSError as error:
        where = f'annotations["run.oci.hooks.{name}"]'
        raise HookFailed(f"{where}: open {path}: {error.strerror}") from error


# How much of a failed hook's error output its user sees.
_SAID = 4096


def run_hooks(
    kind: str,
    hooks: Sequence[Any],
    state: dict[str, Any],
    outputs: Outputs | None = None,
    environ: list[bytes] | None = None,
) -> str:
    """Run hooks in order and return what they said on their error output.

    What they write goes to the files of the state's annotations too, unless outputs is given, as
    it is where those are out of reach.  One that lists no environment gets environ, or this
    process's.  Raises HookFailed at the first that fails or runs out of time.
    """
    if not hooks:
        return ""
    if outputs is not None:
        return _run_all(kind, hooks, state, outputs, environ)
    outputs = open_outputs(state["annotations"])
    try:
        return _run_all(kind, hooks, state, outputs, environ)
    finally:
        for fd in outputs:
            if fd != -1:
                os.close(fd)


def run_each(kind: str, hooks: Sequence[Any], state: dict[str, Any]) -> None:
    """Run hooks whose failure is only worth a warning (runtime.md, Lifecycle 13)."""
    from krun import log

    for hook in hooks:
        try:
            run_hooks(kind, [hook], state)
        except HookFailed as error:
            log.warning(str(error))


def _run_all(
    kind: str,
    hooks: Sequence[Any],
    state: dict[str, Any],
    outputs: Outputs,
    environ: list[bytes] | None,
) -> str:
    document = jsontext.dumps(state).encode()
    words = []
    for index, hook in enumerate(hooks):
        status, said = _run(hook, document, outputs, environ)
        # runc's words, of before and since its version 1.2.
        where = f"error running {kind} hook #{index}: error running hook {hook['path']}"
        if status is None:
            raise HookFailed(f"{where}: took longer than {hook['timeout']} s")
        text = said.decode("utf-8", "replace").strip()
        if status:
            end = f": {text}" if text else ""
            raise HookFailed(f"{where}: {_reason(status)}{end}")
        if text:
            words.append(text)
    return "; ".join(words)


def _reason(status: int) -> str:
    """Return what ended a hook: its exit status, or the signal -status."""
    if status >= 0:
        return f"exit status {status}"
    from _signal import strsignal

    return f"signal: {(strsignal(-status) or str(-status)).lower()}"


def _run(
    hook: Any, document: bytes, outputs: Outputs, environ: list[bytes] | None
) -> tuple[int | None, bytes]:
    """Run one hook; returns its status (None: out of time, -n: by signal n) and error output."""
    state_reader, state_writer = os.pipe()
    said_reader, said_writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        _become(hook, state_reader, outputs._replace(stderr=said_writer), environ)
    os.close(state_reader)
    os.close(said_writer)
    child = os.pidfd_open(pid)
    try:
        ends = Ends(state_writer, said_reader, outputs.stderr)
        said, in_time = _feed(child, ends, document, hook.get("timeout"))
    finally:
        os.close(child)
        os.close(said_reader)
    if not in_time:
        os.kill(pid, 9)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status) if in_time else None, said


def _become(hook: Any, state: int, outputs: Outputs, environ: list[bytes] | None) -> None:
    """Exec the hook in the forked child."""
    try:
        os.setsid()
        os.dup2(state, 0)
        out = outputs.stdout
        os.dup2(os.open("/dev/null", os.O_WRONLY) if out == -1 else out, 1)
        os.dup2(outputs.stderr, 2)
        os.closerange(3, 1024)
        from _signal import SIG_DFL, SIGPIPE, signal

        signal(SIGPIPE, SIG_DFL)
        variables = dict(posix.environ)
        if hook.get("env") is not None:
            environ = [os.fsencode(one) for one in hook["env"]]
        if environ is not None:
            variables = {name: value for name, _, value in (one.partition(b"=") for one in environ)}
        os.execve(hook["path"], hook.get("args") or [hook["path"]], variables)
    except OSError as error:
        os.write(2, f"{error.strerror}".encode())
    finally:
        os._exit(127)


class Ends(Record):
    """The runtime's ends of a hook's pipes, and the file for its error output, -1 for none."""

    writer: int
    reader: int
    copy: int


def _feed(child: int, ends: Ends, document: bytes, timeout: int | None) -> tuple[bytes, bool]:
    """Write the state, collect error output, until the child ends or its time is up."""
    writer, reader = ends.writer, ends.reader
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
                    more = os.read(reader, 65536)
                    if ends.copy != -1:
                        os.write(ends.copy, more)
                    said = (said + more)[-_SAID:]
                elif fd == reader:
                    poll.unregister(reader)
            if any(fd == child for fd, _ in events):
                return said, True
    finally:
        if writer != -1:
            os.close(writer)
