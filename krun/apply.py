"""Act on a plan inside the new namespaces: mounts, /dev, masks, sysctls, the change of root.

Everything here runs in the init process while the host's tree is still its root.  The container's
root is a descriptor; every path below it goes through krun.linux.path.
"""

from __future__ import annotations

import errno
import os
from stat import S_IFMT, S_ISBLK, S_ISCHR

from krun.errors import KrunError
from krun.linux import flags as k
from krun.linux.libc import openat2, syscall
from krun.linux.mount import (
    filesystem,
    filesystem_type,
    mount,
    mount_setattr,
    move_mount,
    open_tree,
    open_tree_at,
    pivot_root,
    umount2,
)
from krun.linux.namespaces import enter_root, setns
from krun.linux.path import is_directory, make_directories, make_file, open_in_root
from krun.linux.proc import read

TYPE_CHECKING = False
if TYPE_CHECKING:
    from krun.linux.cgroupfs import Hierarchy
    from krun.plan.model import Device, Link, Mount, Plan

# Files of /proc that may be replaced one by one (lxcfs and the like do); anything else below
# /proc would let a volume stand for what the kernel says (CVE-2019-16884, CVE-2019-19921).
PROC_REPLACEABLE = (
    "/proc/cpuinfo",
    "/proc/diskstats",
    "/proc/meminfo",
    "/proc/stat",
    "/proc/swaps",
    "/proc/uptime",
    "/proc/loadavg",
    "/proc/slabinfo",
    "/proc/net/dev",
    "/proc/sys/kernel/ns_last_pid",
    "/proc/sys/crypto/fips_enabled",
)

# A masked file keeps its device: a program that opens it reads nothing instead of failing.
_MASK = k.MOUNT_ATTR_RDONLY | k.MOUNT_ATTR_NOSUID | k.MOUNT_ATTR_NOEXEC

# fsconfig(2) takes strings of this size, mount(2) a page.
_FSCONFIG_LIMIT = 255


class Trees:
    """Detached mounts that the parent opened: of the root, by number of the mount, by node."""

    def __init__(self) -> None:
        self.root = -1
        self.mounts: dict[int, int] = {}
        self.devices: dict[str, int] = {}


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
                tree = _cgroup(root, one, plan, cgroups, paths)
            else:
                tree = open_in_root(root, one.destination)
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
    _refuse_over_proc(one, target, tree)
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


def _refuse_over_proc(one: Mount, target: int, tree: int) -> None:
    """Refuse a mount that would stand for what procfs says, however its path was spelt."""
    if filesystem_type(target) == k.PROC_SUPER_MAGIC:
        if one.destination in PROC_REPLACEABLE:
            return
        if filesystem_type(tree) == k.PROC_SUPER_MAGIC:
            return
        raise KrunError(f"mount {one.source} on {one.destination}: it is inside /proc")
    if one.destination == "/proc" and filesystem_type(tree) != k.PROC_SUPER_MAGIC:
        raise KrunError(f"mount {one.source} on /proc: only procfs may be there")


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


def _cgroup(
    root: int, one: Mount, plan: Plan, found: tuple[Hierarchy, ...], paths: tuple[str, ...]
) -> int:
    target = make_directories(root, one.destination)
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


def mask_paths(root: int, paths: tuple[str, ...]) -> None:
    """Hide files behind the host's /dev/null and directories behind one empty tmpfs.

    What covers them comes from the host's own /dev/null, checked to be it, never from the
    container's /dev (CVE-2025-31133).
    """
    null = tmpfs = -1
    for path in paths:
        try:
            target = open_in_root(root, path)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EACCES):
                continue
            raise
        if is_directory(target):
            if tmpfs == -1:
                options = (("size", "0"), ("nr_inodes", "1"), ("mode", "755"))
                tmpfs = tree = filesystem("tmpfs", "tmpfs", options, k.MOUNT_ATTR_RDONLY, path)
            else:
                tree = open_tree_at(tmpfs, path=path)
        else:
            if null == -1:
                null = _null()
            tree = open_tree_at(null, path=path)
            mount_setattr(tree, _MASK, path=path)
        move_mount(tree, target, path)
        os.close(target)
        if tree != tmpfs:
            os.close(tree)
    for fd in (null, tmpfs):
        if fd != -1:
            os.close(fd)


def _null() -> int:
    fd = os.open("/dev/null", os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    found = os.fstat(fd)
    if not S_ISCHR(found.st_mode) or found.st_rdev != os.makedev(1, 3):
        raise KrunError("the host's /dev/null is not the null device")
    return fd


def make_readonly(root: int, paths: tuple[str, ...]) -> None:
    """Make paths read-only by binding each to itself."""
    for path in paths:
        try:
            target = open_in_root(root, path)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EACCES):
                continue
            raise
        tree = open_tree_at(target, recursive=True, path=path)
        mount_setattr(tree, k.MOUNT_ATTR_RDONLY, path=path)
        move_mount(tree, target, path)
        os.close(tree)
        os.close(target)


def write_sysctls(sysctls: tuple[tuple[str, str], ...]) -> None:
    """Write sysctls through the host's procfs, which the container cannot have replaced.

    /proc/sys shows the caller's own namespaces (CVE-2025-52881 misled writes to a fake /proc).
    """
    if not sysctls:
        return
    from krun.plan.checks import sysctl_path

    base = os.open("/proc/sys", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if filesystem_type(base) != k.PROC_SUPER_MAGIC:
            raise KrunError("the host's /proc/sys is not procfs")
        for name, value in sysctls:
            resolve = k.RESOLVE_BENEATH | k.RESOLVE_NO_SYMLINKS
            try:
                fd = openat2(base, sysctl_path(name), os.O_WRONLY, resolve)
                try:
                    os.write(fd, value.encode())
                finally:
                    os.close(fd)
            except OSError as error:
                text = f"sysctl {name}={value}: {error.strerror}"
                raise KrunError(text) from error
    finally:
        os.close(base)


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


def set_names(plan: Plan) -> None:
    """Set the host and domain name of the uts namespace."""
    if plan.hostname:
        name = plan.hostname.encode()
        syscall(k.SYS_sethostname, name, len(name))
    if plan.domainname:
        name = plan.domainname.encode()
        syscall(k.SYS_setdomainname, name, len(name))


def raise_loopback() -> None:
    """Set lo up, which begins down in a new network namespace (netdevice(7)); runc and crun do."""
    fd = syscall(k.SYS_socket, k.AF_UNIX, k.SOCK_DGRAM | os.O_CLOEXEC, 0)
    try:
        # struct ifreq: the name, then what the call is about.
        request = b"lo".ljust(16, b"\0") + (k.IFF_UP | k.IFF_RUNNING).to_bytes(24, "little")
        syscall(k.SYS_ioctl, fd, k.SIOCSIFFLAGS, request, path="lo")
    finally:
        os.close(fd)
