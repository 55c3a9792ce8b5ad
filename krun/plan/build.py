"""build(spec, …) -> Plan: the native engine's whole decision, pure."""

from __future__ import annotations

import os

from krun.errors import BadSpec
from krun.plan.cgroups import plan_cgroup
from krun.plan.checks import check
from krun.plan.devices import plan_devices, plan_links, plan_rules
from krun.plan.model import IdMap, Mount, Namespaces, Plan
from krun.plan.mounts import PROPAGATION, plan_mounts
from krun.plan.namespaces import host_id, plan_namespaces
from krun.plan.process import cpu_list, is_realtime, keeps_groups, plan_process

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from krun.types import Spec

# personality(2)
_PERSONALITIES = {"LINUX": 0x0000, "LINUX32": 0x0008}

_CONTEXTS = ("context", "fscontext", "defcontext", "rootcontext")

# set_mempolicy(2)
_MEMORY_MODES = {
    "MPOL_DEFAULT": 0,
    "MPOL_PREFERRED": 1,
    "MPOL_BIND": 2,
    "MPOL_INTERLEAVE": 3,
    "MPOL_LOCAL": 4,
    "MPOL_PREFERRED_MANY": 5,
    "MPOL_WEIGHTED_INTERLEAVE": 6,
}
_MEMORY_FLAGS = {
    "MPOL_F_NUMA_BALANCING": 1 << 13,
    "MPOL_F_RELATIVE_NODES": 1 << 14,
    "MPOL_F_STATIC_NODES": 1 << 15,
}


def build(
    spec: Spec, identifier: str, bundle: str, cgroup_version: int, systemd: bool = False
) -> Plan:
    """Return the plan of a translated configuration; raises BadSpec.

    bundle is absolute; cgroup_version is 1 (also on hybrid machines) or 2.
    """
    check(spec)
    annotations = spec.get("annotations") or {}
    linux = spec.get("linux") or {}
    root = spec.get("root") or {}
    namespaces = plan_namespaces(spec)
    mounts = tuple(_container_idmap(one, namespaces) for one in plan_mounts(spec, bundle))
    propagation = linux.get("rootfsPropagation") or ""
    if propagation and propagation not in PROPAGATION:
        raise BadSpec("linux.rootfsPropagation", f"{propagation} is not a propagation mode")
    return Plan(
        identifier,
        bundle,
        os.path.normpath(os.path.join(bundle, root.get("path", "rootfs"))),
        bool(root.get("readonly")),
        PROPAGATION.get(propagation, 0),
        namespaces,
        spec.get("hostname", ""),
        spec.get("domainname", ""),
        mounts,
        plan_devices(spec, mounts),
        plan_links(mounts),
        tuple(dict.fromkeys(linux.get("maskedPaths") or ())),
        tuple(linux.get("readonlyPaths") or ()),
        tuple((linux.get("sysctl") or {}).items()),
        plan_process(spec.get("process") or {"cwd": "/"}),
        plan_personality(linux.get("personality")),
        plan_memory_policy(linux.get("memoryPolicy")),
        plan_seccomp(linux.get("seccomp"), annotations),
        annotations.get("run.oci.seccomp_fail_unknown_syscall", "0") != "0",
        linux.get("mountLabel", ""),
        plan_mount_context(annotations),
        plan_cgroup(
            identifier,
            linux.get("cgroupsPath", ""),
            cgroup_version,
            linux.get("resources") or {},  # type: ignore[arg-type]
            plan_rules(spec),
            systemd=annotations if systemd else None,
            realtime=is_realtime(spec.get("process") or {}),
        ),
        spec.get("hooks") or {},
        annotations,
        linux.get("intelRdt"),  # type: ignore[arg-type]
        keeps_groups(annotations),
    )


def _absolute(id_map: str, own: str) -> str:
    """Return a mapping whose lines with @ are relative to own, the container's, as one without."""
    lines = []
    for line in id_map.splitlines():
        inside, outside, count = line.lstrip("@").split()
        relative = line[:1] == "@" and own
        lines.append(f"{inside} {host_id(own, int(outside)) if relative else outside} {count}")
    return "\n".join(lines)


def _container_idmap(mount: Mount, namespaces: Namespaces) -> Mount:
    """Fill in the container's mapping for a bare idmap option; raises BadSpec if it has none."""
    idmap = mount.idmap
    if idmap is None:
        return mount
    if idmap.uid_map:
        uid_map = _absolute(idmap.uid_map, namespaces.uid_map)
        gid_map = _absolute(idmap.gid_map, namespaces.gid_map)
        return mount._replace(idmap=IdMap(uid_map, gid_map, idmap.recursive))
    if not namespaces.uid_map:
        text = f"{mount.destination}: an id mapping needs uidMappings, or a new user namespace"
        raise BadSpec("mounts", text)
    return mount._replace(idmap=IdMap(namespaces.uid_map, namespaces.gid_map, idmap.recursive))


def plan_seccomp(section: Any, annotations: dict[str, str]) -> dict[str, Any] | None:
    """Return linux.seccomp with the listener that crun's annotation names; raises BadSpec."""
    name = "run.oci.seccomp.receiver"
    receiver = annotations.get(name)
    if receiver is None or not section:
        return section or None
    if receiver[:1] != "/":
        raise BadSpec(f'annotations["{name}"]', "must be absolute")
    return {**section, "listenerPath": receiver}


def plan_mount_context(annotations: dict[str, str]) -> str:
    """Return the option that linux.mountLabel becomes (mount(8), SELinux); raises BadSpec."""
    name = "run.oci.mount_context_type"
    kind = annotations.get(name, "context")
    if kind not in _CONTEXTS:
        raise BadSpec(f'annotations["{name}"]', f"must be one of {', '.join(_CONTEXTS)}")
    return kind


def plan_personality(personality: Any) -> int | None:
    """Return the execution domain (personality(2))."""
    return _PERSONALITIES[personality["domain"].removeprefix("PER_")] if personality else None


def plan_memory_policy(policy: Any) -> tuple[int, tuple[int, ...]] | None:
    """Return mode with flags, and the nodes (set_mempolicy(2))."""
    if not policy:
        return None
    where = "linux.memoryPolicy"
    mode = _MEMORY_MODES.get(policy.get("mode", ""))
    if mode is None:
        raise BadSpec(f"{where}.mode", f"{policy.get('mode')} is not a memory policy")
    for name in policy.get("flags") or ():
        if name not in _MEMORY_FLAGS:
            raise BadSpec(f"{where}.flags", f"{name} is not a flag")
        mode |= _MEMORY_FLAGS[name]
    return mode, cpu_list(policy.get("nodes", ""), f"{where}.nodes")
