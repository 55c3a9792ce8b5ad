"""Freezing and thawing, and what a frozen cgroup holds up."""

from __future__ import annotations

import os
import time

from krun.errors import BadState, KrunError
from krun.linux.cgroupfs import Directory, hierarchies, processes, read, write

# Seconds between two looks at whether who is waited for is frozen.
PATIENCE = 1


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
            text = f"container's cgroup unexpectedly frozen: {place.path}"
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
