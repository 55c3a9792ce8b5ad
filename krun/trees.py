"""Detached mounts that create opens for the init process, where that may not."""

from __future__ import annotations

import os
from stat import S_ISFIFO

from krun.errors import KrunError
from krun.idmaps import user_namespace
from krun.linux import flags as k
from krun.linux import privileges, proc
from krun.linux.mount import mount_setattr, open_tree
from krun.linux.namespaces import setns
from krun.plan.devices import DEFAULT_DEVICES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from krun.plan.model import IdMap, Plan


class Trees:
    """Their descriptors: of the root, by number of the mount, by node."""

    def __init__(self) -> None:
        self.root = -1
        self.mounts: dict[int, int] = {}
        self.devices: dict[str, int] = {}


def open_trees(plan: Plan) -> Trees:
    """Open what only this process may: all sources for a user namespace, and idmapped mounts."""
    trees = Trees()
    user = plan.namespaces.listed & k.CLONE_NEWUSER and os.geteuid() == 0
    if user:
        trees.root = open_tree(plan.rootfs, recursive=True)
        trees.devices = _device_trees(plan)
    for number, one in enumerate(plan.mounts):
        if one.kind != "bind" or not (user or one.idmap):
            continue
        if one.copy_symlink and os.path.islink(one.source):
            continue
        try:
            tree = open_tree(one.source, one.recursive, one.source_nofollow)
        except OSError as error:
            text = f"mount {one.source} on {one.destination}: {error.strerror}"
            raise KrunError(text) from error
        if one.idmap is not None:
            _map_ids(tree, one.idmap, one.destination)
        trees.mounts[number] = tree
    return trees


def _device_trees(plan: Plan) -> dict[str, int]:
    """Make the nodes of the configuration for a new user namespace; the default ones are bound."""
    plain = {path for path, _, _ in DEFAULT_DEVICES}
    wanted = [one for one in plan.devices if one.path not in plain and not S_ISFIFO(one.mode)]
    if not wanted:
        return {}
    from krun import nodes

    namespaces = plan.namespaces
    maps = namespaces.uid_map, namespaces.gid_map
    for one in namespaces.join:
        if one.flag == k.CLONE_NEWUSER:
            maps = _id_maps(one.path)
    return nodes.make(wanted, maps)


def _id_maps(path: str) -> tuple[str, str]:
    """Return the mappings of the user namespace at path, as this process sees them."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise KrunError(f"namespace {path}: {error.strerror}") from error
    waits, goes = os.pipe()
    tells, told = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            # That namespace's root must not trace a process that has files of the host.
            privileges.set_dumpable(False)
            setns(fd, k.CLONE_NEWUSER, path)
            os.close(goes)
            os.write(told, b"R")
            os.read(waits, 1)
        finally:
            os._exit(0)
    for end in (fd, waits, told):
        os.close(end)
    try:
        if not os.read(tells, 1):
            raise KrunError(f"join namespace {path}: not a user namespace that can be joined")
        return proc.read(f"/proc/{pid}/uid_map"), proc.read(f"/proc/{pid}/gid_map")
    finally:
        os.close(tells)
        os.close(goes)
        os.waitpid(pid, 0)


def _map_ids(tree: int, idmap: IdMap, path: str) -> None:
    """Map the ids of a mount (mount_setattr(2), MOUNT_ATTR_IDMAP)."""
    userns = user_namespace(idmap.uid_map, idmap.gid_map)
    try:
        mount_setattr(tree, k.MOUNT_ATTR_IDMAP, userns=userns, recursive=idmap.recursive, path=path)
    except OSError as error:
        text = f"mount on {path}: id mapping: {error.strerror}"
        raise KrunError(text, "the file system may not support idmapped mounts") from error
    finally:
        os.close(userns)


def close_trees(trees: Trees) -> None:
    """Close the descriptors: init has its own."""
    for fd in (trees.root, *trees.mounts.values(), *trees.devices.values()):
        if fd != -1:
            os.close(fd)
