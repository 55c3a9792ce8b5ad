"""Copy a directory of the image into the tmpfs that will cover it (tmpcopyup), by descriptor."""

from __future__ import annotations

import os
from stat import S_ISDIR, S_ISLNK, S_ISREG

_BLOCK = 1 << 20


def copy_up(source: int, target: int) -> None:
    """Copy the tree below the O_PATH directory source into the mount target.

    Links are copied, never followed; what is neither directory, file nor link is left out, as a
    device node of an image has no business in a tmpfs.
    """
    below = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=source)
    into = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=target)
    try:
        _copy_directory(below, into)
    finally:
        os.close(below)
        os.close(into)


def _copy_directory(source: int, target: int) -> None:
    for name in os.listdir(source):
        found = os.stat(name, dir_fd=source, follow_symlinks=False)
        if S_ISLNK(found.st_mode):
            os.symlink(os.readlink(name, dir_fd=source), name, dir_fd=target)
            os.chown(name, found.st_uid, found.st_gid, dir_fd=target, follow_symlinks=False)
        elif S_ISDIR(found.st_mode):
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
            os.mkdir(name, 0o700, dir_fd=target)
            below = os.open(name, flags, dir_fd=source)
            into = os.open(name, flags, dir_fd=target)
            try:
                _copy_directory(below, into)
                _copy_status(found, into)
            finally:
                os.close(below)
                os.close(into)
        elif S_ISREG(found.st_mode):
            _copy_file(source, target, name, found)


def _copy_file(source: int, target: int, name: str, found: os.stat_result) -> None:
    reader = os.open(
        name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=source
    )
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        writer = os.open(name, flags, 0o600, dir_fd=target)
        try:
            while data := os.read(reader, _BLOCK):
                while data:
                    data = data[os.write(writer, data) :]
            _copy_status(found, writer)
        finally:
            os.close(writer)
    finally:
        os.close(reader)


def _copy_status(found: os.stat_result, fd: int) -> None:
    os.fchown(fd, found.st_uid, found.st_gid)
    os.fchmod(fd, found.st_mode & 0o7777)
    os.utime(fd, ns=(found.st_atime_ns, found.st_mtime_ns))
