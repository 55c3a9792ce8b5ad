"""Device nodes for a new user namespace, where mknod(2) is not allowed: made outside of it."""

from __future__ import annotations

import os

from krun.linux import flags as k
from krun.linux.mount import filesystem, mount, move_mount, open_tree_at
from krun.linux.namespaces import clone
from krun.plan.namespaces import host_id

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from krun.plan.model import Device


def make(devices: Iterable[Device], maps: tuple[str, str]) -> dict[str, int]:
    """Return a detached mount of a new node for each device, by its path; maps are of uids, gids.

    A child makes them in a tmpfs that no other mount namespace sees.  It shares the table of
    descriptors, so what it opens is open here.  Where nodes may not be made there are none.
    """
    reader, writer = os.pipe()
    try:
        pid = clone(k.CLONE_NEWNS | k.CLONE_FILES)
        if pid == 0:
            try:
                trees = _make(devices, maps)
                os.write(writer, " ".join(map(str, trees)).encode())
            except OSError:
                os._exit(1)
            finally:
                os._exit(0)
        # Not before: closing here is closing there.
        os.waitpid(pid, 0)
        os.set_blocking(reader, False)
        try:
            numbers = os.read(reader, 1 << 16).split()
        except BlockingIOError:
            return {}
        return {one.path: int(fd) for one, fd in zip(devices, numbers, strict=False)}
    finally:
        os.close(reader)
        os.close(writer)


def _make(devices: Iterable[Device], maps: tuple[str, str]) -> list[int]:
    """Return the descriptors of the mounts, in order."""
    os.umask(0)
    mount("", "/", "", k.MS_PRIVATE | k.MS_REC)
    attributes = k.MOUNT_ATTR_NOSUID | k.MOUNT_ATTR_NOEXEC
    tmpfs = filesystem("tmpfs", "tmpfs", (("mode", "700"),), attributes, "/dev")
    # Only what is attached can be copied (before Linux 6.15).
    place = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        move_mount(tmpfs, place)
        return [_node(tmpfs, str(number), one, maps) for number, one in enumerate(devices)]
    finally:
        os.close(place)
        os.close(tmpfs)


def _node(directory: int, name: str, device: Device, maps: tuple[str, str]) -> int:
    """Return a detached mount of a new node."""
    uid, gid = (host_id(*one) for one in zip(maps, (device.uid, device.gid), strict=True))
    os.mknod(name, device.mode, os.makedev(device.major, device.minor), dir_fd=directory)
    os.chown(name, uid, gid, dir_fd=directory, follow_symlinks=False)
    fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    try:
        return open_tree_at(fd)
    finally:
        os.close(fd)
