"""A container of the crun engine, as the native engine's verbs see one of theirs."""

from __future__ import annotations

from krun import bundle, store
from krun.errors import BadState
from krun.linux import cgroupfs, proc


def state(root: str, container: str) -> store.State:
    """Return the state from crun's status file and the cgroups its init is in.

    Raises BadState when the container has stopped.
    """
    status = bundle.read_json(f"{root}/{container}/status", "crun's status")
    pid = status.get("pid") or 0
    try:
        with open(f"/proc/{pid}/cgroup", encoding="ascii") as file:
            own = file.read()
    except OSError as error:
        raise BadState("container not running") from error
    # A zombie's cgroup is the root of cgroup v1, with every process of the machine.
    if not proc.alive(pid, status.get("process-start-time") or 0):
        raise BadState("container not running")
    return store.State(
        id=container,
        pid=pid,
        start_time=status.get("process-start-time") or 0,
        bundle=status.get("bundle") or "",
        rootfs=status.get("rootfs") or "",
        created=status.get("created") or "",
        annotations={},
        owner=0,
        namespaces=0,
        cgroup=tuple(
            cgroupfs.Directory(",".join(one.controllers), one.mountpoint + one.own, one.version)
            for one in cgroupfs.hierarchies(own=own)
        ),
        tolerant=False,
    )
