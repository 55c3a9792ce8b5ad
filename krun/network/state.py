"""Where networks are recorded, and who owns each record.

    lock                        flock: taken to take a record away from its owner
    leases.json, leases.lock    address → member (krun.network.leases)
    networks/NAME.json          networks defined on first use
    netns/MEMBER                the network namespace, bind-mounted
    making/MEMBER/              being made by the process that its `owner` names
    pool/KEY/MEMBER/            ready, waiting for a container
    containers/ROOT/ID/MEMBER/  in use by container ID of the state root ROOT
    dying/MEMBER/               being taken down

A member is one namespace with its interfaces and addresses; its directory moves down this list
by rename(2) alone, so at any moment it is in one place and exactly one process can claim it.
Whatever carries a member's name (a lease, a mount, a veth, a rule) and is in none of the four
places is left over from a kill, and `gc` removes it.

All of it is in /run: a reboot takes the records away together with what they record.
"""

from __future__ import annotations

import errno
import fcntl
import os
import sys

from krun import host, jsontext
from krun.errors import KrunError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

# Networks that the host's administrator defined; they survive a reboot.
DEFINITIONS = "/etc/krun/networks"
OWNER = "owner"
RECORD = "member.json"
# Present in a member's directory from before its first nftables element.
RULES = "rules"
# Host ends of veths: LINK + member.
LINK = "krun"
MEMBER_CHARACTERS = 8


def directory() -> str:
    """Return the host's directory, /run/krun-network; an ordinary user's is in XDG_RUNTIME_DIR."""
    return f"{host.default_root()}-network"


def own_command(arguments: list[str]) -> list[str]:
    """Return a command line that runs this krun, whatever started it."""
    code = (
        "import sys; sys.path[:] = sys.argv.pop(1).split(':');"
        "from krun.__main__ import console; console()"
    )
    return [sys.executable, "-I", "-S", "-c", code, ":".join(sys.path), *arguments]


def is_member(name: str) -> bool:
    """Whether a directory entry is the name of a member."""
    return len(name) == MEMBER_CHARACTERS and all(c in "0123456789abcdef" for c in name)


def new_member() -> str:
    """Return a name that nothing else has."""
    return os.urandom(MEMBER_CHARACTERS // 2).hex()


def member_of_link(device: str) -> str:
    """Return the member whose host end the device is; "" for any other device."""
    member = device[len(LINK) : len(LINK) + MEMBER_CHARACTERS]
    rest = device[len(LINK) + MEMBER_CHARACTERS :]
    named = device.startswith(LINK) and is_member(member) and (not rest or rest[0] == "-")
    return member if named else ""


def quote(root: str) -> str:
    """Return a state root as one directory name."""
    name = root.replace("%", "%25").replace("/", "%2F")
    if len(name.encode()) > 255:
        raise KrunError(f"--root {root} is too long for a container with a network")
    return name


def unquote(name: str) -> str:
    """Return the state root of quote(root)."""
    return name.replace("%2F", "/").replace("%25", "%")


def container(state: str, root: str, id: str) -> str:
    """Return the directory of one container's network."""
    return f"{state}/containers/{quote(os.path.abspath(root))}/{id}"


def identity(pid: int) -> str:
    """Return PID:START of a process, "" when it is gone; START is in clock ticks (proc(5))."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            stat = file.read()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    # The command, in parentheses, may contain anything; the fields after it are fixed.
    fields = stat[stat.rindex(b")") + 2 :].split()
    return "" if fields[0] in (b"Z", b"X") else f"{pid}:{fields[19].decode()}"


def owner_of(path: str) -> str:
    """Return the identity of the process that made a record directory, "" for none yet."""
    try:
        return os.readlink(f"{path}/{OWNER}")
    except OSError:
        return ""


def owned_by_living(path: str) -> bool:
    """Whether the process that made the record directory still runs."""
    owner = owner_of(path)
    pid = owner.partition(":")[0]
    return pid.isdigit() and identity(int(pid)) == owner


def make_owned(path: str) -> None:
    """Make a record directory owned by this process; raises FileExistsError.

    `gc` may remove the directory while it is still empty; then it is made again.  One without an
    owner is therefore always empty.
    """
    me = identity(os.getpid())
    while True:
        try:
            os.mkdir(path, 0o755)
        except FileNotFoundError:
            os.makedirs(os.path.dirname(path), 0o755, exist_ok=True)
            continue
        try:
            os.symlink(me, f"{path}/{OWNER}")
        except FileNotFoundError:
            continue
        return


class Lock:
    """An flock(2) on a file, which the kernel drops when its holder dies."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._fd = -1

    def _open(self) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        try:
            self._fd = os.open(self._path, flags, 0o600)
        except FileNotFoundError:
            os.makedirs(os.path.dirname(self._path), 0o755, exist_ok=True)
            self._fd = os.open(self._path, flags, 0o600)

    def __enter__(self) -> Lock:
        self._open()
        fcntl.flock(self._fd, fcntl.LOCK_EX)
        return self

    def taken(self) -> bool:
        """Take the lock unless another holds it; return whether it is now ours."""
        self._open()
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._fd)
            return False
        return True

    def release(self) -> None:
        """Let another have the lock."""
        os.close(self._fd)

    def __exit__(self, *_: object) -> None:
        self.release()


def read(path: str) -> Any:
    """Return a JSON file's value, None when there is no such file."""
    try:
        with open(path, "rb") as file:
            text = file.read()
    except FileNotFoundError:
        return None
    try:
        return jsontext.loads(text)
    except ValueError as error:
        raise KrunError(f"{path}: {error}", "it was not written by krun") from None


def write(path: str, text: str, mode: int = 0o644) -> None:
    """Replace a file as a whole: a crash leaves the old one or the new one.

    One process at a time may write a path; what writes holds a lock or owns the directory.
    """
    temporary = f"{path}.new"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
    try:
        try:
            rest = memoryview(text.encode("utf-8"))
            # A full file system takes a part of it before it fails.
            while rest:
                rest = rest[os.write(fd, rest) :]
            os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def entries(path: str) -> list[str]:
    """Return the names in a directory, none when it is not there."""
    try:
        return os.listdir(path)
    except (FileNotFoundError, NotADirectoryError):
        return []


def inode(path: str) -> int:
    """Return the number of the namespace that is mounted on path, 0 when none is."""
    try:
        return os.stat(path).st_ino
    except FileNotFoundError:
        return 0


def remove_tree(path: str) -> None:
    """Remove a record directory (files only, the owner last); gone already is fine."""
    for name in sorted(entries(path), key=OWNER.__eq__):
        try:
            os.unlink(f"{path}/{name}")
        except FileNotFoundError:
            pass
    remove_empty(path)


def remove_empty(path: str) -> None:
    """Remove a directory unless something is in it."""
    try:
        os.rmdir(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        if error.errno != errno.ENOTEMPTY:
            raise


def move(source: str, target: str) -> bool:
    """Rename a record directory; False when another process was first."""
    try:
        os.rename(source, target)
    except FileNotFoundError:
        return False
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return False
        raise
    return True


def bury(directory: str, place: str, member: str) -> bool:
    """Move a member's record to dying/; False when another process was first."""
    os.makedirs(f"{directory}/dying", 0o755, exist_ok=True)
    return move(place, f"{directory}/dying/{member}")


def containers(state: str) -> Iterator[tuple[str, str]]:
    """Yield (root, id) of every container that has a network."""
    for name in entries(f"{state}/containers"):
        for id in entries(f"{state}/containers/{name}"):
            yield unquote(name), id


def members(state: str) -> dict[str, str]:
    """Return every member's name and its directory.

    Places are read in the order in which members move, so that one that moves meanwhile is seen
    at least once.
    """
    found: dict[str, str] = {}
    for member in entries(f"{state}/making"):
        found[member] = f"{state}/making/{member}"
    for key in entries(f"{state}/pool"):
        for member in entries(f"{state}/pool/{key}"):
            if is_member(member):
                found[member] = f"{state}/pool/{key}/{member}"
    for root, id in containers(state):
        path = container(state, root, id)
        for member in entries(path):
            if is_member(member):
                found[member] = f"{path}/{member}"
    for member in entries(f"{state}/dying"):
        found[member] = f"{state}/dying/{member}"
    return found
