"""The container's root: a mount of its own, and the change to it (pivot_root(2), MS_MOVE)."""

from __future__ import annotations

import errno
import os

from krun.linux import flags as k
from krun.linux.mount import (
    mount,
    mount_setattr,
    move_mount,
    open_tree,
    pivot_root,
    umount2,
)
from krun.linux.namespaces import enter_root, setns
from krun.linux.proc import read

TYPE_CHECKING = False
if TYPE_CHECKING:
    from krun.plan.model import Plan
    from krun.trees import Trees


def root_filesystem(plan: Plan, trees: Trees) -> int:
    """Make the root filesystem a mount of its own; returns its descriptor."""
    mount("", "/", "", plan.root_propagation or k.MS_SLAVE | k.MS_REC)
    if plan.root_propagation & (k.MS_SHARED | k.MS_UNBINDABLE):
        # pivot_root refuses a new root whose parent mount is shared.
        _make_parent_private(plan.rootfs)
    tree = trees.root
    if tree == -1:
        tree = open_tree(plan.rootfs, recursive=True)
    elif not plan.root_propagation & k.MS_SHARED:
        mount_setattr(tree, propagation=k.MS_SLAVE, recursive=True, path=plan.rootfs)
    try:
        place = os.open(plan.rootfs, os.O_PATH | os.O_CLOEXEC)
    except PermissionError:
        # The way to the root is closed to the container's ids; any place will do until
        # pivot_root makes it the root.
        place = os.open("/", os.O_PATH | os.O_CLOEXEC)
    move_mount(tree, place, plan.rootfs)
    os.close(place)
    return tree


def _make_parent_private(path: str) -> None:
    """Make the mount that path is on private."""
    while True:
        try:
            mount("", path, "", k.MS_PRIVATE)
            return
        except OSError as error:
            if error.errno != errno.EINVAL or path == "/":
                raise
            path = os.path.dirname(path)


def change_root(root: int, no_pivot: bool) -> None:
    """Make root the root directory and drop the host's tree."""
    os.fchdir(root)
    if no_pivot:
        _move_root(root)
        return
    try:
        # pivot_root(2), "pivot_root(".", ".")": the old root lands on top of the new one.
        pivot_root(".", ".")
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        # The caller's root is a ramdisk, which cannot be pivoted away.
        _move_root(root)
        return
    umount2(".", k.MNT_DETACH)
    os.chdir("/")


def propagate_root(plan: Plan) -> None:
    """Give the root the propagation asked for, where pivot_root(2) and the like took another."""
    if plan.root_propagation & (k.MS_SHARED | k.MS_UNBINDABLE):
        mount("", "/", "", plan.root_propagation)


def return_to(host: int) -> None:
    """Go back to the mount namespace `host`, with a detached copy of this root as the root.

    The copy stays as a whole for as long as a process has its root in it (fput of an open_tree
    descriptor unmounts it with UMOUNT_CONNECTED).  It has no parent: `..` leads nowhere.
    """
    tree = open_tree("/", recursive=True)
    setns(host, k.CLONE_NEWNS)
    os.close(host)
    enter_root(tree)


def _move_root(root: int) -> None:
    """Move root to / and stay in it; the host's tree stays below, without its proc and sysfs.

    A full view of either anywhere in the mount namespace would let a user namespace in the
    container mount its own, which no mask covers (user_namespaces(7)).
    """
    for path in reversed(_full_views(root)):
        try:
            umount2(path, k.MNT_DETACH)
        except OSError:
            # Locked by a user namespace: covered, it is not full any more.
            mount("tmpfs", path, "tmpfs", k.MS_RDONLY)
    mount(".", "/", "", k.MS_MOVE)
    os.chroot(".")
    os.chdir("/")


def _full_views(root: int) -> list[str]:
    """Return where proc and sysfs are mounted outside of the mount of root and those below it."""
    lines = [line.split(" - ") for line in read("/proc/self/mountinfo").splitlines()]
    fields = read(f"/proc/self/fdinfo/{root}").split()
    own = {fields[fields.index("mnt_id:") + 1]}
    found = []
    for mounted, filesystem_ in lines:
        number, parent, _, top, path = mounted.split(" ")[:5]
        if number in own or parent in own:
            own.add(number)
        elif top == "/" and filesystem_.split(" ")[0] in ("proc", "sysfs"):
            # Spaces and the like are octal escapes (proc_pid_mountinfo(5)).
            raw = os.fsencode(path).decode("unicode_escape").encode("latin-1")
            found.append(os.fsdecode(raw))
    return found
