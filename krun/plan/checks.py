"""Contradictions that the shapes of config.json cannot tell: each check is a bare noun."""

from __future__ import annotations

import os

from krun.errors import BadSpec
from krun.plan.namespaces import FLAGS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from krun.types import Spec

# Prefixes of sysctls that belong to a namespace (namespaces(7)); others would change the host.
_SYSCTL_NAMESPACES = (
    ("kernel/msg", "ipc"),
    ("kernel/sem", "ipc"),
    ("kernel/shm", "ipc"),
    ("fs/mqueue/", "ipc"),
    ("net/", "network"),
    ("kernel/domainname", "uts"),
    ("kernel/hostname", "uts"),
)
_NAME_MAX = 64


def namespaces(spec: Spec, kinds: set[str]) -> None:
    """Without a mount namespace init must come back to the host's, which takes the host's root."""
    if "mount" not in kinds and "user" in kinds:
        raise BadSpec("linux.namespaces", "a user namespace needs a mount namespace, too")
    for namespace in (spec.get("linux") or {}).get("namespaces") or ():
        if namespace["type"] not in FLAGS:
            where = "linux.namespaces"
            raise BadSpec(where, f"{namespace['type']} is not a namespace of Linux")


def root(spec: Spec, kinds: set[str]) -> None:
    """The root file system is what the container is."""
    if not (spec.get("root") or {}).get("path"):
        raise BadSpec("root.path", "is required")


def hostname(spec: Spec, kinds: set[str]) -> None:
    """A host name needs a uts namespace of its own, and room in it (uname(2))."""
    for key in ("hostname", "domainname"):
        name = str(spec.get(key) or "")
        if name and "uts" not in kinds:
            raise BadSpec(key, "needs a uts namespace in linux.namespaces")
        if len(os.fsencode(name)) > _NAME_MAX:
            raise BadSpec(key, f"must not be longer than {_NAME_MAX} bytes")


def sysctl(spec: Spec, kinds: set[str]) -> None:
    """A sysctl must belong to a namespace that the container does not share with the host."""
    for name, value in ((spec.get("linux") or {}).get("sysctl") or {}).items():
        path = sysctl_path(name)
        where = f"linux.sysctl.{name}"
        if ".." in path.split("/"):
            raise BadSpec(where, "must not contain ..")
        for prefix, kind in _SYSCTL_NAMESPACES:
            if path.startswith(prefix):
                if kind not in kinds:
                    raise BadSpec(where, f"needs a {kind} namespace in linux.namespaces")
                if path == "kernel/hostname":
                    raise BadSpec(where, "use hostname instead")
                if path == "kernel/domainname" and spec.get("domainname", value) != value:
                    raise BadSpec(where, "contradicts domainname")
                break
        else:
            raise BadSpec(where, "belongs to no namespace, it would change the host")


def sysctl_path(name: str) -> str:
    """Return the path below /proc/sys: net.ipv4.conf.eth0/1.forwarding or with slashes.

    As in sysctl(8), whichever of . and / comes first separates, the other one is literal.
    """
    dot, slash = name.find("."), name.find("/")
    if slash != -1 and (dot == -1 or slash < dot):
        return name
    return name.translate({ord("."): "/", ord("/"): "."})


CHECKS = (root, namespaces, hostname, sysctl)


def check(spec: Spec) -> None:
    """Raise BadSpec for the first contradiction."""
    kinds = {one["type"] for one in (spec.get("linux") or {}).get("namespaces") or ()}
    for one in CHECKS:
        one(spec, kinds)
