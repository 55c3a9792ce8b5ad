"""The devices that a cgroup's processes may use: v1 files, or an eBPF program on v2."""

from __future__ import annotations

import os

from krun.linux.cgroupfs import Directory

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from krun.plan.model import Rule


def allow_devices(rules: tuple[Rule, ...], places: tuple[Directory, ...]) -> None:
    """Deny every device, then apply the rules: v1 files, or an eBPF program on v2."""
    for place in places:
        if place.version == 1 and "devices" in place.key.split(","):
            _write_device_rules(place.path, rules)
            return
    for place in places:
        if place.version == 2:
            from krun.linux import bpf

            bpf.attach_device_filter(place.path, rules)
            return


def device_line(rule: Rule) -> str:
    """Return a rule in the form of devices.allow."""
    if rule.kind == "a":
        return "a"
    major = "*" if rule.major == -1 else rule.major
    minor = "*" if rule.minor == -1 else rule.minor
    return f"{rule.kind} {major}:{minor} {rule.access}"


def _mknod_allowed(rules: tuple[Rule, ...]) -> Iterator[Rule]:
    """Leave mknod out of what is denied after everything was allowed.

    Every container may make nodes (krun.plan.devices), but v1 then takes back a denial by the same
    numbers alone, not by the *:* of that rule (device_cgroup.c).
    """
    everything = False
    for rule in rules:
        if rule.kind == "a":
            everything = rule.allow
        elif everything and not rule.allow:
            access = rule.access.replace("m", "")
            if access:
                yield rule._replace(access=access)
            continue
        yield rule


def _write_device_rules(path: str, rules: tuple[Rule, ...]) -> None:
    fds: dict[bool, int] = {}
    try:
        for allow, name in ((True, "devices.allow"), (False, "devices.deny")):
            fds[allow] = os.open(f"{path}/{name}", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fds[False], b"a")
            for rule in _mknod_allowed(rules):
                os.write(fds[rule.allow], device_line(rule).encode())
        except OSError as error:
            raise OSError(error.errno, error.strerror, f"{path}/devices.allow") from None
    finally:
        for fd in fds.values():
            os.close(fd)
