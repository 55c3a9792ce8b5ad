"""Making a container's directories, with the controllers that its limits need."""

from __future__ import annotations

import os

from krun.errors import BadState
from krun.linux.cgroupfs import DENIED, Directory, processes, read, write


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
                if tolerant and error.errno in DENIED:
                    continue
                raise
            present.append(place)
    except BaseException:
        from krun.linux.cgroupfs.removal import remove_tree

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
        if not scope and (found := processes(place.path)):
            text = f"container's cgroup is not empty: {len(found)} process(es) found: {place.path}"
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
