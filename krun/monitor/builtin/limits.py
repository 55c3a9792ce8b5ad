"""System calls about the process's resource limits."""

from __future__ import annotations

import struct

from krun.monitor.builtin import hostcall
from krun.monitor.builtin.arguments import INT, buffer, signed
from krun.monitor.builtin.hostcall import call
from krun.monitor.builtin.process import Process
from krun.monitor.builtin.thread import Thread

EPERM, EFAULT, EINVAL = 1, 14, 22

RLIMIT_CORE, RLIMIT_NOFILE, RLIMITS = 4, 7, 16


def _limit(process: Process, resource: int) -> tuple[int, int]:
    """The payload's view of a limit: the monitor keeps descriptors above NOFILE for itself."""
    if resource in process.limits:
        return process.limits[resource]
    data = bytearray(16)
    result = call(302, 0, resource, 0, hostcall.address_of(data))
    if result < 0:
        raise OSError(-result, "prlimit64")
    soft, hard = struct.unpack("<QQ", data)
    return soft, hard


def sys_getrlimit(thread: Thread, resource: int, address: int) -> int:
    if not address:
        return -EFAULT if resource & INT < RLIMITS else -EINVAL
    return sys_prlimit64(thread, 0, resource, 0, address)


def sys_setrlimit(thread: Thread, resource: int, address: int) -> int:
    if not address:
        return -EFAULT
    return sys_prlimit64(thread, 0, resource, address, 0)


def sys_prlimit64(thread: Thread, pid: int, resource: int, new: int, old: int) -> int:
    process = thread.process
    memory = process.memory
    resource &= INT
    if signed(pid) not in (0, memory.pid):
        return call(
            302,
            signed(pid),
            resource,
            buffer(thread, new, 16, 1) if new else 0,
            buffer(thread, old, 16, 2) if old else 0,
        )
    wanted = struct.unpack("<QQ", memory.read(new, 16)) if new else None
    if old:
        memory.host(old, 16, 2)
    try:
        before = _limit(process, resource)
    except OSError as error:
        return -(error.errno or EINVAL)
    if wanted is not None:
        soft, hard = wanted
        if soft > hard:
            return -EINVAL
        if resource in (RLIMIT_NOFILE, RLIMIT_CORE):
            if hard > before[1] or (resource == RLIMIT_NOFILE and soft > process.floor):
                return -EPERM
            process.limits[resource] = (soft, hard)
        else:
            place = thread.scratch.put(struct.pack("<QQ", soft, hard), 1024)
            result = call(302, 0, resource, place, 0)
            if result < 0:
                return result
    if old:
        memory.write(old, struct.pack("<QQ", *before))
    return 0
