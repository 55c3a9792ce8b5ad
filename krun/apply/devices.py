"""Nodes and links of /dev: made, or bind-mounted from the host where they cannot be made."""

from __future__ import annotations

import os
from stat import S_IFMT, S_ISBLK, S_ISCHR

from krun.errors import KrunError
from krun.linux import flags as k
from krun.linux.mount import (
    mount_setattr,
    move_mount,
    open_tree,
)
from krun.linux.path import make_directories, make_file

TYPE_CHECKING = False
if TYPE_CHECKING:
    from krun.plan.model import Device, Link


def make_devices(
    root: int, devices: tuple[Device, ...], links: tuple[Link, ...], made: dict[str, int]
) -> None:
    """Make device nodes and links.

    A node that may not be made here is mounted: one that was made outside, or the host's.
    """
    umask = os.umask(0)
    parents: dict[str, int] = {}
    try:
        for device in devices:
            parent, _, name = device.path.rpartition("/")
            directory = _parent(root, parent, parents)
            if not _make_device(device, directory, name):
                _mount_device(root, device, made.get(device.path, -1))
        for link in links:
            _make_link(link, _parent(root, os.path.dirname(link.path), parents))
    finally:
        os.umask(umask)
        for fd in parents.values():
            os.close(fd)


def _make_link(link: Link, directory: int) -> None:
    name = os.path.basename(link.path)
    if link.target == "/proc/kcore" and not os.path.exists(link.target):
        # Not every kernel has it, and a link to nothing helps nobody.
        return
    try:
        os.symlink(link.target, name, dir_fd=directory)
    except FileExistsError:
        if name != "ptmx":
            return
        # A multiplexer of another devpts would make terminals that are not in /dev/pts.
        os.unlink(name, dir_fd=directory)
        os.symlink(link.target, name, dir_fd=directory)
    except OSError as error:
        raise OSError(error.errno, error.strerror, link.path) from None


def _parent(root: int, path: str, known: dict[str, int]) -> int:
    fd = known.get(path)
    if fd is None:
        fd = known[path] = make_directories(root, path or "/")
    return fd


def _make_device(device: Device, directory: int, name: str) -> bool:
    """Make a node; returns whether that is allowed."""
    number = os.makedev(device.major, device.minor)
    try:
        os.mknod(name, device.mode, number, dir_fd=directory)
    except FileExistsError:
        found = os.stat(name, dir_fd=directory, follow_symlinks=False)
        same = S_IFMT(found.st_mode) == S_IFMT(device.mode) and found.st_rdev == number
        if not same and (S_ISCHR(device.mode) or S_ISBLK(device.mode)):
            # A file of the image at the place of a device is not taken for the device.
            raise KrunError(f"mknod {device.path}: another file is there") from None
        return True
    except PermissionError:
        return False
    except OSError as error:
        raise OSError(error.errno, error.strerror, device.path) from None
    if device.uid or device.gid:
        os.chown(name, device.uid, device.gid, dir_fd=directory, follow_symlinks=False)
    return True


def _mount_device(root: int, device: Device, tree: int) -> None:
    if tree == -1:
        tree = _host_device(device)
    target = make_file(root, device.path)
    move_mount(tree, target, device.path)
    os.close(target)
    os.close(tree)


def _host_device(device: Device) -> int:
    """Return a mount of the host's node: mknod is not allowed in a user namespace."""
    try:
        tree = open_tree(device.path)
    except FileNotFoundError as error:
        text = (
            f"mknod {device.path}: not allowed in a user namespace, and the host has no such node"
        )
        raise KrunError(text) from error
    found = os.fstat(tree)
    number = os.makedev(device.major, device.minor)
    if S_IFMT(found.st_mode) != S_IFMT(device.mode) or found.st_rdev != number:
        raise KrunError(f"bind {device.path}: the host has another file there")
    mount_setattr(tree, k.MOUNT_ATTR_NOSUID | k.MOUNT_ATTR_NOEXEC, path=device.path)
    return tree
