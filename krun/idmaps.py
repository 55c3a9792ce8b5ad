"""The id mappings of user namespaces, as root and as an ordinary user (user_namespaces(7))."""

from __future__ import annotations

import os

from krun.errors import KrunError
from krun.linux import flags as k
from krun.linux.namespaces import clone, write_id_maps

TYPE_CHECKING = False
if TYPE_CHECKING:
    from krun.plan.model import Plan


def user_namespace(uid_map: str, gid_map: str) -> int:
    """Return a descriptor of a new user namespace with these mappings."""
    reader, writer = os.pipe()
    pid = clone(k.CLONE_NEWUSER)
    if pid == 0:
        os.close(writer)
        os.read(reader, 1)
        os._exit(0)
    os.close(reader)
    try:
        write_id_maps(pid, uid_map, gid_map, False)
        return os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(writer)
        os.waitpid(pid, 0)


def denies_setgroups(plan: Plan) -> bool:
    """Tell whether setgroups is denied: an ordinary user maps one group without newgidmap."""
    return bool(plan.namespaces.uid_map) and os.geteuid() != 0 and not _needs_newidmap(plan)


def _needs_newidmap(plan: Plan) -> bool:
    """Tell whether an ordinary user's mappings go beyond the own ids."""
    own_user = f" {os.geteuid()} 1"
    own_group = f" {os.getegid()} 1"
    namespaces = plan.namespaces
    return not (
        namespaces.uid_map.count("\n") == 0
        and namespaces.uid_map.endswith(own_user)
        and namespaces.gid_map.count("\n") == 0
        and namespaces.gid_map.endswith(own_group)
    )


def write_maps(plan: Plan, pid: int) -> None:
    """Write the mappings of a new user namespace, whose first process is pid; raises KrunError."""
    namespaces = plan.namespaces
    if os.geteuid() != 0 and _needs_newidmap(plan):
        _run_newidmap("newuidmap", pid, namespaces.uid_map)
        _run_newidmap("newgidmap", pid, namespaces.gid_map)
        return
    write_id_maps(pid, namespaces.uid_map, namespaces.gid_map, os.geteuid() != 0)


def _run_newidmap(name: str, pid: int, mapping: str) -> None:
    """Write a mapping through the set-uid program that knows /etc/subuid (newuidmap(1))."""
    import shutil

    path = shutil.which(name)
    if path is None:
        raise KrunError(f"{name} is not installed", "install uidmap (Debian) or shadow-utils")
    child = os.fork()
    if child == 0:
        try:
            os.execv(path, [name, str(pid), *mapping.split()])
        finally:
            os._exit(127)
    _, status = os.waitpid(child, 0)
    if status:
        text = f"{name} refused the mapping {mapping!r}"
        raise KrunError(text, f"see /etc/sub{name[3:6]} for what this user may map")
