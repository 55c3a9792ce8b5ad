"""The mounts of a plan, made below the container's root by descriptor."""

from __future__ import annotations

import errno
import os

from krun.apply.cgroups import mount_cgroup
from krun.apply.procfs import refuse_inside_proc, refuse_over_proc
from krun.errors import KrunError
from krun.linux import flags as k
from krun.linux.libc import openat2
from krun.linux.mount import (
    filesystem,
    mount,
    mount_setattr,
    move_mount,
    open_tree,
    reconfigure,
)
from krun.linux.path import is_directory, make_directories, make_file, open_in_root

TYPE_CHECKING = False
if TYPE_CHECKING:
    from krun.linux.cgroupfs import Hierarchy
    from krun.plan.model import Mount, Plan
    from krun.trees import Trees


# fsconfig(2) takes strings of this size, mount(2) a page.
_FSCONFIG_LIMIT = 255


def attach_mounts(
    root: int, plan: Plan, trees: Trees, cgroups: tuple[Hierarchy, ...], paths: tuple[str, ...]
) -> None:
    """Make every mount of the plan, in order; read-only tmpfs last, so nodes can be made in it."""
    late = []
    for number, one in enumerate(plan.mounts):
        try:
            if one.kind == "bind":
                tree = _bind(root, one, trees.mounts.get(number, -1))
            elif one.kind == "filesystem":
                tree = _filesystem(root, one, plan)
            elif one.kind == "cgroup":
                tree = mount_cgroup(root, one, plan, cgroups, paths)
            else:
                tree = open_in_root(root, one.destination)
                if one.options:
                    reconfigure(tree, one.options, one.destination)
                mount_setattr(tree, one.set_, one.clear, path=one.destination)
        except OSError as error:
            raise _explained(one, error) from error
        for propagation in one.propagation:
            recursive = bool(propagation & k.MS_REC)
            mount_setattr(tree, propagation=propagation & ~k.MS_REC, recursive=recursive)
        if one.fstype == "tmpfs" and one.set_ & k.MOUNT_ATTR_RDONLY:
            late.append(tree)
        else:
            os.close(tree)
    trees.mounts = dict(enumerate(late))


def finish_mounts(root: int, plan: Plan, trees: Trees) -> None:
    """Make read-only what had to be writable until now."""
    for tree in trees.mounts.values():
        mount_setattr(tree, k.MOUNT_ATTR_RDONLY)
        os.close(tree)
    if plan.readonly:
        mount_setattr(root, k.MOUNT_ATTR_RDONLY, path=plan.rootfs)


def _explained(one: Mount, error: OSError) -> KrunError:
    what = one.fstype if one.kind != "bind" else one.source
    text = f"mount {what} on {one.destination}: {error.strerror}"
    if error.errno == errno.ENOENT and one.kind == "bind":
        text = f"mount {one.source} on {one.destination}: stat {error.filename}: {error.strerror}"
    return KrunError(text)


def _bind(root: int, one: Mount, tree: int) -> int:
    opened = tree == -1
    if opened:
        if one.copy_symlink and os.path.islink(one.source):
            return _copy_symlink(root, one)
        tree = open_tree(one.source, one.recursive, one.source_nofollow)
    else:
        mount_setattr(tree, propagation=k.MS_SLAVE, recursive=True)
    make = make_directories if is_directory(tree) else make_file
    target = make(root, one.destination)
    refuse_over_proc(one, target, tree)
    _set_attributes(tree, one)
    move_mount(tree, target, one.destination)
    os.close(target)
    return tree


def _copy_symlink(root: int, one: Mount) -> int:
    """Make the symbolic link itself instead of mounting what it names (crun)."""
    parent, _, name = one.destination.rpartition("/")
    directory = make_directories(root, parent or "/")
    try:
        os.symlink(os.readlink(one.source), name, dir_fd=directory)
    except FileExistsError:
        if os.readlink(name, dir_fd=directory) != os.readlink(one.source):
            raise
    return directory


def _set_attributes(tree: int, one: Mount) -> None:
    if one.set_ or one.clear:
        mount_setattr(tree, one.set_, one.clear, path=one.destination)
    if one.recursive_set or one.recursive_clear:
        mount_setattr(
            tree, one.recursive_set, one.recursive_clear, recursive=True, path=one.destination
        )


def _filesystem(root: int, one: Mount, plan: Plan) -> int:
    new = False
    if one.fstype in ("proc", "sysfs"):
        # A link in the image must not move procfs away from where masks and labels expect it.
        target = _real_directory(root, one)
    else:
        try:
            target = open_in_root(root, one.destination, os.O_PATH | os.O_DIRECTORY)
        except FileNotFoundError:
            target = make_directories(root, one.destination)
            new = True
    if one.destination == "/proc" and one.fstype != "proc":
        raise KrunError(f"mount {one.fstype} on /proc: only procfs may be there")
    refuse_inside_proc(one, target)
    options = one.options
    if plan.mount_label and one.fstype in ("tmpfs", "mqueue", "devpts", "overlay"):
        options = (*options, (plan.mount_context, plan.mount_label))
    attributes = one.set_
    if one.fstype == "tmpfs":
        attributes &= ~k.MOUNT_ATTR_RDONLY
        # One on a directory that was not there is the kernel's default, open to all (runc).
        if not new and not any(name == "mode" for name, _ in options):
            mode = os.fstat(target).st_mode & 0o7777
            options = (*options, ("mode", f"{mode:o}"))
    try:
        if any(value and len(value) > _FSCONFIG_LIMIT for _, value in options):
            _long_mount(one, options, attributes, target)
            os.close(target)
            return open_in_root(root, one.destination)
        tree = filesystem(one.fstype, one.source, options, attributes, one.destination)
    except OSError as error:
        tree = _replacement(one, error, plan)
    if one.copy_up:
        from krun.linux.copy import copy_up

        copy_up(target, tree)
    move_mount(tree, target, one.destination)
    os.close(target)
    if one.recursive_set or one.recursive_clear:
        mount_setattr(tree, one.recursive_set, one.recursive_clear, recursive=True)
    return tree


def _real_directory(root: int, one: Mount) -> int:
    flags = os.O_PATH | os.O_DIRECTORY
    resolve = k.RESOLVE_IN_ROOT | k.RESOLVE_NO_SYMLINKS
    try:
        try:
            return openat2(root, one.destination.lstrip("/"), flags, resolve)
        except FileNotFoundError:
            os.close(make_directories(root, one.destination))
            return openat2(root, one.destination.lstrip("/"), flags, resolve)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            # The end in runc's words.
            text = f"mount {one.fstype} on {one.destination}: must be mounted on ordinary directory"
            raise KrunError(text) from error
        raise


def _replacement(one: Mount, error: OSError, plan: Plan) -> int:
    """Return a copy of the host's mount where a user namespace may not make its own.

    The kernel allows new proc and sysfs only to the owner of the pid and network namespaces.
    """
    new = plan.namespaces.new
    if error.errno in (errno.EPERM, errno.EBUSY) and (
        (one.fstype == "sysfs" and not new & k.CLONE_NEWNET)
        or (one.fstype == "proc" and not new & k.CLONE_NEWPID)
        or (one.fstype == "mqueue" and not new & k.CLONE_NEWIPC)
    ):
        source = {"sysfs": "/sys", "proc": "/proc", "mqueue": "/dev/mqueue"}[one.fstype]
        tree = open_tree(source, recursive=True)
        mount_setattr(tree, one.set_ & ~k.MOUNT_ATTR__ATIME, recursive=True)
        return tree
    raise error


def _long_mount(
    one: Mount, options: tuple[tuple[str, str | None], ...], attributes: int, target: int
) -> None:
    """Mount through mount(2), whose options may be longer; the target stays a descriptor."""
    data = ",".join(name if value is None else f"{name}={value}" for name, value in options)
    # MS_RDONLY to MS_NOEXEC have the bits of their MOUNT_ATTR_*.
    flags = attributes & 0xF
    if attributes & k.MOUNT_ATTR__ATIME == k.MOUNT_ATTR_NOATIME:
        flags |= k.MS_NOATIME
    mount(one.source, f"/proc/self/fd/{target}", one.fstype, flags, data)
