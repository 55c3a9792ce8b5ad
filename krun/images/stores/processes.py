"""Run a store's program: its own process group, ended with its caller, stoppable, never a shell."""

from __future__ import annotations

import os
import selectors
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from krun.images.stores.model import StoreFailed, StoreUnavailable, last_line
from krun.record import Record

# Time between SIGTERM and SIGKILL: podman and ctr undo a partial pull meanwhile.
_GRACE_SECONDS = 10.0


class Result(Record):
    """How a program ended; `timed_out` and `cancelled` say who ended it."""

    status: int
    output: str
    errors: str
    timed_out: bool = False
    cancelled: bool = False


def require(program: str) -> None:
    """Raise StoreUnavailable unless there is such a program."""
    if shutil.which(program) is None:
        raise StoreUnavailable(
            f"{program}: not found", "install it, or choose another store with --store"
        )


class Programs:
    """The programs under way, so that another thread can end them."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self._cancelled = False
        # A killed krun must not leave a pull behind: the kernel ends the child (prctl(2),
        # PR_SET_PDEATHSIG), set by util-linux's setpriv because a thread may not fork with code.
        setpriv = shutil.which("setpriv")
        self._prefix = [setpriv, "--pdeathsig", "TERM"] if setpriv else []

    def cancel(self) -> None:
        """End all programs and refuse new ones."""
        with self._lock:
            self._cancelled = True
            running = list(self._running)
        for process in running:
            _signal(process, signal.SIGTERM)

    def run(
        self,
        argv: Sequence[str],
        *,
        timeout: float,
        environ: Mapping[str, str] | None = None,
        on_line: Callable[[str], None] | None = None,
        pass_fds: Sequence[int] = (),
    ) -> Result:
        """Run argv to its end; `on_line` sees each line of both its outputs as it comes.

        Raises StoreUnavailable when the program is not there.
        """
        require(argv[0])
        with self._lock:
            if self._cancelled:
                return Result(-1, "", "cancelled", cancelled=True)
            process = subprocess.Popen(
                [*self._prefix, *argv],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=None if environ is None else dict(environ),
                pass_fds=pass_fds,
                # Ctrl-C reaches krun alone, which then ends its programs in order.
                start_new_session=True,
            )
            self._running.add(process)
        try:
            return self._watch(process, timeout, on_line)
        finally:
            with self._lock:
                self._running.discard(process)
            if process.poll() is None:
                _signal(process, signal.SIGKILL)
                process.wait()
            for pipe in (process.stdout, process.stderr):
                if pipe is not None:
                    pipe.close()

    def _watch(
        self,
        process: subprocess.Popen[bytes],
        timeout: float,
        on_line: Callable[[str], None] | None,
    ) -> Result:
        assert process.stdout is not None and process.stderr is not None
        deadline = time.monotonic() + timeout
        parts: dict[int, list[bytes]] = {}
        rests: dict[int, bytes] = {}
        timed_out = False
        with selectors.DefaultSelector() as selector:
            for pipe in (process.stdout, process.stderr):
                selector.register(pipe, selectors.EVENT_READ)
                parts[pipe.fileno()] = []
                rests[pipe.fileno()] = b""
            while selector.get_map():
                left = deadline - time.monotonic()
                if left <= 0:
                    if timed_out:
                        break
                    timed_out = True
                    _signal(process, signal.SIGTERM)
                    deadline = time.monotonic() + _GRACE_SECONDS
                    continue
                for key, _ in selector.select(left):
                    data = os.read(key.fd, 65536)
                    if not data:
                        selector.unregister(key.fileobj)
                        continue
                    parts[key.fd].append(data)
                    if on_line is not None:
                        lines = (rests[key.fd] + data).replace(b"\r", b"\n").split(b"\n")
                        rests[key.fd] = lines.pop()
                        for line in lines:
                            on_line(line.decode("utf-8", "replace"))
        try:
            status = process.wait(max(1.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            _signal(process, signal.SIGKILL)
            status = process.wait()
            timed_out = True
        texts = [
            b"".join(parts[pipe.fileno()]).decode("utf-8", "replace")
            for pipe in (process.stdout, process.stderr)
        ]
        return Result(status, texts[0], texts[1], timed_out, self._cancelled)

    def ask(self, argv: Sequence[str], *, timeout: float = 60.0) -> str:
        """Run a short program and return what it printed; raises StoreFailed."""
        result = self.run(argv, timeout=timeout)
        if result.timed_out:
            raise StoreFailed(f"{_shown(argv)}: no answer in {timeout:.0f} s")
        if result.status:
            raise StoreFailed(f"{_shown(argv)}: {last_line(result.errors or result.output)}")
        return result.output


def _shown(argv: Sequence[str]) -> str:
    """Return program and verb, for an error: not every option that led there."""
    words = [word for word in argv[1:] if not word.startswith(("-", "/"))]
    return " ".join([os.path.basename(argv[0]), *words[:2]])


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    """Signal the program's whole group: podman starts helpers of its own."""
    if process.poll() is None:
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            pass
