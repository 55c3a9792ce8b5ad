"""A podman that serves its REST API to this krun alone, kept for one pull after another.

    krun                                        podman system service
    bind, listen, connect, unlink the path
    start with the socket as descriptor 3 ───▶  takes it over (sd_listen_fds(3))
    POST …/images/create or …/images/pull ───▶
                                          ◀───  events, one JSON object a line, then the end
    close, or the end of krun             ───▶  gives the pull up, removes what it had fetched,
                                                ends after a second without a connection; is
                                                killed after three

A podman process for each pull would cost its start each time; and one that is ended in the middle
of a pull leaves what it had fetched in /var/tmp, which no later podman removes.
"""

from __future__ import annotations

import base64
import fcntl
import http.client
import json
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any
from urllib.parse import urlencode

from krun.images.credentials import Credential
from krun.images.stores.model import PullRequest, StoreFailed, last_line
from krun.images.stores.processes import require

# Descriptor 0 is the listening socket, which sd_listen_fds(3) wants as 3, with LISTEN_PID naming
# the process, which only the process itself knows before it becomes podman.  Descriptor 1 is a
# pipe that ends with krun: podman 4.3 sometimes does not notice that its connection is gone.  Who
# waits for that keeps the process group's number from becoming anybody else's.
_START = """\
exec 3<&0 4<&1 </dev/null >/dev/null
(read -r gone <&4; sleep "$0"; kill -s KILL -- -$$) 3<&- &
export LISTEN_PID=$$ LISTEN_FDS=1
exec "$@" 4<&-
"""
_IDLE_SECONDS = 1
_GRACE_SECONDS = 3


class Disconnected(Exception):
    """The service went away, or its time was up (`late`).

    `answered` says whether in the middle of its answer.
    """

    def __init__(self, answered: bool, late: bool) -> None:
        super().__init__()
        self.answered = answered
        self.late = late


class Service:
    """One podman process and the one connection to it; `end` must be called."""

    def __init__(self, argv: Sequence[str], layers_at_once: int) -> None:
        """Start podman, called as argv; 0 leaves it to podman how many layers it fetches at once.

        Raises StoreUnavailable when there is no such program.
        """
        require(argv[0])
        listener, self._socket = _pair()
        self._errors = os.memfd_create("podman", os.MFD_CLOEXEC)
        environ, passed = dict(os.environ), []
        if layers_at_once:
            passed.append(parallel_layers(layers_at_once))
            environ["CONTAINERS_CONF_OVERRIDE"] = f"/proc/self/fd/{passed[0]}"
        pipe, self._alive = os.pipe()
        serve = [*argv, "system", "service", f"--time={_IDLE_SECONDS}"]
        try:
            self._process = subprocess.Popen(
                ["/bin/sh", "-c", _START, str(_GRACE_SECONDS), *serve],
                stdin=listener.fileno(),
                stdout=pipe,
                stderr=self._errors,
                env=environ,
                pass_fds=passed,
                # Ctrl-C reaches krun alone, which then gives its pulls up in order.
                start_new_session=True,
            )
        finally:
            listener.close()
            for descriptor in (pipe, *passed):
                os.close(descriptor)
        self._http = http.client.HTTPConnection("podman")
        self._http.sock = self._socket
        self._http.auto_open = 0

    def pull(self, request: PullRequest) -> Iterator[dict[str, Any]]:
        """Pull an image and yield the events; one with `error` is the last.

        Where the registry's certificate is checked they are dockerd's, with bytes; for others
        podman 4 has no such call.  Raises Disconnected.
        """
        reference, credential = request.reference, request.credential
        if request.verified:
            query = {"fromImage": reference.name, "tag": reference.digest or reference.tag}
            path = "/v1.40/images/create"
        else:
            query = {"reference": reference.pullable, "tlsVerify": "false"}
            path = "/v4.0.0/libpod/images/pull"
        headers = {} if credential is None else {"X-Registry-Auth": _auth(credential)}
        deadline = time.monotonic() + request.timeout
        answered = False
        try:
            self._socket.settimeout(request.timeout)
            self._http.request("POST", f"{path}?{urlencode(query)}", headers=headers)
            answer = self._http.getresponse()
            answered = True
            if answer.status != 200:
                # Not a stream of events, but one object (podman's API, ErrorModel).
                yield {"error": json.loads(answer.read()).get("message", answer.reason)}
                return
            rest, data = b"", b"\n"
            while data:
                *lines, rest = (rest + data).split(b"\n")
                yield from (json.loads(line) for line in lines if line.strip())
                self._socket.settimeout(max(0.001, deadline - time.monotonic()))
                data = answer.read1(65536)
        except (OSError, http.client.HTTPException) as error:
            raise Disconnected(answered, isinstance(error, TimeoutError)) from error
        except ValueError as error:
            raise StoreFailed(f"podman system service: its answer is not JSON: {error}") from error

    def give_up(self) -> None:
        """Let go of the connection, from any thread: a pull under way ends with Disconnected."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            # The other side was first.
            pass

    def end(self, idle: bool) -> str:
        """Let the process end and return what it said last; an idle one need not clean up."""
        if idle:
            self._process.terminate()
        self._http.close()
        self._socket.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_GRACE_SECONDS)
        # The rest of the group: its number is not yet anybody else's.
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._alive)
        said = os.pread(self._errors, 1 << 20, 0).decode("utf-8", "replace")
        os.close(self._errors)
        return last_line(said)


def in_memory(name: str, text: str) -> int:
    """Return a descriptor of a file that is on no disk."""
    # Not descriptor 3: there a service expects its socket.
    fd = os.memfd_create(name, os.MFD_CLOEXEC)
    try:
        os.write(fd, text.encode())
        os.lseek(fd, 0, os.SEEK_SET)
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10)
    finally:
        os.close(fd)


def parallel_layers(number: int) -> int:
    """Return a descriptor of a containers.conf(5) that limits the layers fetched at once.

    Where podman is too old to read $CONTAINERS_CONF_OVERRIDE, image_parallel_copies decides.
    """
    return in_memory("containers.conf", f"[engine]\nimage_parallel_copies = {number}\n")


def _pair() -> tuple[socket.socket, socket.socket]:
    """Return a listening socket and a connection to it whose path nobody else can find."""
    listener = socket.socket(socket.AF_UNIX)
    connection = socket.socket(socket.AF_UNIX)
    try:
        with tempfile.TemporaryDirectory(prefix="krun-") as directory:
            # By its descriptor: unix(7) has 108 bytes for a path.
            opened = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                listener.bind(f"/proc/self/fd/{opened}/s")
                listener.listen(1)
                connection.connect(f"/proc/self/fd/{opened}/s")
            finally:
                os.close(opened)
    except BaseException:
        listener.close()
        connection.close()
        raise
    return listener, connection


def _auth(credential: Credential) -> str:
    """Return the X-Registry-Auth header of one credential (Docker Engine API, authentication)."""
    if credential.identity_token:
        entry: Mapping[str, str] = {"identitytoken": credential.identity_token}
    else:
        entry = {"username": credential.username, "password": credential.password}
    return base64.urlsafe_b64encode(json.dumps(entry).encode()).decode()
