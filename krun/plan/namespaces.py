"""linux.namespaces -> Namespaces: what is new, what is joined, how ids map."""

from __future__ import annotations

from krun.errors import BadSpec
from krun.linux import flags as k
from krun.plan.model import Join, Namespaces
from krun.plan.mounts import id_map

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from krun.types import Spec

FLAGS = {
    "pid": k.CLONE_NEWPID,
    "network": k.CLONE_NEWNET,
    "mount": k.CLONE_NEWNS,
    "ipc": k.CLONE_NEWIPC,
    "uts": k.CLONE_NEWUTS,
    "user": k.CLONE_NEWUSER,
    "cgroup": k.CLONE_NEWCGROUP,
    "time": k.CLONE_NEWTIME,
}

# What the kernel shows for ids that are not mapped (user_namespaces(7)).
_OVERFLOW_ID = 65534

# The user namespace is joined first: it owns the right to join the others.  The mount
# namespace is last: afterwards the paths of the others cannot be opened.
JOIN_ORDER = (
    k.CLONE_NEWUSER,
    k.CLONE_NEWCGROUP,
    k.CLONE_NEWIPC,
    k.CLONE_NEWUTS,
    k.CLONE_NEWNET,
    k.CLONE_NEWPID,
    k.CLONE_NEWTIME,
    k.CLONE_NEWNS,
)


def plan_namespaces(spec: Spec) -> Namespaces:
    """Return the namespaces of a configuration; raises BadSpec for what cannot be."""
    linux = spec.get("linux", {})
    new = listed = 0
    join = []
    for index, namespace in enumerate(linux.get("namespaces") or ()):
        flag = FLAGS[namespace["type"]]
        if listed & flag:
            where = f"linux.namespaces[{index}].type"
            raise BadSpec(where, f"{namespace['type']} is listed twice")
        listed |= flag
        path = namespace.get("path")
        if path:
            join.append(Join(flag, path))
        else:
            new |= flag
    join.sort(key=lambda one: JOIN_ORDER.index(one.flag))
    uids, gids = linux.get("uidMappings") or [], linux.get("gidMappings") or []
    if new & k.CLONE_NEWUSER and not (uids and gids):
        raise BadSpec(
            "linux.uidMappings" if not uids else "linux.gidMappings",
            "is required for a new user namespace",
        )
    if (uids or gids) and not listed & k.CLONE_NEWUSER:
        raise BadSpec("linux.uidMappings", "needs a user namespace in linux.namespaces")
    offsets: Any = linux.get("timeOffsets") or {}
    if offsets and not new & k.CLONE_NEWTIME:
        raise BadSpec("linux.timeOffsets", "needs a new time namespace in linux.namespaces")
    return Namespaces(
        new,
        tuple(join),
        listed,
        id_map(uids) if new & k.CLONE_NEWUSER else "",
        id_map(gids) if new & k.CLONE_NEWUSER else "",
        "".join(
            f"{clock} {offset.get('secs', 0)} {offset.get('nanosecs', 0)}\n"
            for clock, offset in offsets.items()
        ),
    )


def first_id(id_map: str) -> int:
    """Return the id to make a container as: 0, or the first that is mapped if 0 is not."""
    if not id_map or host_id(id_map, 0) != _OVERFLOW_ID:
        return 0
    return int(id_map.split(maxsplit=1)[0])


def host_id(id_map: str, number: int) -> int:
    """Return what an id of the container is outside; nobody's where it is not mapped."""
    for line in id_map.splitlines():
        inside, outside, count = map(int, line.split())
        if inside <= number < inside + count:
            return outside + number - inside
    return _OVERFLOW_ID
