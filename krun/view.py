"""The container's files as they will be: the root file system with the bind mounts over it.

Before the container exists, the program that it will run may lie in a volume, behind links of a
hostile image.  The walk goes one component at a time from a descriptor of the root, never lets
the kernel follow a link, keeps `..` inside, and changes over to a mount's source where one of the
configuration's mounts lies on the path: one openat2(RESOLVE_IN_ROOT) can do all but the last.
"""

from __future__ import annotations

import errno
import os
import stat

from krun.record import Record

LINKS_MAX = 40  # path_resolution(7)
_DIR = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


class Unseen(Exception):
    """The path leads into a file system that exists only in the running container."""

    def __init__(self, path: str, fstype: str) -> None:
        super().__init__(path)
        self.path = path
        self.fstype = fstype


class Found(Record):
    """A file: its path without links, and an O_PATH descriptor that the caller closes."""

    path: str
    fd: int


class View:
    """The files of one container, for looking up its programs."""

    def __init__(self, root: str) -> None:
        """Raises OSError when root cannot be opened."""
        self._root = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self._over: dict[str, tuple[str, str]] = {}

    def close(self) -> None:
        """Close the root."""
        os.close(self._root)

    def __enter__(self) -> View:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def mount(self, destination: str, source: str, fstype: str) -> None:
        """Lay a mount over destination; without a source, what is below cannot be seen."""
        try:
            path = self._walk(destination, lenient=True).path
        except (OSError, Unseen):
            path = os.path.normpath(destination)
        for other in [o for o in self._over if o == path or o.startswith(path + "/")]:
            del self._over[other]
        self._over[path] = (source, fstype)

    def bare(self, name: str) -> bool:
        """Return whether the root itself holds a directory of that name; no mounts, no links."""
        return stat.S_ISDIR(os.stat(name, dir_fd=self._root, follow_symlinks=False).st_mode)

    def find(self, path: str) -> Found:
        """Resolve an absolute path; raises OSError (with the path) or Unseen."""
        return self._walk(path, lenient=False)

    def _enter(self, path: str, parent: int, name: str) -> int:
        over = self._over.get(path)
        if over is None:
            return os.open(name, _DIR, dir_fd=parent)
        source, fstype = over
        if not source:
            raise Unseen(path, fstype)
        return os.open(source, os.O_PATH | os.O_CLOEXEC)

    def _walk(self, path: str, lenient: bool) -> Found:
        """Walk path; lenient takes missing components as they are written."""
        todo = [part for part in reversed(path.split("/")) if part not in ("", ".")]
        stack: list[tuple[str, int]] = [("", self._root)]
        links = 0
        try:
            while todo:
                name = todo.pop()
                if name == "..":
                    if len(stack) > 1:
                        os.close(stack.pop()[1])
                    continue
                at, parent = stack[-1]
                child = f"{at}/{name}"
                try:
                    fd = self._enter(child, parent, name)
                except FileNotFoundError:
                    if not lenient:
                        raise
                    rest = "/".join([child, *reversed(todo)])
                    return Found(os.path.normpath(rest), -1)
                mode = os.fstat(fd).st_mode
                if stat.S_ISLNK(mode):
                    try:
                        target = os.readlink("", dir_fd=fd)
                    finally:
                        os.close(fd)
                    links += 1
                    if links > LINKS_MAX:
                        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
                    if target.startswith("/"):
                        while len(stack) > 1:
                            os.close(stack.pop()[1])
                    todo += [p for p in reversed(target.split("/")) if p not in ("", ".")]
                    continue
                if todo and not stat.S_ISDIR(mode):
                    os.close(fd)
                    raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
                stack.append((child, fd))
            at, fd = stack.pop() if len(stack) > 1 else ("/", os.dup(self._root))
            return Found(at, fd)
        except OSError as error:
            error.filename = path
            raise
        finally:
            for _, fd in stack[1:]:
                os.close(fd)


def readable(found: Found) -> int:
    """Reopen what was found for reading; raises OSError."""
    try:
        return os.open(f"/proc/self/fd/{found.fd}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        error.filename = found.path
        raise
