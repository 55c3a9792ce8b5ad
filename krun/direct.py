"""Pin programs of the allow list: verified copies that the container cannot change.

A hash checked in one moment says nothing of the file that is executed in the next.  So what may
run without a VM is copied out while it is hashed, to a directory of the host named by the digest,
and that directory is mounted read-only into the container: the copy is what runs.
"""

from __future__ import annotations

import os
import stat

from krun import executable, host, view
from krun.errors import KrunError
from krun.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from krun.policy import Direct

_CHUNK = 1 << 20


class Pin(Record):
    """One verified entry of the list: `directory` holds the copy under `name`."""

    entry: Direct
    directory: str
    name: str


def matches(entry: Direct, paths: tuple[str, ...]) -> bool:
    """Return whether the entry is for a program that was asked for by one of paths."""
    if entry.path:
        return entry.path in paths
    import re

    return any(re.fullmatch(entry.pattern, path) for path in paths)


def store() -> str:
    """Return the directory of the copies."""
    return f"{host.state_home()}/direct"


def _read(source: int, into: int | None) -> str:
    """Return the SHA-256 of the open file source; copy it to the descriptor into, if any."""
    import hashlib

    digest = hashlib.sha256()
    offset = 0
    while chunk := os.pread(source, _CHUNK, offset):
        digest.update(chunk)
        offset += len(chunk)
        while into is not None and chunk:
            chunk = chunk[os.write(into, chunk) :]
    return digest.hexdigest()


def _copy(source: int, directory: str, name: str, sha256: str) -> bool:
    """Copy source below directory while hashing it; return whether it had that digest.

    The copy has no name until it is whole and right: a krun that is killed leaves nothing.
    """
    os.makedirs(directory, mode=0o755, exist_ok=True)
    fd = os.open(directory, os.O_WRONLY | os.O_TMPFILE | os.O_CLOEXEC, 0o555)
    try:
        if _read(source, fd) != sha256:
            return False
        os.fchmod(fd, 0o555)
        os.fsync(fd)
        try:
            # With a directory descriptor os.link is linkat(AT_SYMLINK_FOLLOW), without it link.
            os.link(f"/proc/self/fd/{fd}", f"{directory}/{name}", src_dir_fd=fd)
        except FileExistsError:
            pass  # another create was faster, with the same content
        return True
    finally:
        os.close(fd)


def pin(files: view.View, entry: Direct) -> tuple[Pin | None, str]:
    """Verify and copy the entry's program out of the container's files.

    Returns the pin, or None and why there is none.
    """
    target = entry.target or entry.path
    try:
        found = files.find(target)
    except (OSError, view.Unseen) as error:
        return None, f"{target}: {getattr(error, 'strerror', None) or 'cannot be seen'}"
    try:
        mode = os.fstat(found.fd).st_mode
        if not stat.S_ISREG(mode) or not mode & 0o111:
            return None, f"{target}: not an executable file"
        source = view.readable(found)
    finally:
        os.close(found.fd)
    try:
        program = executable.inspect(source)
        if program.kind != "elf":
            return None, f"{target}: only an ELF program can go without a VM"
        if program.dynamic and not entry.trust_image_libraries:
            return None, (
                f"{target}: dynamically linked, the image's own libraries would run without a "
                "VM too (trustImageLibraries allows it)"
            )
        name = os.path.basename(found.path)
        directory = f"{store()}/{entry.sha256}"
        if os.path.isfile(f"{directory}/{name}"):
            good = _read(source, None) == entry.sha256
        else:
            good = _copy(source, directory, name, entry.sha256)
    except OSError as error:
        raise KrunError(f"copying {target} to {store()}: {error.strerror}") from error
    finally:
        os.close(source)
    if not good:
        return None, f"{target}: its SHA-256 is not the listed one"
    return Pin(entry, directory, name), ""


def alias(directory: str, name: str, asked: str) -> None:
    """Let the pinned program be called by another name too (busybox goes by argv[0])."""
    if asked == name or not asked or "/" in asked or asked.startswith("."):
        return
    try:
        os.symlink(name, f"{directory}/{asked}")
    except FileExistsError:
        pass
