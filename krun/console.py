"""Pseudo-terminals: made in the container's devpts, used through descriptors only."""

from __future__ import annotations

import os

from krun.errors import KrunError
from krun.linux import flags as k
from krun.linux.libc import buffer, openat2, syscall
from krun.linux.mount import filesystem_type, move_mount, open_tree_at
from krun.linux.path import make_file, open_in_root


def connect(path: str, what: str = "console socket") -> int:
    """Return a descriptor connected to the AF_UNIX socket at path; what it is, for errors."""
    import _socket

    sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    try:
        sock.connect(path)
    except OSError as error:
        raise KrunError(f"{what} {path}: {error.strerror or error}") from error
    return sock.detach()


def send_descriptor(connection: int, fd: int, text: bytes) -> None:
    """Send a descriptor with a text over an AF_UNIX socket (SCM_RIGHTS)."""
    import _socket

    sock = _socket.socket(fileno=os.dup(connection))
    try:
        rights = (_socket.SOL_SOCKET, _socket.SCM_RIGHTS, fd.to_bytes(4, "little"))
        sock.sendmsg([text], [rights])
    finally:
        sock.close()


def pair() -> tuple[int, int]:
    """Return two connected AF_UNIX sockets."""
    import _socket

    one, other = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_STREAM)
    return one.detach(), other.detach()


def receive_descriptor(connection: int) -> int:
    """Return a descriptor that comes over an AF_UNIX socket; raises KrunError when none does."""
    import _socket

    sock = _socket.socket(fileno=os.dup(connection))
    try:
        _, ancillary, _, _ = sock.recvmsg(4096, _socket.CMSG_SPACE(4))
    finally:
        sock.close()
    for level, kind, data in ancillary:
        if level == _socket.SOL_SOCKET and kind == _socket.SCM_RIGHTS:
            fd = int.from_bytes(data[:4], "little")
            os.set_inheritable(fd, False)
            return fd
    raise KrunError("the terminal of the container did not arrive")


def open_terminal(
    root: int,
    size: tuple[int, int] | None,
    connection: int,
    *,
    mounted: bool = True,
    carried: bool = False,
) -> int:
    """Make a terminal in the container's /dev/pts, send its master end to connection.

    With `mounted` it is put on /dev/console; `carried` is one that krun itself carries to its
    caller's terminal.

    Returns the slave end.  It is got by TIOCGPTPEER from the master, so no path of the container
    is opened for it (CVE-2025-52565).
    """
    try:
        pts = open_in_root(root, "/dev/pts", os.O_PATH | os.O_DIRECTORY)
    except OSError as error:
        text = "process.terminal needs a devpts mount on /dev/pts"
        raise KrunError(text) from error
    try:
        if filesystem_type(pts) != k.DEVPTS_SUPER_MAGIC:
            raise KrunError("process.terminal: /dev/pts is not a devpts mount")
        master = openat2(pts, "ptmx", os.O_RDWR | os.O_NOCTTY, k.RESOLVE_BENEATH)
    finally:
        os.close(pts)
    slave = open_slave(master, size)
    if carried:
        keep_newlines(slave)
    if mounted:
        _mount_console(root, slave)
    send_descriptor(connection, master, b"/dev/ptmx")
    os.close(master)
    return slave


def open_slave(master: int, size: tuple[int, int] | None) -> int:
    """Unlock a terminal, set its size, and return its slave end."""
    syscall(k.SYS_ioctl, master, k.TIOCSPTLCK, (0).to_bytes(4, "little"))
    slave = syscall(k.SYS_ioctl, master, k.TIOCGPTPEER, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    if size is not None:
        set_size(slave, *size)
    return slave


def keep_newlines(fd: int) -> None:
    """Stop a terminal from writing carriage returns: the one it is carried to adds its own."""
    # struct termios: four words of flags come first, the second is c_oflag.
    attributes = buffer(60)
    syscall(k.SYS_ioctl, fd, k.TCGETS, attributes)
    flags = int.from_bytes(bytes(attributes)[4:8], "little") & ~k.ONLCR
    attributes[4:8] = flags.to_bytes(4, "little")
    syscall(k.SYS_ioctl, fd, k.TCSETS, attributes)


def set_size(fd: int, height: int, width: int) -> None:
    """Set the window size (ioctl_tty(2))."""
    pair = height.to_bytes(2, "little") + width.to_bytes(2, "little")
    syscall(k.SYS_ioctl, fd, k.TIOCSWINSZ, pair + bytes(4))


def _mount_console(root: int, slave: int) -> None:
    """Bind the terminal to /dev/console by descriptor."""
    target = make_file(root, "/dev/console")
    tree = open_tree_at(slave, path="/dev/console")
    move_mount(tree, target, "/dev/console")
    os.close(tree)
    os.close(target)
