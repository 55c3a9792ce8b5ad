"""Credentials and limits of the calling process: capabilities, ids, rlimits, no_new_privs.

All by raw system call: importing python-prctl costs a millisecond on the path of every start and
covers a part of what is needed here (docs/decisions).
"""

from __future__ import annotations

import os

from krun.linux.flags import (
    PR_CAP_AMBIENT,
    PR_CAP_AMBIENT_CLEAR_ALL,
    PR_CAP_AMBIENT_RAISE,
    PR_CAPBSET_DROP,
    PR_CAPBSET_READ,
    PR_SET_CHILD_SUBREAPER,
    PR_SET_DUMPABLE,
    PR_SET_KEEPCAPS,
    PR_SET_NO_NEW_PRIVS,
    SYS_capget,
    SYS_capset,
    SYS_close_range,
    SYS_keyctl,
    SYS_prctl,
    SYS_prlimit64,
)
from krun.linux.libc import buffer, syscall

TYPE_CHECKING = False
if TYPE_CHECKING:
    from krun.plan.model import Capabilities

_CAPABILITY_VERSION_3 = 0x20080522
_INFINITY = (1 << 64) - 1


def prctl(option: int, argument: int = 0, second: int = 0) -> int:
    """prctl(2)."""
    return syscall(SYS_prctl, option, argument, second, 0, 0)


def set_dumpable(dumpable: bool) -> None:
    """Say whether others may trace this process and open /proc/PID/{exe,fd,mem}."""
    prctl(PR_SET_DUMPABLE, int(dumpable))


def set_child_subreaper() -> None:
    """Become the parent of descendants whose own parent ends."""
    prctl(PR_SET_CHILD_SUBREAPER, 1)


def set_no_new_privs() -> None:
    """Make execve grant nothing from now on."""
    prctl(PR_SET_NO_NEW_PRIVS, 1)


def set_keepcaps(keep: bool) -> None:
    """Keep the permitted set while the user id changes away from 0."""
    prctl(PR_SET_KEEPCAPS, int(keep))


def permitted() -> int:
    """Return the permitted capability set of this process as a bit mask."""
    header = _CAPABILITY_VERSION_3.to_bytes(4, "little") + bytes(4)
    data = buffer(24)
    syscall(SYS_capget, header, data)
    sets = bytes(data)
    return int.from_bytes(sets[4:8], "little") | int.from_bytes(sets[16:20], "little") << 32


def bounding() -> int:
    """Return the bounding set of this process as a bit mask."""
    mask = 0
    for number in range(64):
        try:
            if prctl(PR_CAPBSET_READ, number):
                mask |= 1 << number
        except OSError:
            break
    return mask


def drop_bounding(keep: int) -> None:
    """Drop every capability outside the mask keep from the bounding set."""
    for number in range(64):
        if keep >> number & 1:
            continue
        try:
            prctl(PR_CAPBSET_DROP, number)
        except OSError as error:
            if error.errno == 22:
                # Above the kernel's last capability.
                return
            raise


def capset(sets: Capabilities) -> None:
    """Set the effective, permitted, inheritable and ambient sets."""
    words = []
    for shift in (0, 32):
        for mask in (sets.effective, sets.permitted, sets.inheritable):
            words.append((mask >> shift & 0xFFFFFFFF).to_bytes(4, "little"))
    header = _CAPABILITY_VERSION_3.to_bytes(4, "little") + bytes(4)
    syscall(SYS_capset, header, b"".join(words))
    prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL)
    for number in range(64):
        if sets.ambient >> number & 1:
            prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, number)


def set_ids(uid: int, gid: int, groups: tuple[int, ...], keep_groups: bool) -> None:
    """Become uid, gid and groups; with keep_groups the groups stay (setgroups is denied)."""
    if not keep_groups:
        os.setgroups(groups)
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)


def setrlimit(pid: int, resource: int, soft: int, hard: int) -> None:
    """prlimit(2): limits of pid (0 is the caller); 2**64 - 1 is no limit."""
    limits = (soft & _INFINITY).to_bytes(8, "little") + (hard & _INFINITY).to_bytes(8, "little")
    syscall(SYS_prlimit64, pid, resource, limits, None)


def close_on_exec_from(first: int) -> None:
    """Mark every descriptor from first on as close-on-exec (close_range(2), Linux 5.11)."""
    syscall(SYS_close_range, first, 0xFFFFFFFF, 4)


def join_session_keyring(name: str) -> int:
    """Join a new session keyring of that name; returns its serial number (keyctl(2))."""
    return syscall(SYS_keyctl, 1, os.fsencode(name), 0, 0, 0)
