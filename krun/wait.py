"""Stand by a payload in the foreground: pass signals on, carry its terminal, return its status."""

from __future__ import annotations

import _signal
import os
import select

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType

    from krun.notify import Relay

# Not passed on: what cannot be caught, what the payload does to us, what is ours.
_OWN = (
    _signal.SIGKILL,
    _signal.SIGSTOP,
    _signal.SIGCHLD,
    _signal.SIGPIPE,
    _signal.SIGURG,
    _signal.SIGWINCH,
    _signal.SIGSEGV,
    _signal.SIGBUS,
    _signal.SIGFPE,
    _signal.SIGILL,
    _signal.SIGTTIN,
    _signal.SIGTTOU,
    _signal.SIGTSTP,
)


def exit_status(status: int) -> int:
    """Return a wait status as an exit status: 128 + n for signal n."""
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def listen() -> int:
    """Begin to note signals; returns the descriptor that stand_by reads them from.

    Called before the payload runs, so that none is lost.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    os.set_blocking(reader, False)
    _signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in range(1, 32):
        if number not in _OWN or number in (_signal.SIGCHLD, _signal.SIGWINCH):
            _signal.signal(number, _noted)
    return reader


def unlisten() -> None:
    """Undo listen() in a child: it does not note signals, they do what they do to any process."""
    _signal.set_wakeup_fd(-1)
    for number in range(1, 32):
        if _signal.getsignal(number) is _noted:
            _signal.signal(number, _signal.SIG_DFL)


def stand_by(pid: int, reader: int, master: int = -1, relay: Relay | None = None) -> int:
    """Wait for the child pid and return its exit status; master is its terminal's other end.

    relay, when given, passes the payload's READY=1 on.
    """
    terminal = Terminal(master) if master != -1 else None
    try:
        return _wait(pid, reader, terminal, relay)
    finally:
        if relay is not None:
            relay.close()
        if terminal is not None:
            terminal.restore()


def _noted(number: int, frame: FrameType | None) -> None:
    """Leave the signal to the wake-up descriptor."""


def _wait(pid: int, reader: int, terminal: Terminal | None, relay: Relay | None) -> int:
    poll = select.poll()
    heard = relay.fd if relay is not None else -1
    if heard != -1:
        poll.register(heard, select.POLLIN)
    poll.register(reader, select.POLLIN)
    # Besides SIGCHLD: a signal that could not be noted must not leave this waiting.
    child = os.pidfd_open(pid)
    poll.register(child, select.POLLIN)
    if terminal is not None:
        terminal.register(poll)
        terminal.resize()
    while True:
        found, status = _reap(pid)
        if found:
            if terminal is not None:
                terminal.drain()
            if relay is not None:
                relay.pass_on()
            return exit_status(status)
        for fd, _ in poll.poll():
            if fd == child:
                continue
            if fd == heard:
                assert relay is not None
                if relay.pass_on():
                    poll.unregister(fd)
                continue
            if fd != reader:
                assert terminal is not None
                terminal.carry(fd, poll)
                continue
            for number in os.read(reader, 256):
                if number == _signal.SIGWINCH:
                    if terminal is not None:
                        terminal.resize()
                elif number != _signal.SIGCHLD:
                    _send(pid, number)


def _reap(pid: int) -> tuple[bool, int]:
    """Reap children; tells whether pid was among them, and its status."""
    while True:
        try:
            child, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return True, 0
        if child == pid:
            return True, status
        if child == 0:
            return False, 0


def _send(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


class Terminal:
    """The caller's terminal in raw mode, carried to and from the container's."""

    def __init__(self, master: int) -> None:
        self.master = master
        self.saved: object = None
        os.set_blocking(master, True)
        if os.isatty(0):
            import termios
            import tty

            self.saved = termios.tcgetattr(0)
            tty.setraw(0)

    def restore(self) -> None:
        """Give the caller's terminal back as it was."""
        if self.saved is not None:
            import termios

            termios.tcsetattr(0, termios.TCSADRAIN, self.saved)  # type: ignore[arg-type]

    def register(self, poll: select.poll) -> None:
        """Listen to both ends."""
        poll.register(self.master, select.POLLIN)
        poll.register(0, select.POLLIN)

    def resize(self) -> None:
        """Give the container's terminal the size of the caller's."""
        if os.isatty(0):
            size = os.get_terminal_size(0)
            from krun.console import set_size

            set_size(self.master, size.lines, size.columns)

    def carry(self, fd: int, poll: select.poll) -> None:
        """Carry what is ready at one end to the other."""
        try:
            data = os.read(fd, 65536)
        except OSError:
            # EIO: the last process with the terminal open is gone.
            data = b""
        if not data:
            poll.unregister(fd)
            if fd == 0 and not os.isatty(0):
                write_all(self.master, b"\x04")
            return
        write_all(self.master if fd == 0 else 1, data)

    def drain(self) -> None:
        """Carry what the payload wrote last."""
        os.set_blocking(self.master, False)
        while True:
            try:
                data = os.read(self.master, 65536)
            except OSError:
                return
            if not data:
                return
            write_all(1, data)


def write_all(fd: int, data: bytes) -> None:
    """Write all of data; a reader that is gone is not this program's failure."""
    while data:
        try:
            data = data[os.write(fd, data) :]
        except OSError:
            return
