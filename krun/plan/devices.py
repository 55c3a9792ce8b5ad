"""linux.devices and the default /dev -> device nodes, links and device rules."""

from __future__ import annotations

import os
from stat import S_IFBLK, S_IFCHR, S_IFIFO

from krun.plan.model import Device, Link, Rule

TYPE_CHECKING = False
if TYPE_CHECKING:
    from krun.plan.model import Mount
    from krun.types import Spec

_KINDS = {"c": S_IFCHR, "u": S_IFCHR, "b": S_IFBLK, "p": S_IFIFO}

# config-linux.md, "Default Devices".
DEFAULT_DEVICES = (
    ("/dev/null", 1, 3),
    ("/dev/zero", 1, 5),
    ("/dev/full", 1, 7),
    ("/dev/random", 1, 8),
    ("/dev/urandom", 1, 9),
    ("/dev/tty", 5, 0),
)

# config-linux.md, "/dev symbolic links", and the pseudo-terminal multiplexer.
DEFAULT_LINKS = (
    Link("/dev/fd", "/proc/self/fd"),
    Link("/dev/stdin", "/proc/self/fd/0"),
    Link("/dev/stdout", "/proc/self/fd/1"),
    Link("/dev/stderr", "/proc/self/fd/2"),
    Link("/dev/core", "/proc/kcore"),
)
PTMX_LINK = Link("/dev/ptmx", "pts/ptmx")

# What every container may use, whatever the rules before say: mknod of all, the default
# devices, pseudo-terminals.
DEFAULT_RULES = (
    Rule(True, "c", -1, -1, "m"),
    Rule(True, "b", -1, -1, "m"),
    Rule(True, "c", 1, 3, "rwm"),
    Rule(True, "c", 1, 8, "rwm"),
    Rule(True, "c", 1, 7, "rwm"),
    Rule(True, "c", 5, 0, "rwm"),
    Rule(True, "c", 1, 5, "rwm"),
    Rule(True, "c", 1, 9, "rwm"),
    Rule(True, "c", 136, -1, "rwm"),
    Rule(True, "c", 5, 2, "rwm"),
)


def owns_dev(mounts: tuple[Mount, ...]) -> bool:
    """Tell whether /dev is the container's own, not a bind mount of somebody's."""
    return not any(mount.destination == "/dev" and mount.kind == "bind" for mount in mounts)


def plan_devices(spec: Spec, mounts: tuple[Mount, ...]) -> tuple[Device, ...]:
    """Return the nodes to make: the configuration's, and the default ones it leaves out.

    What is mounted at the place of one stays, such as /dev/urandom on /dev/random.
    """
    if not owns_dev(mounts):
        return ()
    mounted = {mount.destination for mount in mounts}
    devices = []
    for device in spec.get("linux", {}).get("devices") or ():
        mode = device.get("fileMode")
        devices.append(
            Device(
                os.path.normpath(device["path"]),
                _KINDS[device["type"]] | (0o666 if mode is None else mode & 0o7777),
                device.get("major", 0),
                device.get("minor", 0),
                device.get("uid") or 0,
                device.get("gid") or 0,
            )
        )
    named = {device.path for device in devices}
    for path, major, minor in DEFAULT_DEVICES:
        if path not in named:
            devices.append(Device(path, S_IFCHR | 0o666, major, minor, 0, 0))
    return tuple(device for device in devices if device.path not in mounted)


def plan_links(mounts: tuple[Mount, ...]) -> tuple[Link, ...]:
    """Return the symbolic links of /dev."""
    return (*DEFAULT_LINKS, PTMX_LINK) if owns_dev(mounts) else ()


def plan_rules(spec: Spec) -> tuple[Rule, ...]:
    """Return the device rules in order: the configuration's, then the default ones.

    Everything is denied before the first.  A configuration without rules leaves the cgroup as
    it is: podman sends none with a user namespace, where mknod is impossible anyway.
    """
    rules = []
    resources = spec.get("linux", {}).get("resources") or {}
    for rule in resources.get("devices") or ():
        kind = rule.get("type") or "a"
        major, minor = rule.get("major"), rule.get("minor")
        rules.append(
            Rule(
                rule["allow"],
                kind,
                -1 if major is None else major,
                -1 if minor is None else minor,
                (rule.get("access") or "rwm").replace("a", ""),
            )
        )
    return (*rules, *DEFAULT_RULES) if rules else ()
