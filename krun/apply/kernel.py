"""What the container sees of the kernel: masked and read-only paths, sysctls, names, loopback."""

from __future__ import annotations

import errno
import os
from stat import S_ISCHR

from krun.errors import KrunError
from krun.linux import flags as k
from krun.linux.libc import openat2, syscall
from krun.linux.mount import (
    filesystem,
    filesystem_type,
    mount_setattr,
    move_mount,
    open_tree_at,
)
from krun.linux.path import is_directory, open_in_root

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from krun.plan.model import Plan

# A masked file keeps its device: a program that opens it reads nothing instead of failing.
_MASK = k.MOUNT_ATTR_RDONLY | k.MOUNT_ATTR_NOSUID | k.MOUNT_ATTR_NOEXEC


def _existing(root: int, paths: tuple[str, ...]) -> Iterator[tuple[str, int]]:
    """Open each path that there is below the root, in turn, for as long as it is looked at."""
    for path in paths:
        try:
            target = open_in_root(root, path)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EACCES):
                continue
            raise
        yield path, target
        os.close(target)


def mask_paths(root: int, paths: tuple[str, ...]) -> None:
    """Hide files behind the host's /dev/null and directories behind one empty tmpfs.

    What covers them comes from the host's own /dev/null, checked to be it, never from the
    container's /dev (CVE-2025-31133).
    """
    null = tmpfs = -1
    for path, target in _existing(root, paths):
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
    for path, target in _existing(root, paths):
        tree = open_tree_at(target, recursive=True, path=path)
        mount_setattr(tree, k.MOUNT_ATTR_RDONLY, path=path)
        move_mount(tree, target, path)
        os.close(tree)


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
