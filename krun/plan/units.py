"""A container's scope for systemd: name, slice and properties (systemd.resource-control(5)).

Everything that is written to cgroup files is told to systemd too, which otherwise would put its
own values back whenever it looks at the unit again.
"""

from __future__ import annotations

from krun.errors import BadSpec
from krun.plan.model import Unit

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from krun.plan.model import Rule, Write

    Property = tuple[str, str, Any]

_WHERE = "linux.cgroupsPath"
_ANNOTATION = "org.systemd.property."
# What systemd calls "no limit".
_INFINITY = (1 << 64) - 1
# systemd rounds a quota to this many microseconds a second.
_QUOTA_STEP = 10_000


def plan_unit(
    path: str,
    identifier: str,
    *,
    version: int,
    writes: tuple[Write, ...],
    rules: tuple[Rule, ...],
    annotations: dict[str, str],
) -> Unit:
    """Return the scope of a container; raises BadSpec.

    path is slice:prefix:name, or empty for krun-ID.scope where systemd puts it by itself.
    """
    name, slice_ = f"krun-{identifier}.scope", ""
    if path:
        parts = path.split(":")
        if len(parts) != 3 or not parts[2]:
            hint = "leave it out, or use --cgroup-manager cgroupfs"
            raise BadSpec(_WHERE, f"{path} is not slice:prefix:name, as systemd needs it", hint)
        slice_, prefix, own = parts
        if own.endswith(".slice"):
            raise BadSpec(_WHERE, f"{own} is a slice, a container is a scope")
        name = f"{prefix}-{own}.scope" if prefix else f"{own}.scope"
    _check_slice(slice_)
    _check_name(name)
    properties = [
        *of_resources(writes, version),
        *_of_devices(rules),
        *_of_annotations(annotations),
    ]
    return Unit(name, slice_, tuple(properties))


def _check_name(name: str) -> None:
    # systemd.unit(5): letters, digits, and these; 255 characters.
    if len(name) > 255 or not all(c.isascii() and (c.isalnum() or c in ":-_.\\") for c in name):
        raise BadSpec(_WHERE, f"{name} is not the name of a unit")


def _check_slice(name: str) -> None:
    if not name or name == "-.slice":
        return
    stem = name.removesuffix(".slice")
    if stem == name or not stem or any(not part for part in stem.split("-")):
        raise BadSpec(_WHERE, f"{name} is not the name of a slice")
    _check_name(name)


def _number(value: str) -> int:
    return _INFINITY if value == "max" or value.startswith("-") else int(value)


def _single(name: str) -> Callable[[str], list[Property]]:
    return lambda value: [(name, "t", _number(value))]


def _quota(value: str) -> list[Property]:
    """Return the properties of cpu.max, whose value is quota and period in microseconds."""
    quota, _, period = value.partition(" ")
    microseconds = int(period or 100_000)
    answer: list[Property] = []
    if period:
        answer.append(("CPUQuotaPeriodUSec", "t", microseconds))
    second = _INFINITY
    if quota != "max" and not quota.startswith("-"):
        second = int(quota) * 1_000_000 // microseconds
        second = -(-second // _QUOTA_STEP) * _QUOTA_STEP
    answer.append(("CPUQuotaPerSecUSec", "t", second))
    return answer


def _mask(name: str) -> Callable[[str], list[Property]]:
    def properties(value: str) -> list[Property]:
        # Here: build imports this module.
        from krun.plan.process import cpu_list

        mask = sum(1 << number for number in cpu_list(value, f"linux.resources.cpu.{name}"))
        return [(name, "ay", mask.to_bytes((mask.bit_length() + 7) // 8, "little"))]

    return properties


def _weight(value: str) -> list[Property]:
    """Return an I/O weight; one of a single device is krun's alone to write."""
    return [("IOWeight", "t", int(value))] if value.isdigit() else []


_FILES = {
    "memory.max": _single("MemoryMax"),
    "memory.high": _single("MemoryHigh"),
    "memory.low": _single("MemoryLow"),
    "memory.min": _single("MemoryMin"),
    "memory.swap.max": _single("MemorySwapMax"),
    "cpu.weight": _single("CPUWeight"),
    "cpu.max": _quota,
    "cpuset.cpus": _mask("AllowedCPUs"),
    "cpuset.mems": _mask("AllowedMemoryNodes"),
    "io.weight": _weight,
    "io.bfq.weight": _weight,
    "pids.max": _single("TasksMax"),
    "memory.limit_in_bytes": _single("MemoryLimit"),
    "cpu.shares": _single("CPUShares"),
    "blkio.weight": _single("BlockIOWeight"),
}


def of_resources(writes: tuple[Write, ...], version: int) -> list[Property]:
    """Return the properties of limits for cgroup v1 or v2."""
    values = {one.file: one.value for one in writes}
    # v1 has quota and period in two files, and a cpuset that systemd does not manage.
    quota, period = values.pop("cpu.cfs_quota_us", ""), values.pop("cpu.cfs_period_us", "")
    if quota:
        values["cpu.max"] = f"{quota} {period}".strip()
    answer: list[Property] = []
    for file, value in values.items():
        properties = _FILES.get(file)
        if properties is None or (file.startswith("cpuset") and version != 2):
            continue
        try:
            answer += properties(value)
        except ValueError:
            # Of linux.resources.unified: the kernel says what is wrong with it.
            continue
    return answer


def _of_devices(rules: tuple[Rule, ...]) -> list[Property]:
    """Return the device policy; rules begin with everything denied.

    systemd has no exceptions: what a later rule denies of an allowed range is krun's to deny.
    """
    allowed: list[tuple[str, str]] = []
    for rule in rules:
        if rule.kind == "a":
            if rule.allow:
                return [("DevicePolicy", "s", "auto"), ("DeviceAllow", "a(ss)", [])]
            allowed = []
            continue
        kind = "char" if rule.kind == "c" else "block"
        if rule.major == -1:
            name = f"{kind}-*"
        elif rule.minor == -1:
            name = f"{kind}-{rule.major}"
        else:
            name = f"/dev/{kind}/{rule.major}:{rule.minor}"
        if rule.allow:
            allowed.append((name, rule.access))
        else:
            allowed = [one for one in allowed if one != (name, rule.access)]
    return [("DevicePolicy", "s", "strict"), ("DeviceAllow", "a(ss)", allowed)]


def _of_annotations(annotations: dict[str, str]) -> list[Property]:
    """Return the properties that annotations org.systemd.property.NAME ask for (runc, crun)."""
    answer = []
    for key, text in annotations.items():
        name = key.removeprefix(_ANNOTATION)
        if name == key:
            continue
        where = f"annotations.{key}"
        if not (name.isascii() and name.isalpha() and name[0].isupper()):
            raise BadSpec(where, f"{name} is not the name of a property")
        signature, value = variant(text.strip(), where)
        if name.endswith("Sec") and not name.endswith("USec") and signature in "iuxt":
            # In the unit file's name and unit, seconds.
            name, signature, value = f"{name[:-3]}USec", "t", value * 1_000_000
        answer.append((name, signature, value))
    return answer


_TYPES = {"byte": "y", "int32": "i", "uint32": "u", "int64": "x", "uint64": "t"}


def variant(text: str, where: str) -> tuple[str, Any]:
    """Return signature and value of a text in GVariant's form; raises BadSpec.

    Known are strings, booleans, integers with and without a type, and lists of strings.
    """
    if text in ("true", "false"):
        return "b", text == "true"
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return "s", text[1:-1]
    if text[:1] == "[" and text[-1:] == "]":
        parts = [part.strip() for part in text[1:-1].split(",") if part.strip()]
        values = [variant(part, where) for part in parts]
        if all(signature == "s" for signature, _ in values):
            return "as", [value for _, value in values]
    kind, _, digits = text.rpartition(" ")
    if digits.removeprefix("-").isdecimal() and digits.isascii() and kind in ("", *_TYPES):
        signature, value = _TYPES.get(kind, "i"), int(digits)
        size = {"y": 8, "i": 31, "u": 32, "x": 63, "t": 64}[signature]
        if -(1 << size if signature in "ix" else 0) <= value < 1 << size:
            return signature, value
    raise BadSpec(where, f"{text} is not a string, boolean, integer or list of strings of GVariant")
