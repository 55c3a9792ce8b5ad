"""Mounts by descriptor: the file-descriptor mount interface of Linux 5.12 and later.

fsopen(2), fsmount(2), open_tree(2), mount_setattr(2) and move_mount(2) take descriptors from end
to end, so nothing the container's files say between two calls can change what is mounted where.
"""

from __future__ import annotations

import os

from krun.linux.flags import (
    AT_EMPTY_PATH,
    AT_FDCWD,
    AT_RECURSIVE,
    AT_SYMLINK_NOFOLLOW,
    FSCONFIG_CMD_CREATE,
    FSCONFIG_CMD_RECONFIGURE,
    FSCONFIG_SET_FLAG,
    FSCONFIG_SET_STRING,
    FSMOUNT_CLOEXEC,
    FSOPEN_CLOEXEC,
    FSPICK_CLOEXEC,
    FSPICK_EMPTY_PATH,
    MNT_DETACH,
    MOVE_MOUNT_F_EMPTY_PATH,
    MOVE_MOUNT_T_EMPTY_PATH,
    OPEN_TREE_CLOEXEC,
    OPEN_TREE_CLONE,
    SYS_fsconfig,
    SYS_fsmount,
    SYS_fsopen,
    SYS_fspick,
    SYS_fstatfs,
    SYS_mount,
    SYS_mount_setattr,
    SYS_move_mount,
    SYS_open_tree,
    SYS_pivot_root,
    SYS_umount2,
)
from krun.linux.libc import buffer, syscall


def open_tree(path: str, recursive: bool = False, nofollow: bool = False) -> int:
    """Return a detached copy of the mount at path (mount --bind), or of its whole tree."""
    flags = OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC
    if recursive:
        flags |= AT_RECURSIVE
    if nofollow:
        flags |= AT_SYMLINK_NOFOLLOW
    return syscall(SYS_open_tree, AT_FDCWD, os.fsencode(path), flags, path=path)


def open_tree_at(fd: int, recursive: bool = False, path: str = "") -> int:
    """Return a detached copy of the mount of what fd is; path is for errors."""
    flags = OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | AT_EMPTY_PATH
    if recursive:
        flags |= AT_RECURSIVE
    return syscall(SYS_open_tree, fd, b"", flags, path=path)


def move_mount(tree: int, target: int, path: str = "") -> None:
    """Attach the detached mount `tree` on the file that the descriptor target is."""
    flags = MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH
    syscall(SYS_move_mount, tree, b"", target, b"", flags, path=path)


def mount_setattr(
    tree: int,
    set_: int = 0,
    clear: int = 0,
    *,
    propagation: int = 0,
    userns: int = 0,
    recursive: bool = False,
    path: str = "",
) -> None:
    """Change the attributes of a mount, or of all mounts below it."""
    attributes = (
        set_.to_bytes(8, "little")
        + clear.to_bytes(8, "little")
        + propagation.to_bytes(8, "little")
        + userns.to_bytes(8, "little")
    )
    flags = AT_EMPTY_PATH | (AT_RECURSIVE if recursive else 0)
    syscall(SYS_mount_setattr, tree, b"", flags, attributes, 32, path=path)


def filesystem(
    fstype: str,
    source: str,
    options: tuple[tuple[str, str | None], ...],
    attributes: int,
    path: str,
) -> int:
    """Return a detached mount of a new file system; path is for errors.

    Options are (name, value) pairs; None as value makes the option a flag.
    """
    fs = syscall(SYS_fsopen, fstype.encode(), FSOPEN_CLOEXEC, path=path)
    try:
        if source:
            options = (("source", source), *options)
        _configure(fs, options, FSCONFIG_CMD_CREATE, path)
        return syscall(SYS_fsmount, fs, FSMOUNT_CLOEXEC, attributes, path=path)
    finally:
        os.close(fs)


def reconfigure(tree: int, options: tuple[tuple[str, str | None], ...], path: str) -> None:
    """Change options of the file system that is mounted at tree (mount -o remount)."""
    fs = syscall(SYS_fspick, tree, b"", FSPICK_CLOEXEC | FSPICK_EMPTY_PATH, path=path)
    try:
        _configure(fs, options, FSCONFIG_CMD_RECONFIGURE, path)
    finally:
        os.close(fs)


def _configure(
    fs: int, options: tuple[tuple[str, str | None], ...], command: int, path: str
) -> None:
    """Tell a file system context its options and the command; errors say what the kernel says."""
    try:
        for name, value in options:
            if value is None:
                _set(fs, FSCONFIG_SET_FLAG, name.encode(), None)
            else:
                _set(fs, FSCONFIG_SET_STRING, name.encode(), os.fsencode(value))
        syscall(SYS_fsconfig, fs, command, None, None, 0)
    except OSError as error:
        said = _messages(fs)
        text = f"{os.strerror(error.errno or 0)}: {said}" if said else error.strerror
        raise OSError(error.errno, text, path) from None


def _set(fs: int, command: int, name: bytes, value: bytes | None) -> None:
    syscall(SYS_fsconfig, fs, command, name, value, 0)


def _messages(fs: int) -> str:
    """Return what the kernel logged to the file system context (one "e text" a read)."""
    said: list[str] = []
    while True:
        try:
            line = os.read(fs, 512)
        except OSError:
            return "; ".join(said)
        if not line:
            return "; ".join(said)
        said.append(line.decode("utf-8", "replace").strip()[2:])


def mount(source: str, target: str, fstype: str, flags: int, data: str = "") -> None:
    """mount(2), for what has no descriptor form: propagation and MS_MOVE of the root."""
    syscall(
        SYS_mount,
        os.fsencode(source),
        os.fsencode(target),
        fstype.encode() or None,
        flags,
        data.encode() or None,
        path=target,
    )


def umount2(target: str, flags: int = MNT_DETACH) -> None:
    """umount2(2)."""
    syscall(SYS_umount2, os.fsencode(target), flags, path=target)


def pivot_root(new_root: str, put_old: str) -> None:
    """pivot_root(2)."""
    syscall(SYS_pivot_root, os.fsencode(new_root), os.fsencode(put_old), path=new_root)


def filesystem_type(fd: int) -> int:
    """Return the magic number of the file system of fd (fstatfs(2))."""
    answer = buffer(256)
    syscall(SYS_fstatfs, fd, answer)
    return int.from_bytes(bytes(answer)[:8], "little")
