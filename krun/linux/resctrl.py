"""resctrl groups: a container's share of cache and memory bandwidth (config-linux.md, IntelRdt).

The kernel's side is Documentation/filesystems/resctrl.rst: a directory is a class of service, its
`schemata` the limits, its `tasks` who has them, `mon_groups` below it what is counted apart.
"""

from __future__ import annotations

import os

from krun.errors import KrunError
from krun.linux.proc import read

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_WHERE = "linux.intelRdt"


def mountpoint() -> str:
    """Return where resctrl is mounted; raises KrunError where it is not."""
    for line in read("/proc/self/mountinfo").splitlines():
        mount, _, rest = line.partition(" - ")
        if rest.startswith("resctrl "):
            return mount.split()[4]
    text = f"{_WHERE}: resctrl is not mounted"
    raise KrunError(text, "mount -t resctrl resctrl /sys/fs/resctrl, or leave intelRdt out")


def find(section: dict[str, Any], identifier: str, top: str) -> tuple[str, str]:
    """Return a container's group and what delete removes of it; nothing is made yet.

    Removed are a group of the container's own, or its monitoring group in a shared one, unless
    somebody else has made them.  Raises KrunError for what the machine or the group lacks.
    """
    name = section.get("closID") or identifier
    if name in (".", "..") or (name != "/" and "/" in name):
        raise KrunError(f"config.json: {_WHERE}.closID: {name} is not the name of a group")
    # The root group's name is /.
    group = f"{top}/{name}".rstrip("/")
    for key, feature in (("l3CacheSchema", "L3"), ("memBwSchema", "MB")):
        if section.get(key) and not any(one.startswith(feature) for one in _features(top)):
            raise KrunError(f"{_WHERE}.{key}: this machine's resctrl has no {feature}")
    there = os.path.isdir(group)
    if section.get("closID"):
        if not there and not lines(section):
            text = f"{_WHERE}.closID: there is no group {group}"
            raise KrunError(text, "make it before, or give it a schemata")
        if there:
            _compare(section, group)
        monitor = _monitor(section, group, identifier)
        return group, monitor if monitor and not os.path.isdir(monitor) else ""
    return group, "" if there else group


def _features(top: str) -> list[str]:
    try:
        return os.listdir(f"{top}/info")
    except FileNotFoundError:
        return []


def _monitor(section: dict[str, Any], group: str, identifier: str) -> str:
    """Return the container's monitoring group, "" for none.

    enableMonitoring is of version 1.3 of the specification, the other two of 1.2 and before.
    """
    wanted = any(section.get(key) for key in ("enableMonitoring", "enableCMT", "enableMBM"))
    return f"{group}/mon_groups/{identifier}" if wanted else ""


def lines(section: dict[str, Any]) -> list[str]:
    """Return the lines to write to schemata, in the specification's order."""
    one = [section.get("l3CacheSchema"), section.get("memBwSchema")]
    return [line for line in (*one, *(section.get("schemata") or ())) if line]


def _values(text: str) -> dict[str, str]:
    """Return the value of each resource and domain: L3:0=0f;1=f0 is L3:0 f, L3:1 f0."""
    found = {}
    for line in text.splitlines():
        resource, _, domains = line.strip().partition(":")
        for domain in domains.split(";"):
            number, _, value = domain.partition("=")
            found[f"{resource.strip()}:{number.strip()}"] = value.strip().lstrip("0") or "0"
    return found


def _compare(section: dict[str, Any], group: str) -> None:
    """Refuse a shared group whose limits are others: the specification asks for this."""
    now = _values(read(f"{group}/schemata"))
    for key in ("l3CacheSchema", "memBwSchema"):
        for name, value in _values(section.get(key) or "").items():
            if now.get(name) != value:
                text = f"{_WHERE}.{key}: group {group} has {name}={now.get(name)}, not {value}"
                raise KrunError(text, "use another closID, or change the group")


def make(section: dict[str, Any], group: str, identifier: str) -> None:
    """Make the groups that are not there and write the limits."""
    shared = bool(section.get("closID")) and os.path.isdir(group)
    os.makedirs(group, 0o755, exist_ok=True)
    # A shared group's were compared; what older versions lack is written as it is.
    own = list(section.get("schemata") or ()) if shared else lines(section)
    write_schemata(group, own)
    monitor = _monitor(section, group, identifier)
    if monitor:
        os.makedirs(monitor, 0o755, exist_ok=True)


def write_schemata(group: str, wanted: list[str]) -> None:
    """Write limits, a line a write as the kernel reads them; raises KrunError with its reason."""
    for line in wanted:
        _write(f"{group}/schemata", line + "\n", line)


def join(group: str, identifier: str, pid: int) -> None:
    """Put a process of one thread into the group, and in the monitoring group that is there."""
    _write(f"{group}/tasks", str(pid), str(pid))
    monitor = f"{group}/mon_groups/{identifier}"
    if os.path.isdir(monitor):
        _write(f"{monitor}/tasks", str(pid), str(pid))


def _write(path: str, text: str, shown: str) -> None:
    try:
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        try:
            os.write(fd, text.encode())
        finally:
            os.close(fd)
    except OSError as error:
        top = os.path.dirname(os.path.dirname(path))
        try:
            reason = read(f"{top}/info/last_cmd_status").strip()
        except OSError:
            reason = ""
        text = f"resctrl: writing {shown} to {path}: {error.strerror}"
        raise KrunError(text, "" if reason in ("", "ok") else reason) from error


def remove(path: str) -> None:
    """Remove a group; its processes go back to the root group."""
    try:
        os.rmdir(path)
    except FileNotFoundError:
        return


def statistics(group: str) -> dict[str, str]:
    """Return the limits of the root group and of a container's, as runc's events have them."""
    answer = {}
    top = mountpoint()
    for suffix, place in (("_root", top), ("", group)):
        for line in read(f"{place}/schemata").splitlines():
            for prefix, key in (("L3", "l3_cache_schema"), ("MB", "mem_bw_schema")):
                if line.strip().startswith(prefix):
                    answer[key + suffix] = line.strip()
    return answer
