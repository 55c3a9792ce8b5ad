"""plan_process(): what one process of a container is to be; pure, for create and exec."""

from __future__ import annotations

from krun.errors import BadSpec
from krun.linux import flags as k
from krun.plan.model import Capabilities, Process, Rlimit

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from krun.types import Process as SpecProcess

_CAPABILITY = {f"CAP_{name}": 1 << number for number, name in enumerate(k.CAPABILITIES)}
_SETS = ("bounding", "effective", "inheritable", "permitted", "ambient")

# Far above any kernel's NR_CPUS: a longer number is a mistake, and a range up to it very long.
_CPU_DIGITS = 5

# (uid_t)-1
_NO_ID = (1 << 32) - 1

# sched_setattr(2)
_POLICIES = {
    "SCHED_OTHER": 0,
    "SCHED_FIFO": 1,
    "SCHED_RR": 2,
    "SCHED_BATCH": 3,
    "SCHED_ISO": 4,
    "SCHED_IDLE": 5,
    "SCHED_DEADLINE": 6,
}
_SCHED_FLAGS = {
    "SCHED_FLAG_RESET_ON_FORK": 0x01,
    "SCHED_FLAG_RECLAIM": 0x02,
    "SCHED_FLAG_DL_OVERRUN": 0x04,
    "SCHED_FLAG_KEEP_POLICY": 0x08,
    "SCHED_FLAG_KEEP_PARAMS": 0x10,
    "SCHED_FLAG_UTIL_CLAMP_MIN": 0x20,
    "SCHED_FLAG_UTIL_CLAMP_MAX": 0x40,
}

# ioprio_set(2)
_IO_CLASSES = {"IOPRIO_CLASS_RT": 1, "IOPRIO_CLASS_BE": 2, "IOPRIO_CLASS_IDLE": 3}


def plan_process(process: SpecProcess, where: str = "process") -> Process:
    """Return what a process of the container is to be; raises BadSpec."""
    user = process.get("user") or {}
    _check_ids(user, where)
    size = process.get("consoleSize")
    affinity = process.get("execCPUAffinity") or {}
    return Process(
        tuple(process.get("args") or ()),
        tuple(process.get("env") or ()),
        process.get("cwd") or "/",
        bool(process.get("terminal")),
        (size["height"], size["width"]) if size else None,
        user.get("uid", 0),
        user.get("gid", 0),
        tuple(user.get("additionalGids") or ()),
        user.get("umask"),
        plan_capabilities(process.get("capabilities")),
        tuple(_rlimits(process, where)),
        bool(process.get("noNewPrivileges")),
        process.get("oomScoreAdj"),
        process.get("apparmorProfile", ""),
        process.get("selinuxLabel", ""),
        _scheduler(process.get("scheduler"), where),
        _io_priority(process.get("ioPriority"), where),
        cpu_list(affinity.get("initial", ""), f"{where}.execCPUAffinity.initial"),
        cpu_list(affinity.get("final", ""), f"{where}.execCPUAffinity.final"),
    )


def _check_ids(user: Any, where: str) -> None:
    """Raise BadSpec for the id that the kernel takes for none: setresuid(2) would stay root."""
    numbers = [user.get("uid"), user.get("gid"), *(user.get("additionalGids") or ())]
    if _NO_ID in numbers:
        raise BadSpec(f"{where}.user", f"{_NO_ID} is no user or group")


def keeps_groups(annotations: dict[str, str]) -> bool:
    """Tell whether processes keep the groups of whoever calls krun (crun(1), Extensions to OCI)."""
    return annotations.get("run.oci.keep_original_groups", "0") != "0"


def plan_capabilities(sets: Any) -> Capabilities:
    """Return the five sets as masks; unknown names are left out, `ungranted` tells of them.

    A process without the sets has no capability, as with runc and crun.
    """
    sets = sets or {}
    return Capabilities(*[capability_mask(sets.get(name) or ()) for name in _SETS])


def capability_mask(names: Any) -> int:
    """Return capability names as a bit mask."""
    mask = 0
    for name in names:
        mask |= _CAPABILITY.get(name.upper(), 0)
    return mask


def unraised(sets: Any) -> list[str]:
    """Return the ambient capabilities that are not both permitted and inheritable.

    The kernel raises no other (capabilities(7)); the specification wants a warning.
    """
    found = plan_capabilities(sets)
    lacking = found.ambient & ~(found.permitted & found.inheritable)
    return [name for name, bit in _CAPABILITY.items() if bit & lacking]


def ungranted(sets: Any, available: int) -> list[str]:
    """Return the names that are no capability, or one not among those available, a mask.

    The specification wants a warning for what cannot be granted, and no failure (config.md).
    """
    names = {name for one in _SETS for name in (sets or {}).get(one) or ()}
    return sorted(name for name in names if not _CAPABILITY.get(name.upper(), 0) & available)


def _rlimits(process: SpecProcess, where: str) -> list[Rlimit]:
    limits = []
    seen = set()
    for index, limit in enumerate(process.get("rlimits") or ()):
        name = limit["type"]
        resource = k.RLIMITS.get(name)
        if resource is None:
            raise BadSpec(f"{where}.rlimits[{index}].type", f"{name} is not a resource limit")
        if name in seen:
            raise BadSpec(f"{where}.rlimits[{index}].type", f"{name} is listed twice")
        seen.add(name)
        limits.append(Rlimit(resource, limit["soft"], limit["hard"]))
    return limits


def _scheduler(scheduler: Any, where: str) -> bytes | None:
    """Return struct sched_attr (sched_setattr(2))."""
    if not scheduler:
        return None
    policy = _POLICIES.get(scheduler.get("policy", ""))
    if policy is None:
        raise BadSpec(f"{where}.scheduler.policy", "is not a scheduling policy")
    flags = 0
    for name in scheduler.get("flags") or ():
        if name not in _SCHED_FLAGS:
            raise BadSpec(f"{where}.scheduler.flags", f"{name} is not a flag")
        flags |= _SCHED_FLAGS[name]
    return (
        (48).to_bytes(4, "little")
        + policy.to_bytes(4, "little")
        + flags.to_bytes(8, "little")
        + int(scheduler.get("nice", 0)).to_bytes(4, "little", signed=True)
        + int(scheduler.get("priority", 0)).to_bytes(4, "little", signed=True)
        + b"".join(
            int(scheduler.get(name, 0)).to_bytes(8, "little")
            for name in ("runtime", "deadline", "period")
        )
    )


def is_realtime(process: Any) -> bool:
    """Tell whether a process asks for a policy that takes a cgroup's real-time share (v1)."""
    return (process.get("scheduler") or {}).get("policy") in ("SCHED_FIFO", "SCHED_RR")


def _io_priority(priority: Any, where: str) -> int | None:
    if not priority:
        return None
    number = _IO_CLASSES.get(priority.get("class", ""))
    if number is None:
        raise BadSpec(f"{where}.ioPriority.class", "is not an I/O priority class")
    level = int(priority.get("priority", 0))
    if not 0 <= level <= 7:
        raise BadSpec(f"{where}.ioPriority.priority", "must be 0 to 7")
    return number << 13 | level


def cpu_list(text: str, where: str) -> tuple[int, ...]:
    """Return a list of CPUs such as 0-3,7 as numbers; raises BadSpec."""
    cpus: set[int] = set()
    for part in text.replace(" ", "").split(","):
        if not part:
            continue
        first, dash, last = part.partition("-")
        ends = [first, last] if dash else [first, first]
        plain = part.isascii() and all(end.isdigit() for end in ends)
        if not plain or max(map(len, ends)) > _CPU_DIGITS:
            raise BadSpec(where, f"{part} is not a range of CPUs")
        cpus.update(range(int(ends[0]), int(ends[1]) + 1))
    return tuple(sorted(cpus))
