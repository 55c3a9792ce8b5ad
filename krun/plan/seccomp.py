"""linux.seccomp -> the numbers that libseccomp takes; pure."""

from __future__ import annotations

from krun.errors import BadSpec
from krun.linux import flags as k
from krun.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# include/uapi/linux/seccomp.h; the errno or trace message is in the low 16 bits.
ACTIONS = {
    "SCMP_ACT_KILL": 0x00000000,
    "SCMP_ACT_KILL_THREAD": 0x00000000,
    "SCMP_ACT_KILL_PROCESS": 0x80000000,
    "SCMP_ACT_TRAP": 0x00030000,
    "SCMP_ACT_ERRNO": 0x00050000,
    "SCMP_ACT_NOTIFY": 0x7FC00000,
    "SCMP_ACT_TRACE": 0x7FF00000,
    "SCMP_ACT_LOG": 0x7FFC0000,
    "SCMP_ACT_ALLOW": 0x7FFF0000,
}
_WITH_DATA = ("SCMP_ACT_ERRNO", "SCMP_ACT_TRACE")
EPERM = 1
ENOSYS = 38

# AUDIT_ARCH_* of linux/audit.h; whether calls are x32's, which share x86_64's number.
_AUDIT: dict[str, tuple[int, bool | None]] = {
    "x86_64": (0xC000003E, False),
    "x32": (0xC000003E, True),
    "x86": (0x40000003, None),
}
_X32_BIT = 0x40000000
# BPF_LD | BPF_W | BPF_ABS, BPF_JMP | BPF_J*, BPF_RET of linux/filter.h.
_LOAD, _EQUAL, _ABOVE, _BITS, _RETURN = 0x20, 0x15, 0x25, 0x45, 0x06

OPERATORS = {
    "SCMP_CMP_NE": 1,
    "SCMP_CMP_LT": 2,
    "SCMP_CMP_LE": 3,
    "SCMP_CMP_EQ": 4,
    "SCMP_CMP_GE": 5,
    "SCMP_CMP_GT": 6,
    "SCMP_CMP_MASKED_EQ": 7,
}

_LOG = k.SECCOMP_FILTER_FLAG_LOG
FLAGS = {
    "SECCOMP_FILTER_FLAG_TSYNC": 0,
    "SECCOMP_FILTER_FLAG_LOG": _LOG,
    "SECCOMP_FILTER_FLAG_SPEC_ALLOW": k.SECCOMP_FILTER_FLAG_SPEC_ALLOW,
    "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV": k.SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV,
}


class Comparison(Record):
    """One condition on one argument of a system call."""

    argument: int
    operator: int
    value: int
    value_two: int


class Rule(Record):
    """What happens to some system calls when the conditions hold."""

    names: tuple[str, ...]
    action: int
    comparisons: tuple[Comparison, ...]


class Filter(Record):
    """A whole filter: architectures by libseccomp's names (x86_64), flags of seccomp(2).

    A call above all of `known` gets ENOSYS instead of the default action; without one, none.
    """

    default: int
    architectures: tuple[str, ...]
    rules: tuple[Rule, ...]
    flags: int
    notifies: bool
    known: tuple[str, ...]


def action(name: str, errno: int | None, where: str) -> int:
    """Return SECCOMP_RET_* with its data; raises BadSpec."""
    number = ACTIONS.get(name)
    if number is None:
        raise BadSpec(where, f"{name} is not an action of seccomp")
    if name not in _WITH_DATA:
        if errno:
            raise BadSpec(where, f"{name} takes no errnoRet")
        return number
    return number | ((EPERM if errno is None else errno) & 0xFFFF)


def plan_flags(section: dict[str, Any]) -> int:
    """Return the flags of seccomp(2)."""
    flags = 0
    for name in section.get("flags") or ():
        if name not in FLAGS:
            raise BadSpec("linux.seccomp.flags", f"{name} is not a flag")
        flags |= FLAGS[name]
    if section.get("flags") is None:
        # seccomp(2) skips a mitigation that costs every payload where nothing else is asked for,
        # as runc does; an empty list keeps it.
        return 0
    return flags


def notifies(section: dict[str, Any]) -> bool:
    """Tell whether some call is handed to a listener."""
    return any(one.get("action") == "SCMP_ACT_NOTIFY" for one in section.get("syscalls") or ())


def plan_filter(section: dict[str, Any]) -> Filter:
    """Return the filter of linux.seccomp; raises BadSpec."""
    where = "linux.seccomp"
    default_name = section["defaultAction"]
    if default_name == "SCMP_ACT_NOTIFY":
        raise BadSpec(f"{where}.defaultAction", "SCMP_ACT_NOTIFY would stop the runtime itself")
    default = action(default_name, section.get("defaultErrnoRet"), f"{where}.defaultAction")
    rules = []
    for index, one in enumerate(section.get("syscalls") or ()):
        here = f"{where}.syscalls[{index}]"
        number = action(one["action"], one.get("errnoRet"), f"{here}.action")
        if one["action"] == "SCMP_ACT_NOTIFY" and "write" in one["names"]:
            # The runtime itself would wait for its own answer.
            text = "SCMP_ACT_NOTIFY cannot be used for the write syscall"
            raise BadSpec(f"{here}.names", text)
        if number == default:
            continue
        rules.append(Rule(tuple(one["names"]), number, _comparisons(one, here)))
    names = tuple(
        name.removeprefix("SCMP_ARCH_").lower() for name in section.get("architectures") or ()
    )
    known: tuple[str, ...] = ()
    if default_name == "SCMP_ACT_ERRNO" and section.get("defaultErrnoRet") is None:
        known = tuple(name for one in section.get("syscalls") or () for name in one["names"])
    return Filter(default, names, tuple(rules), plan_flags(section), notifies(section), known)


def newer_calls(last: dict[str, int]) -> bytes:
    """Return instructions that give ENOSYS to calls above the last named one of an architecture.

    They go before the filter.  Who wrote it could not know such calls, and C libraries try an
    older call after ENOSYS, but not after EPERM (runc does the same).  seccomp_data has the
    number at 0 and the architecture at 4.
    """
    code = []
    for name, number in last.items():
        if name not in _AUDIT or number <= 0:
            continue
        architecture, x32 = _AUDIT[name]
        block = [(_LOAD, 0, 0, 4), (_EQUAL, 0, 0, architecture), (_LOAD, 0, 0, 0)]
        if x32 is not None:
            block.append((_BITS, 0 if x32 else 2, 2 if x32 else 0, _X32_BIT))
        block += [(_ABOVE, 0, 1, number), (_RETURN, 0, 0, ACTIONS["SCMP_ACT_ERRNO"] | ENOSYS)]
        # Another architecture goes on behind the block.
        block[1] = (_EQUAL, 0, len(block) - 2, architecture)
        code += block
    return b"".join(
        operation.to_bytes(2, "little") + bytes((true, false)) + value.to_bytes(4, "little")
        for operation, true, false, value in code
    )


def _comparisons(rule: dict[str, Any], where: str) -> tuple[Comparison, ...]:
    found = []
    for number, one in enumerate(rule.get("args") or ()):
        here = f"{where}.args[{number}]"
        operator = OPERATORS.get(one["op"])
        if operator is None:
            raise BadSpec(f"{here}.op", f"{one['op']} is not an operator")
        if not 0 <= one["index"] <= 5:
            raise BadSpec(f"{here}.index", "must be 0 to 5")
        found.append(Comparison(one["index"], operator, one["value"], one.get("valueTwo", 0)))
    return tuple(found)
