"""What is left of a container whose state tells nothing, for delete --force to remove.

A crun that was killed while it created: its own delete knows of no cgroup then.  crun writes its
status file last.  Until then <root>/<id>/config.json alone tells what was made: cgroups, and an
init process in them that waits for its dead parent.
"""

from __future__ import annotations

import os

from krun import bundle, jsontext, store
from krun.errors import KrunError
from krun.linux import cgroupfs, proc

# How long a killed init may stay in its cgroup.
_SECONDS = 2.0
# podman, docker and containerd make ids of 64 hexadecimal digits: libpod-ID, docker-ID.scope.
_LONG_ID = 64


def _cgroup(root: str, container: str) -> str:
    """Return the cgroup that crun's cgroupfs driver makes, "" where that cannot be told."""
    try:
        config = bundle.read_json(f"{root}/{container}/config.json", "config.json")
        path = config["linux"].get("cgroupsPath") or container
    except (KrunError, KeyError, TypeError, AttributeError):
        return ""
    # slice:prefix:name is systemd's, which removes an empty scope itself.
    return "" if ":" in path else f"/{path.lstrip('/')}"


def _is_of(pid: int, root: str, container: str) -> bool:
    """Tell whether a process is a crun that creates this container.

    Nothing else may be killed: another container can have the same cgroup.
    """
    try:
        words = proc.read(f"/proc/{pid}/cmdline").rstrip("\0").split("\0")
    except OSError:
        return False
    return words[0] == "crun" and words[-1] == container and root in words


def clear(root: str, container: str) -> None:
    """Kill the init that waits and remove the cgroups that nobody else is in."""
    path = _cgroup(root, container)
    if not path:
        return
    for place in cgroupfs.directories(path, cgroupfs.hierarchies()):
        others = False
        for pid in cgroupfs.processes(place.path):
            if not _is_of(pid, root, container):
                others = True
                continue
            try:
                os.kill(pid, 9)
            except ProcessLookupError:
                continue
        if not others:
            cgroupfs.remove_tree(place.path, _SECONDS)


def _is_named(cgroup: str, container: str) -> bool:
    """Tell whether a cgroup is called as the container is, or as clients call it by a long id."""
    return cgroup == container or (len(container) >= _LONG_ID and container in cgroup)


def rescue(root: str, container: str) -> store.State | None:
    """Return what the launcher's file tells of a native container with a damaged state.json.

    Its cgroups are those of its init that carry its name, and in which krun is not itself: all
    that is in a container's cgroup is killed, so none may be taken for one by guess.
    """
    try:
        text = proc.read(f"{store.directory(root, container)}/{store.LAUNCHER}")
        line, _, running = text.partition("\n")
        pid, start_time = (int(word) for word in line.split(" ")[:2])
        document = jsontext.loads(running)
        own = proc.read(f"/proc/{pid}/cgroup") if proc.alive(pid, start_time) else ""
        origin, rootfs, created = (document[name] for name in ("bundle", "rootfs", "created"))
    except (OSError, ValueError, TypeError, KeyError):
        return None
    here = {(one.mountpoint, one.own) for one in cgroupfs.hierarchies()}
    places = [
        cgroupfs.Directory(",".join(one.controllers), one.mountpoint + one.own, one.version)
        for one in cgroupfs.hierarchies(own=own)
        if _is_named(one.own.rpartition("/")[2], container)
        and (one.mountpoint, one.own) not in here
    ]
    return store.State(
        container, pid, start_time, origin, rootfs, created, {}, 0, 0, tuple(places), tolerant=True
    )
