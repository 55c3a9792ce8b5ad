"""cgroup directories and their files: v1, v2 and the hybrid of both (cgroups(7)).

Here is what every use needs: where the hierarchies are, a container's directories in them, their
files and processes.  The rest is in a module for each job; its names are had from here, too:

    creation   making the directories          entry     processes that move in, or are born there
    limits     writing values                  freezer   freezing, thawing, what that holds up
    devices    which devices may be used       removal   killing the processes, removing
"""

from __future__ import annotations

import errno
import os

from krun.linux import proc
from krun.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from krun.linux.cgroupfs.creation import create as create
    from krun.linux.cgroupfs.devices import allow_devices as allow_devices
    from krun.linux.cgroupfs.entry import Door as Door
    from krun.linux.cgroupfs.entry import close_door as close_door
    from krun.linux.cgroupfs.entry import enter as enter
    from krun.linux.cgroupfs.entry import join as join
    from krun.linux.cgroupfs.entry import open_door as open_door
    from krun.linux.cgroupfs.freezer import PATIENCE as PATIENCE
    from krun.linux.cgroupfs.freezer import freeze as freeze
    from krun.linux.cgroupfs.freezer import freezer_file as freezer_file
    from krun.linux.cgroupfs.freezer import frozen as frozen
    from krun.linux.cgroupfs.freezer import let_die as let_die
    from krun.linux.cgroupfs.freezer import move_away as move_away
    from krun.linux.cgroupfs.freezer import read_from as read_from
    from krun.linux.cgroupfs.freezer import refuse_frozen as refuse_frozen
    from krun.linux.cgroupfs.freezer import thaw_to_die as thaw_to_die
    from krun.linux.cgroupfs.limits import apply as apply
    from krun.linux.cgroupfs.limits import give_realtime as give_realtime
    from krun.linux.cgroupfs.limits import oom_kills as oom_kills
    from krun.linux.cgroupfs.removal import kill as kill
    from krun.linux.cgroupfs.removal import remove_tree as remove_tree
else:
    _PARTS = {
        "creation": ("create",),
        "devices": ("allow_devices",),
        "entry": ("Door", "close_door", "enter", "join", "open_door"),
        "freezer": (
            "PATIENCE",
            "freeze",
            "freezer_file",
            "frozen",
            "let_die",
            "move_away",
            "read_from",
            "refuse_frozen",
            "thaw_to_die",
        ),
        "limits": ("apply", "give_realtime", "oom_kills"),
        "removal": ("kill", "remove_tree"),
    }

    def __getattr__(name):
        """Load the module of a name with its first use: a verb reads the code that it needs."""
        for part, names in _PARTS.items():
            if name in names:
                value = getattr(__import__(f"{__name__}.{part}", fromlist=(name,)), name)
                globals()[name] = value
                return value
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name)


ROOT = "/sys/fs/cgroup"

# Errors of a hierarchy that an unprivileged or nested krun may not write to.
DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)


class Hierarchy(Record):
    """One mounted hierarchy: its controllers, where it is, and the caller's own cgroup in it."""

    controllers: tuple[str, ...]
    mountpoint: str
    version: int
    own: str


class Directory(Record):
    """A container's directory in one hierarchy; `key` is what /proc/PID/cgroup calls it."""

    key: str
    path: str
    version: int


def version(root: str = ROOT) -> int:
    """Return 2 on a pure v2 machine, otherwise 1."""
    return 2 if os.path.exists(f"{root}/cgroup.controllers") else 1


def hierarchies(root: str = ROOT, own: str | None = None) -> tuple[Hierarchy, ...]:
    """Return the mounted hierarchies; `own` is the text of /proc/self/cgroup.

    Their usual places are tried before /proc/self/mountinfo, whose length grows with every
    container on the machine.
    """
    unified = version(root) == 2
    found = []
    for line in (read("/proc/self/cgroup") if own is None else own).splitlines():
        _, names, path = line.split(":", 2)
        if not names:
            place = root if unified else f"{root}/unified"
            if os.path.exists(f"{place}/cgroup.procs"):
                found.append(Hierarchy((), place, 2, path))
            continue
        if unified:
            continue
        directory = names.removeprefix("name=")
        place = f"{root}/{directory}"
        # An empty directory may stand there for a hierarchy that another mount namespace has.
        if not os.path.exists(f"{place}/cgroup.procs"):
            place = _mountpoint(names)
            if not place:
                continue
        found.append(Hierarchy(tuple(names.split(",")), place, 1, path))
    return tuple(found)


def _mountpoint(names: str) -> str:
    """Return where a v1 hierarchy is mounted, "" for nowhere."""
    wanted = set(names.split(","))
    for line in read("/proc/self/mountinfo").splitlines():
        mount, _, rest = line.partition(" - ")
        fstype, _, options = rest.split(" ", 2)
        if fstype == "cgroup" and wanted <= set(options.split(",")):
            return mount.split()[4]
    return ""


def directories(path: str, found: tuple[Hierarchy, ...]) -> tuple[Directory, ...]:
    """Return the directory of cgroup path in each hierarchy.

    A relative path is below the caller's own cgroup, on v2 beside it: a v2 cgroup with processes
    cannot have controllers below.
    """
    relative = not path.startswith("/")
    clean = os.path.normpath("/" + path).lstrip("/")
    answer = []
    for one in found:
        base = one.mountpoint
        if relative and one.own.startswith("/") and ".." not in one.own:
            own = os.path.dirname(one.own) if one.version == 2 else one.own
            base += own.rstrip("/")
        key = ",".join(one.controllers)
        answer.append(Directory(key, f"{base}/{clean}", one.version))
    return tuple(answer)


def read(path: str) -> str:
    """Return the text of a cgroup file; raises FileNotFoundError also for one that is going."""
    try:
        return proc.read(path)
    except OSError as error:
        if error.errno == errno.ENODEV:
            raise _gone(path) from None
        raise


def _gone(path: str) -> FileNotFoundError:
    """The error for a cgroup that was removed between open and read or write (ENODEV)."""
    return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)


def write(path: str, value: str) -> None:
    """Write one value to one cgroup file; raises OSError with the path and the value."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, value.encode())
    except OSError as error:
        # Of a block device that is not there, too.
        if error.errno == errno.ENODEV and not os.path.exists(path):
            raise _gone(path) from None
        raise OSError(error.errno, f"{error.strerror} (writing {value})", path) from None
    finally:
        os.close(fd)


def place_of(controller: str, places: tuple[Directory, ...]) -> str:
    """Return the directory that has the controller's files, "" for none."""
    for place in places:
        if place.version == 1 and controller in place.key.split(","):
            return place.path
    for place in places:
        if place.version == 2:
            return place.path
    return ""


def processes(path: str) -> list[int]:
    """Return the processes of a cgroup and of those below it."""
    pids: list[int] = []
    for directory in tree(path):
        try:
            pids += [int(line) for line in read(f"{directory}/cgroup.procs").split()]
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENODEV, errno.EOPNOTSUPP):
                raise
    return pids


def tree(path: str) -> Iterator[str]:
    """Yield a cgroup after those below it."""
    try:
        with os.scandir(path) as entries:
            below = [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
    except FileNotFoundError:
        return
    for directory in below:
        yield from tree(directory)
    yield path


def main_directory(places: tuple[Directory, ...]) -> str:
    """Return the directory that lists the container's processes best: v2, pids, or any."""
    for key in ("pids", "devices", "memory"):
        for place in places:
            if key in place.key.split(","):
                return place.path
    return places[0].path if places else ""
