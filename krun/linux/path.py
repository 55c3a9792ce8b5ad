"""Paths below a hostile root filesystem: resolved by openat2 alone, made and used by descriptor.

No path string below the root is ever looked up twice: what is checked is a descriptor, and what
is acted on is the same descriptor (CVE-2021-30465, CVE-2024-45310).
"""

from __future__ import annotations

import errno
import os
from stat import S_ISDIR

from krun.linux.flags import RESOLVE_IN_ROOT, RESOLVE_NO_MAGICLINKS
from krun.linux.libc import openat2

IN_ROOT = RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS

# As many symbolic links as the kernel follows in one lookup (path_resolution(7)).
MAX_LINKS = 40


def open_in_root(root: int, path: str, flags: int = os.O_PATH) -> int:
    """Open path as a process with its root directory at the descriptor root would see it."""
    return openat2(root, path.lstrip("/") or ".", flags, IN_ROOT)


def make_directories(root: int, path: str, mode: int = 0o755) -> int:
    """Return an O_PATH descriptor of the directory path in root; makes what is missing.

    A symbolic link on the way is followed inside root; one that dangles gets its target made
    there, as runc and crun do.
    """
    try:
        return open_in_root(root, path, os.O_PATH | os.O_DIRECTORY)
    except FileNotFoundError:
        pass
    return _walk(root, path, mode, MAX_LINKS)


def _walk(root: int, path: str, mode: int, links: int) -> int:
    """Make the missing directories of path one component at a time."""
    done = ""
    parts = [part for part in path.split("/") if part and part != "."]
    directory = open_in_root(root, "/", os.O_PATH | os.O_DIRECTORY)
    for part in parts:
        # ".." is left to the kernel's own resolution inside root.
        done += "/" + part
        try:
            below = open_in_root(root, done, os.O_PATH | os.O_DIRECTORY)
        except FileNotFoundError:
            target = _readlink(directory, part)
            if target is not None:
                if not links:
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path) from None
                where = target if target[:1] == "/" else done[: -len(part)] + target
                os.close(_walk(root, where, mode, links - 1))
            elif part == "..":
                raise
            else:
                try:
                    os.mkdir(part, mode, dir_fd=directory)
                except FileExistsError:
                    pass
            below = open_in_root(root, done, os.O_PATH | os.O_DIRECTORY)
        os.close(directory)
        directory = below
    return directory


def _readlink(directory: int, name: str) -> str | None:
    try:
        return os.readlink(name, dir_fd=directory)
    except OSError:
        return None


def make_file(root: int, path: str, mode: int = 0o644) -> int:
    """Return an O_PATH descriptor of the non-directory path in root; makes an empty file."""
    try:
        return open_in_root(root, path)
    except FileNotFoundError:
        pass
    parent, _, name = path.rstrip("/").rpartition("/")
    directory = make_directories(root, parent or "/")
    try:
        target = _readlink(directory, name)
        if target is None:
            # O_NOFOLLOW and O_EXCL: a link put here meanwhile is refused, not followed.
            flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
            try:
                os.close(os.open(name, flags, mode, dir_fd=directory))
            except FileExistsError:
                pass
    finally:
        os.close(directory)
    if target is not None:
        where = target if target[:1] == "/" else f"{parent}/{target}"
        return make_file(root, where, mode)
    return open_in_root(root, path)


def is_directory(fd: int) -> bool:
    """Tell whether the descriptor is a directory."""
    return S_ISDIR(os.fstat(fd).st_mode)
