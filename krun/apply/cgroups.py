"""Mounts of type cgroup: one hierarchy or a tmpfs of them, as the machine has."""

from __future__ import annotations

import errno
import os

from krun.apply.procfs import refuse_inside_proc
from krun.linux import flags as k
from krun.linux.mount import (
    filesystem,
    mount_setattr,
    move_mount,
    open_tree,
)
from krun.linux.path import make_directories

TYPE_CHECKING = False
if TYPE_CHECKING:
    from krun.linux.cgroupfs import Hierarchy
    from krun.plan.model import Mount, Plan


def mount_cgroup(
    root: int, one: Mount, plan: Plan, found: tuple[Hierarchy, ...], paths: tuple[str, ...]
) -> int:
    target = make_directories(root, one.destination)
    refuse_inside_proc(one, target)
    unified = len(found) == 1 and found[0].version == 2
    private = plan.namespaces.listed & k.CLONE_NEWCGROUP
    if unified or one.fstype == "cgroup2":
        tree = _cgroup2(one, bool(private), paths[0] if unified and paths else "")
        move_mount(tree, target, one.destination)
        os.close(target)
        return tree
    attributes = one.set_ & ~k.MOUNT_ATTR_RDONLY
    tree = filesystem("tmpfs", "tmpfs", (("mode", "755"),), attributes, one.destination)
    move_mount(tree, target, one.destination)
    os.close(target)
    for hierarchy, path in zip(found, paths, strict=True):
        _cgroup_v1(tree, hierarchy, path, one, bool(private))
    if one.set_ & k.MOUNT_ATTR_RDONLY:
        mount_setattr(tree, k.MOUNT_ATTR_RDONLY)
    return tree


def _cgroup2(one: Mount, private: bool, path: str) -> int:
    """Return a mount of the unified hierarchy, rooted at the container's cgroup."""
    if private or not path:
        try:
            return filesystem("cgroup2", "cgroup", one.options, one.set_, one.destination)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EBUSY) or not path:
                raise
    tree = open_tree(path, recursive=True)
    mount_setattr(tree, one.set_ & ~k.MOUNT_ATTR__ATIME, recursive=True)
    return tree


def _cgroup_v1(tmpfs: int, hierarchy: Hierarchy, path: str, one: Mount, private: bool) -> None:
    """Mount one hierarchy below the tmpfs of /sys/fs/cgroup, with a link for each controller."""
    names = [name.removeprefix("name=") for name in hierarchy.controllers]
    directory = os.path.basename(hierarchy.mountpoint)
    try:
        if private and hierarchy.version == 1:
            options: tuple[tuple[str, str | None], ...] = tuple(
                ("name", name[5:]) if name.startswith("name=") else (name, None)
                for name in hierarchy.controllers
            )
            if hierarchy.controllers[0].startswith("name="):
                # A named hierarchy has no controllers, which mount must be told.
                options = (("none", None), *options)
            tree = filesystem("cgroup", "cgroup", options, one.set_, path)
        elif private:
            tree = filesystem("cgroup2", "cgroup", (), one.set_, path)
        else:
            if not path:
                return
            tree = open_tree(path)
            mount_setattr(tree, one.set_ & ~k.MOUNT_ATTR__ATIME)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENODEV):
            return
        raise
    os.mkdir(directory, 0o755, dir_fd=tmpfs)
    below = os.open(directory, os.O_PATH | os.O_CLOEXEC, dir_fd=tmpfs)
    move_mount(tree, below, path)
    os.close(below)
    os.close(tree)
    for name in names:
        if name != directory and hierarchy.version == 1 and len(names) > 1:
            os.symlink(directory, name, dir_fd=tmpfs)
