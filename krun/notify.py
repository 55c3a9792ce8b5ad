"""NOTIFY_SOCKET: a socket in the container whose READY=1 goes on to the caller's (sd_notify(3)).

    create         <root>/<id>/notify is mounted at /run/notify, NOTIFY_SOCKET names a socket there
    start, run     bind the socket, let the payload go, wait for READY=1 or for init's end;
                   the caller hears READY=1, MAINPID and, where krun ends next, BARRIER=1

Nothing else that the payload says is passed on, as with runc and crun: systemd would believe it,
since krun's word comes from a process of the unit.
"""

from __future__ import annotations

import os

from krun import log

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

INSIDE = "/run/notify"
DIRECTORY = "notify"
_NAME = "notify.sock"
_READY = b"READY=1"

# sd_notify_barrier(3): how long systemd may take to read what was said.
_BARRIER_SECONDS = 30


def caller() -> str:
    """Return the caller's socket, "" for none that can be told anything."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if path and path[0] not in "/@":
        log.warning(f"NOTIFY_SOCKET={path}: neither a path nor an abstract socket, not passed on")
        return ""
    return path


def add(spec: Any, directory: str) -> Any:
    """Return the configuration with the socket's mount and variable.

    Without a change where it has its own already: conmon passes on what podman's containers say.
    directory is the container's, of its state.
    """
    process = spec["process"]
    env = list(process.get("env") or ())
    mounts = list(spec.get("mounts") or ())
    if any(one.startswith("NOTIFY_SOCKET=") for one in env):
        return spec
    if any(os.path.normpath(one["destination"]) == INSIDE for one in mounts):
        return spec
    mount = {
        "destination": INSIDE,
        "type": "bind",
        "source": f"{directory}/{DIRECTORY}",
        "options": ["bind", "nosuid", "noexec", "nodev", "ro"],
    }
    env.append(f"NOTIFY_SOCKET={INSIDE}/{_NAME}")
    return {**spec, "mounts": [*mounts, mount], "process": {**process, "env": env}}


def make(directory: str) -> None:
    """Make the directory that is mounted."""
    path = f"{directory}/{DIRECTORY}"
    os.mkdir(path)
    # Whatever the umask: the payload's user passes.
    os.chmod(path, 0o755)


def listen(directory: str) -> Relay | None:
    """Bind the container's socket; None where it has none, or there is nobody to tell."""
    to = caller()
    if not to or not os.path.isdir(f"{directory}/{DIRECTORY}"):
        return None
    return Relay(directory, to)


class Relay:
    """The container's socket, and the caller's."""

    def __init__(self, directory: str, to: str) -> None:
        import _socket

        self.to = f"\0{to[1:]}" if to[0] == "@" else to
        self.path = f"{directory}/{DIRECTORY}/{_NAME}"
        self.sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_DGRAM | _socket.SOCK_CLOEXEC)
        self.fd = self.sock.fileno()
        try:
            # Of a start that was killed.
            os.unlink(self.path)
        except FileNotFoundError:
            pass
        # A socket's address has room for 107 bytes, a container's id may be longer.
        place = os.open(f"{directory}/{DIRECTORY}", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self.sock.bind(f"/proc/self/fd/{place}/{_NAME}")
        finally:
            os.close(place)
        os.chmod(self.path, 0o777)
        self.sock.setblocking(False)

    def ready(self) -> bool:
        """Read what the payload has said; tells whether READY=1 was among it.

        Descriptors sent along are closed by the kernel, which ends the payload's barrier.
        """
        while True:
            try:
                said = self.sock.recv(4096)
            except BlockingIOError:
                return False
            if _READY in said.split(b"\n"):
                return True

    def pass_on(self) -> bool:
        """Pass READY=1 on when it has been said, with this process as the one to watch: it stays.

        Tells whether there is nothing more to hear.
        """
        if self.fd != -1 and self.ready():
            self.tell(os.getpid())
        return self.fd == -1

    def wait(self, init: int, pid: int) -> None:
        """Wait for READY=1 and pass it on, or for the end of init, of which init is the pidfd."""
        import select

        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        poll.register(init, select.POLLIN)
        while True:
            ended = any(fd == init for fd, _ in poll.poll())
            # Said last, it is still said.
            if self.ready():
                self.tell(pid, last=True)
                return
            if ended:
                self.close()
                return

    def tell(self, pid: int, last: bool = False) -> None:
        """Tell the caller that pid is ready, and close; `last`: it may end once this returns."""
        import _socket

        self.close()
        told = _socket.socket(_socket.AF_UNIX, _socket.SOCK_DGRAM | _socket.SOCK_CLOEXEC)
        try:
            told.connect(self.to)
            told.send(b"%s\nMAINPID=%d\n" % (_READY, pid))
            if last:
                _barrier(told)
        except OSError as error:
            log.warning(
                f"NOTIFY_SOCKET: {error.strerror or error}: the caller was not told READY=1"
            )
        finally:
            told.close()

    def close(self) -> None:
        """Close the container's socket and remove it."""
        if self.fd != -1:
            self.fd = -1
            self.sock.close()
            try:
                os.unlink(self.path)
            except FileNotFoundError:
                # delete was here.
                pass


def _barrier(told: Any) -> None:
    """Wait until the receiver has read all (sd_notify_barrier(3)).

    systemd tells the sender's unit by its process, which must still be there.
    """
    import _socket
    import select

    reader, writer = os.pipe()
    try:
        rights = (_socket.SOL_SOCKET, _socket.SCM_RIGHTS, writer.to_bytes(4, "little"))
        told.sendmsg([b"BARRIER=1"], [rights])
        os.close(writer)
        writer = -1
        poll = select.poll()
        poll.register(reader, select.POLLIN)
        if not poll.poll(_BARRIER_SECONDS * 1000):
            log.warning("NOTIFY_SOCKET: the receiver did not answer BARRIER=1")
    finally:
        os.close(reader)
        if writer != -1:
            os.close(writer)
