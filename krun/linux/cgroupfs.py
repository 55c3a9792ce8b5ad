"""cgroup directories and their files: v1, v2 and the hybrid of both (cgroups(7))."""

from __future__ import annotations

import errno
import os
import time

from krun.errors import BadState, KrunError
from krun.linux import proc
from krun.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from krun.plan.model import Rule, Write

ROOT = "/sys/fs/cgroup"

# Seconds between two looks at whether who is waited for is frozen.
PATIENCE = 1

_PERIOD = "cpu.cfs_period_us"

# Errors of a hierarchy that an unprivileged or nested krun may not write to.
_DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)


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
        if error.errno == errno.ENODEV:
            raise _gone(path) from None
        raise OSError(error.errno, f"{error.strerror} (writing {value})", path) from None
    finally:
        os.close(fd)


def create(
    places: tuple[Directory, ...], tolerant: bool = False, *, scope: bool = False
) -> tuple[tuple[Directory, ...], tuple[Directory, ...]]:
    """Make the directories; return those that are there, and those made by this call.

    With tolerant, hierarchies that cannot be written to are left out (rootless).  A scope is there
    in some hierarchies already, with a process.
    """
    present: list[Directory] = []
    made: list[Directory] = []
    try:
        for place in places:
            try:
                if _make(place, scope):
                    made.append(place)
            except OSError as error:
                if tolerant and error.errno in _DENIED:
                    continue
                raise
            present.append(place)
    except BaseException:
        for place in made:
            remove_tree(place.path)
        raise
    return tuple(present), tuple(made)


def _make(place: Directory, scope: bool) -> bool:
    """Make one directory with its parents; returns False for one that was there already."""
    try:
        os.mkdir(place.path, 0o755)
    except FileExistsError:
        if scope and place.version == 2:
            # systemd does not know every controller.
            _delegate(place.path)
        if not scope and processes(place.path):
            text = f"the container's cgroup {place.path} is not empty"
            raise BadState(text, "another container may use the same cgroupsPath") from None
        return False
    except FileNotFoundError:
        _make_parent(os.path.dirname(place.path), place)
        try:
            os.mkdir(place.path, 0o755)
        except FileExistsError:
            return False
    try:
        if place.version == 2:
            _delegate(place.path)
        elif "cpuset" in place.key.split(","):
            _inherit_cpuset(place.path)
    except BaseException:
        os.rmdir(place.path)
        raise
    return True


def _make_parent(path: str, place: Directory) -> None:
    try:
        os.mkdir(path, 0o755)
    except FileNotFoundError:
        _make_parent(os.path.dirname(path), place)
        try:
            os.mkdir(path, 0o755)
        except FileExistsError:
            return
    except FileExistsError:
        return
    if place.version == 1 and "cpuset" in place.key.split(","):
        _inherit_cpuset(path)


def _inherit_cpuset(path: str) -> None:
    """Copy the parent's cpus and mems, without which a v1 cpuset takes no process.

    The parent may have been made by somebody who left its own empty.
    """
    for name in ("cpuset.cpus", "cpuset.mems"):
        if read(f"{path}/{name}").strip():
            continue
        parent = os.path.dirname(path)
        if not read(f"{parent}/{name}").strip():
            _inherit_cpuset(parent)
        write(f"{path}/{name}", read(f"{parent}/{name}").strip())


def _delegate(path: str) -> None:
    """Enable every controller on the way to a v2 cgroup; what cannot be is left out."""
    parts = []
    parent = os.path.dirname(path)
    while os.path.exists(f"{parent}/cgroup.subtree_control"):
        parts.append(parent)
        parent = os.path.dirname(parent)
    for directory in reversed(parts):
        try:
            wanted = set(read(f"{directory}/cgroup.controllers").split())
            wanted -= set(read(f"{directory}/cgroup.subtree_control").split())
        except OSError:
            continue
        for controller in sorted(wanted):
            try:
                write(f"{directory}/cgroup.subtree_control", f"+{controller}")
            except OSError:
                # The limit that needs this controller fails with its own error.
                continue


def place_of(controller: str, places: tuple[Directory, ...]) -> str:
    """Return the directory that has the controller's files, "" for none."""
    for place in places:
        if place.version == 1 and controller in place.key.split(","):
            return place.path
    for place in places:
        if place.version == 2:
            return place.path
    return ""


def apply(writes: tuple[Write, ...], places: tuple[Directory, ...], tolerant: bool = False) -> None:
    """Write the values of a plan; raises KrunError for a controller that is not there."""
    late: list[Write] = []
    for wanted in writes:
        one = wanted
        directory = place_of(one.controller, places)
        if one.controller == "hugetlb" and os.path.exists(f"{directory}/cgroup.controllers"):
            # On a hybrid machine this controller may be left to v2, which names the file so.
            one = one._replace(file=one.file.replace(".limit_in_bytes", ".max"))
        path = f"{directory}/{one.file}"
        try:
            if not directory:
                raise FileNotFoundError(errno.ENOENT, "no such controller", path)
            _write_limit(directory, one)
        except FileNotFoundError as error:
            if one.file in ("blkio.weight", "blkio.weight_device") or one.file.startswith(
                "io.bfq.weight"
            ):
                _write_weight(directory, one)
                continue
            if tolerant or one.value in ("max", "0"):
                continue
            text = f"cgroup: cannot set {one.file} to {one.value}"
            hint = f"the {one.controller} controller is not available"
            raise KrunError(text, hint) from error
        except OSError as error:
            if tolerant and error.errno in _DENIED:
                continue
            if one.file == _PERIOD and error.errno == errno.EINVAL and one is not writes[-1]:
                # With the old quota it is more than the cgroup above has: the new quota first.
                late.append(one)
                continue
            raise
    for one in late:
        _write_limit(place_of(one.controller, places), one)


def _write_limit(directory: str, one: Write) -> None:
    try:
        write(f"{directory}/{one.file}", one.value)
    except OSError as error:
        # v1 refuses a memory limit above the swap limit; -1 lifts the latter first (update).
        swap = f"{directory}/memory.memsw.limit_in_bytes"
        if (
            one.file != "memory.limit_in_bytes"
            or error.errno != errno.EINVAL
            or not os.path.exists(swap)
        ):
            raise
        write(swap, "-1")
        write(f"{directory}/{one.file}", one.value)


def _write_weight(directory: str, one: Write) -> None:
    """Write a block I/O weight where the scheduler in use has its file."""
    if one.controller == "blkio":
        names = (one.file.replace("blkio.weight", "blkio.bfq.weight"),)
        value = one.value
    else:
        names = ("io.weight",)
        # io.weight is 1 to 10000, the specification's weight 10 to 1000.
        device, _, weight = one.value.rpartition(" ")
        scaled = 1 + (int(weight) - 10) * 9999 // 990
        value = f"{device} {scaled}" if device else f"default {scaled}"
    for name in names:
        if directory and os.path.exists(f"{directory}/{name}"):
            write(f"{directory}/{name}", value)
            return
    # No I/O scheduler with weights: there is nothing to weigh.


def allow_devices(rules: tuple[Rule, ...], places: tuple[Directory, ...]) -> None:
    """Deny every device, then apply the rules: v1 files, or an eBPF program on v2."""
    for place in places:
        if place.version == 1 and "devices" in place.key.split(","):
            _write_device_rules(place.path, rules)
            return
    for place in places:
        if place.version == 2:
            from krun.linux import bpf

            bpf.attach_device_filter(place.path, rules)
            return


def device_line(rule: Rule) -> str:
    """Return a rule in the form of devices.allow."""
    if rule.kind == "a":
        return "a"
    major = "*" if rule.major == -1 else rule.major
    minor = "*" if rule.minor == -1 else rule.minor
    return f"{rule.kind} {major}:{minor} {rule.access}"


def _write_device_rules(path: str, rules: tuple[Rule, ...]) -> None:
    fds: dict[bool, int] = {}
    try:
        for allow, name in ((True, "devices.allow"), (False, "devices.deny")):
            fds[allow] = os.open(f"{path}/{name}", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fds[False], b"a")
            for rule in rules:
                os.write(fds[rule.allow], device_line(rule).encode())
        except OSError as error:
            raise OSError(error.errno, error.strerror, f"{path}/devices.allow") from None
    finally:
        for fd in fds.values():
            os.close(fd)


def join(pid: int, places: tuple[Directory, ...], tolerant: bool = False) -> None:
    """Move a process into the cgroup."""
    for place in places:
        try:
            write(f"{place.path}/cgroup.procs", str(pid))
        except OSError as error:
            if not (tolerant and error.errno in _DENIED):
                raise


class Door(Record):
    """A way into a cgroup for a process that is about to be born.

    Moving another process takes the lock of every fork on the machine, which waits for an RCU
    grace period: 15 ms here.  The kernel leaves that lock out for a thread that moves itself
    through the `tasks` file of v1, and for CLONE_INTO_CGROUP on v2.
    """

    tasks: tuple[int, ...]
    unified: int


def open_door(places: tuple[Directory, ...], tolerant: bool = False, *, born: bool = True) -> Door:
    """Open a cgroup for a process to be born; the files keep the rights of their opener.

    Unless it may be born in the v2 cgroup it moves itself there.
    """
    tasks = []
    unified = -1
    for place in places:
        try:
            if place.version == 2 and not born:
                tasks.append(os.open(f"{place.path}/cgroup.procs", os.O_WRONLY | os.O_CLOEXEC))
            elif place.version == 2:
                unified = os.open(place.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            else:
                tasks.append(os.open(f"{place.path}/tasks", os.O_WRONLY | os.O_CLOEXEC))
        except OSError as error:
            if not (tolerant and error.errno in _DENIED):
                raise
    return Door(tuple(tasks), unified)


def enter(door: Door) -> None:
    """Move the calling thread through the door; its descriptors are closed.

    Raises BadState when somebody has removed the cgroup meanwhile.
    """
    for fd in door.tasks:
        try:
            os.write(fd, b"0")
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENODEV):
                raise
            text = "the container's cgroup was removed while a process entered it"
            raise BadState(text, "does something else use the same cgroupsPath?") from error
        os.close(fd)
    if door.unified != -1:
        os.close(door.unified)


def close_door(door: Door) -> None:
    """Close the descriptors."""
    for fd in (*door.tasks, door.unified):
        if fd != -1:
            os.close(fd)


def processes(path: str) -> list[int]:
    """Return the processes of a cgroup and of those below it."""
    pids: list[int] = []
    for directory in _tree(path):
        try:
            pids += [int(line) for line in read(f"{directory}/cgroup.procs").split()]
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENODEV, errno.EOPNOTSUPP):
                raise
    return pids


def _tree(path: str) -> Iterator[str]:
    """Yield a cgroup after those below it."""
    try:
        with os.scandir(path) as entries:
            below = [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
    except FileNotFoundError:
        return
    for directory in below:
        yield from _tree(directory)
    yield path


def main_directory(places: tuple[Directory, ...]) -> str:
    """Return the directory that lists the container's processes best: v2, pids, or any."""
    for key in ("pids", "devices", "memory"):
        for place in places:
            if key in place.key.split(","):
                return place.path
    return places[0].path if places else ""


def kill(places: tuple[Directory, ...], number: int) -> None:
    """Send a signal to every process of the cgroup."""
    for place in places:
        if place.version == 2 and number == 9 and os.path.exists(f"{place.path}/cgroup.kill"):
            # Only where every process is surely in it: a hybrid v2 tree may lack the rest.
            try:
                write(f"{place.path}/cgroup.kill", "1")
            except FileNotFoundError:
                continue
    directory = main_directory(places)
    for _ in range(64):
        pids = processes(directory) if directory else []
        sent = False
        for pid in pids:
            try:
                os.kill(pid, number)
                sent = True
            except ProcessLookupError:
                continue
        if number != 9 or not sent:
            return
        # A fork between listing and killing is caught by the next round.
        time.sleep(0.002)


def freezer_file(places: tuple[Directory, ...]) -> str:
    """Return the file that tells whether the cgroup is frozen, "" for none."""
    for place in places:
        if place.version == 1 and "freezer" in place.key.split(","):
            return f"{place.path}/freezer.state"
    for place in places:
        if place.version == 2:
            return f"{place.path}/cgroup.freeze"
    return ""


def frozen(places: tuple[Directory, ...]) -> bool:
    """Tell whether the cgroup is frozen."""
    file = freezer_file(places)
    try:
        return bool(file) and read(file).strip() in ("FROZEN", "FREEZING", "1")
    except FileNotFoundError:
        return False


def refuse_frozen(places: tuple[Directory, ...]) -> None:
    """Raise BadState for a cgroup that is frozen, by itself or from above: who enters it stops.

    A hybrid machine can freeze through v1 and through v2.
    """
    for place in places:
        try:
            if place.version == 2:
                stops = "frozen 1" in read(f"{place.path}/cgroup.events").splitlines()
            elif "freezer" in place.key.split(","):
                stops = read(f"{place.path}/freezer.state").strip() != "THAWED"
            else:
                continue
        except FileNotFoundError:
            # The root of a hierarchy has no such file and is never frozen.
            continue
        if stops:
            text = f"the container's cgroup {place.path} is frozen"
            raise BadState(text, "thaw it or the cgroup above it, or use another cgroupsPath")


def read_from(fd: int, places: tuple[Directory, ...]) -> bytes:
    """Read what a process in the cgroup writes to a pipe; b"" is its end.

    Raises BadState when the cgroup is frozen meanwhile: nothing would come until it is thawed.
    """
    import select

    poll = select.poll()
    poll.register(fd, select.POLLIN)
    while not poll.poll(PATIENCE * 1000):
        refuse_frozen(places)
    return os.read(fd, 8192)


def let_die(pids: list[int], places: tuple[Directory, ...]) -> None:
    """Let killed processes of a cgroup die although it, or one above it, is frozen.

    v2 kills frozen processes.  v1 holds them, unless they are moved: to the caller's own cgroup.
    """
    for place in places:
        if place.version != 1 or "freezer" not in place.key.split(","):
            continue
        try:
            if read(f"{place.path}/freezer.state").strip() == "THAWED":
                return
        except FileNotFoundError:
            return
        move_away(pids)
        return


def move_away(pids: list[int]) -> None:
    """Move killed processes out of a v1 freezer that holds them, to the caller's own cgroup."""
    for own in hierarchies():
        if "freezer" not in own.controllers:
            continue
        outside = own.own if own.own.startswith("/") and ".." not in own.own else "/"
        for pid in pids:
            try:
                write(f"{own.mountpoint}{outside}/cgroup.procs", str(pid))
            except ProcessLookupError:
                continue


def thaw_to_die(places: tuple[Directory, ...]) -> None:
    """Thaw the cgroup of killed processes, without waiting, also below a frozen one."""
    for place in places:
        try:
            if place.version == 2:
                write(f"{place.path}/cgroup.freeze", "0")
            elif "freezer" in place.key.split(","):
                write(f"{place.path}/freezer.state", "THAWED")
                let_die(processes(place.path), places)
        except FileNotFoundError:
            # Gone, or the root of a hierarchy.
            continue


def freeze(places: tuple[Directory, ...], wanted: bool, seconds: float = 10.0) -> None:
    """Freeze or thaw the cgroup and wait until it is; raises KrunError when it takes too long."""
    for place in places:
        if place.version == 1 and "freezer" in place.key.split(","):
            _freeze_v1(f"{place.path}/freezer.state", wanted, seconds)
            return
    for place in places:
        if place.version == 2:
            _freeze_v2(place.path, wanted, seconds)
            return
    raise KrunError("the container has no freezer", "pause needs a cgroup of its own")


def _freeze_v1(path: str, wanted: bool, seconds: float) -> None:
    word = "FROZEN" if wanted else "THAWED"
    end = time.monotonic() + seconds
    while True:
        # A process that forks while it is being frozen keeps FREEZING; writing again goes on.
        write(path, word)
        if read(path).strip() == word:
            return
        if time.monotonic() > end:
            write(path, "THAWED")
            raise KrunError(f"cgroup {path} does not become {word}")
        time.sleep(0.001)


def _freeze_v2(path: str, wanted: bool, seconds: float) -> None:
    import select

    events = os.open(f"{path}/cgroup.events", os.O_RDONLY | os.O_CLOEXEC)
    try:
        write(f"{path}/cgroup.freeze", str(int(wanted)))
        poll = select.poll()
        poll.register(events, select.POLLPRI)
        end = time.monotonic() + seconds
        while f"frozen {int(wanted)}" not in os.pread(events, 4096, 0).decode():
            left = end - time.monotonic()
            if left <= 0:
                write(f"{path}/cgroup.freeze", "0")
                raise KrunError(f"cgroup {path} does not freeze")
            poll.poll(left * 1000)
    finally:
        os.close(events)


def remove_tree(path: str, seconds: float = 5.0) -> None:
    """Remove a cgroup and those below; waits for the last process to be gone."""
    try:
        # Most are empty: nothing needs to be listed.
        os.rmdir(path)
        return
    except FileNotFoundError:
        return
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
    end = time.monotonic() + seconds
    pause = 0.0005
    while True:
        busy = None
        for directory in _tree(path):
            try:
                os.rmdir(directory)
            except FileNotFoundError:
                continue
            except OSError as error:
                if error.errno != errno.EBUSY:
                    raise
                busy = error
        if busy is None:
            return
        if time.monotonic() > end:
            raise busy
        time.sleep(pause)
        pause = min(pause * 2, 0.05)


def oom_kills(places: tuple[Directory, ...]) -> int:
    """Return how many processes the kernel killed for lack of memory."""
    directory = place_of("memory", places)
    for name in ("memory.oom_control", "memory.events"):
        try:
            for line in read(f"{directory}/{name}").splitlines():
                key, _, value = line.partition(" ")
                if key == "oom_kill":
                    return int(value)
        except OSError:
            continue
    return 0
