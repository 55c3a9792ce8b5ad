"""Namespaces: clone, unshare, setns, and the id mappings of a user namespace."""

from __future__ import annotations

import os

from krun.linux.flags import (
    CLONE_INTO_CGROUP,
    CLONE_PARENT,
    SYS_clone,
    SYS_clone3,
    SYS_setns,
    SYS_unshare,
)
from krun.linux.libc import syscall
from krun.linux.proc import write

SIGCHLD = 17


def clone(flags: int, cgroup: int = -1) -> int:
    """Fork into new namespaces in one call: returns 0 in the child, its pid in the parent.

    os.fork and unshare would take two processes for a pid namespace.  libc's fork handlers do
    not run, which is sound only in a process with one thread, as krun is.  cgroup is a descriptor
    of a v2 cgroup to be born in (clone3(2), CLONE_INTO_CGROUP).
    """
    if cgroup == -1:
        return syscall(SYS_clone, flags | SIGCHLD, 0, 0, 0, 0)
    # A sibling (CLONE_PARENT) has its parent's signal, and clone3 refuses to be told one.
    signal = 0 if flags & CLONE_PARENT else SIGCHLD
    words = (flags | CLONE_INTO_CGROUP, 0, 0, 0, signal, 0, 0, 0, 0, 0, cgroup)
    arguments = b"".join(word.to_bytes(8, "little") for word in words)
    return syscall(SYS_clone3, arguments, len(arguments))


def unshare(flags: int) -> None:
    """unshare(2)."""
    syscall(SYS_unshare, flags)


def setns(fd: int, flags: int, path: str = "") -> None:
    """setns(2): join the namespace fd, or with a pidfd several of a process at once."""
    syscall(SYS_setns, fd, flags, path=path)


def enter_root(directory: int) -> None:
    """Make the directory of a descriptor the root and the working directory, and close it."""
    os.fchdir(directory)
    os.chroot(".")
    os.close(directory)


def write_id_maps(pid: int, uid_map: str, gid_map: str, deny_setgroups: bool) -> None:
    """Write /proc/PID/{uid_map,gid_map} (user_namespaces(7))."""
    if deny_setgroups:
        write(f"/proc/{pid}/setgroups", "deny")
    write(f"/proc/{pid}/gid_map", gid_map)
    write(f"/proc/{pid}/uid_map", uid_map)
