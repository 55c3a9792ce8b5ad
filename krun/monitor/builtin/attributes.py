"""System calls about what a process is: its names, groups, capabilities and processor state."""

from __future__ import annotations

import struct

from krun.monitor.builtin import cpu
from krun.monitor.builtin.arguments import INT, buffer, signed
from krun.monitor.builtin.hostcall import call
from krun.monitor.builtin.space import TASK_SIZE
from krun.monitor.builtin.thread import Thread

EPERM, EINVAL, ENOSYS = 1, 22, 38


def sys_rseq(thread: Thread, address: int, size: int, flags: int, signature: int) -> int:
    """No restartable sequences: the C library does without."""
    return -ENOSYS


CAPABILITY_VERSION_1 = struct.pack("<I", 0x19980330)
ARCH_SET_GS, ARCH_SET_FS, ARCH_GET_FS, ARCH_GET_GS = 0x1001, 0x1002, 0x1003, 0x1004


def sys_arch_prctl(thread: Thread, code: int, address: int) -> int:
    code &= INT
    if code in (ARCH_SET_FS, ARCH_SET_GS):
        if address >= TASK_SIZE:
            return -EPERM
        thread.set_base(cpu.S_FS if code == ARCH_SET_FS else cpu.S_GS, address)
        return 0
    if code in (ARCH_GET_FS, ARCH_GET_GS):
        base = thread.base(cpu.S_FS if code == ARCH_GET_FS else cpu.S_GS)
        thread.process.memory.write(address, struct.pack("<Q", base))
        return 0
    return -EINVAL


def sys_uname(thread: Thread, address: int) -> int:
    result = call(63, thread.scratch.address)
    if result < 0:
        return result
    data = bytearray(thread.scratch.get(390))
    release = bytes(data[130:195]).split(b"\0", 1)[0][:52] + b".kontain.KVM"
    data[130:195] = release.ljust(65, b"\0")
    thread.process.memory.write(address, data)
    return 0


# option: what its second argument is: "v" a value, "o4" an int to write, "i16" a name to read.
PRCTLS = {
    1: "v",
    2: "o4",
    7: "v",
    8: "v",
    15: "i16",
    16: "o16",
    23: "v",
    24: "v",
    27: "v",
    28: "v",
    29: "v",
    30: "v",
    36: "v",
    37: "o4",
    38: "v",
    39: "v",
    41: "v",
    42: "v",
    47: "v",
}
PR_GET_DUMPABLE, PR_SET_DUMPABLE, PR_SET_NAME = 3, 4, 15
PR_SET_NO_NEW_PRIVS, PR_GET_NO_NEW_PRIVS = 38, 39


def sys_prctl(thread: Thread, option: int, second: int, third: int, fourth: int, fifth: int) -> int:
    option &= INT
    if option == PR_GET_DUMPABLE:
        return 1
    if option == PR_SET_DUMPABLE:
        return 0 if second in (0, 1) else -EINVAL
    if option == PR_GET_NO_NEW_PRIVS and not second | third | fourth | fifth:
        # The monitor's own filter has set it, the payload may not have.
        return int(thread.process.no_new_privs)
    kind = PRCTLS.get(option)
    if kind is None:
        return -EINVAL
    if option == PR_SET_NAME:
        name = thread.process.memory.string(second, 16)[:15]
        return call(157, option, thread.scratch.put(name + b"\0", 1024))
    if kind != "v":
        second = buffer(thread, second, int(kind[1:]), 2)
    result = call(157, option, second, third, fourth, fifth)
    if option == PR_SET_NO_NEW_PRIVS and result == 0:
        thread.process.no_new_privs = True
    return result


def sys_personality(thread: Thread, persona: int) -> int:
    return 0 if persona & INT in (0, INT) else -EINVAL


def sys_getcpu(thread: Thread, processor: int, node: int) -> int:
    memory = thread.process.memory
    result = call(309, thread.scratch.address, thread.scratch.address + 4, 0)
    if result < 0:
        return result
    data = thread.scratch.get(8)
    if processor:
        memory.write(processor, data[:4])
    if node:
        memory.write(node, data[4:])
    return 0


def sys_sched_getaffinity(thread: Thread, pid: int, size: int, address: int) -> int:
    size &= INT
    return call(204, signed(pid), size, buffer(thread, address, min(size, 1 << 16), 2))


def sys_getgroups(thread: Thread, count: int, address: int) -> int:
    size = signed(count)
    if size < 0:
        return -EINVAL
    return call(115, size, buffer(thread, address, 4 * min(size, 65536), 2) if size else 0)


def sys_setgroups(thread: Thread, count: int, address: int) -> int:
    size = signed(count)
    if not 0 <= size <= 65536:
        return -EINVAL
    return call(116, size, buffer(thread, address, 4 * size, 1) if size else 0)


def _capabilities(thread: Thread, number: int, header: int, data: int, prot: int) -> int:
    """The header says how large the data is, so the kernel reads the copy that was looked at."""
    memory = thread.process.memory
    copy = memory.read(header, 8)
    size = 12 if copy[:4] == CAPABILITY_VERSION_1 else 24
    place = thread.scratch.put(copy, 1024)
    result = call(number, place, buffer(thread, data, size, prot) if data else 0)
    after = thread.scratch.get(8, 1024)
    if after != copy:
        # An unknown version is answered with the preferred one.
        memory.write(header, after)
    return result


def sys_capget(thread: Thread, header: int, data: int) -> int:
    return _capabilities(thread, 125, header, data, 2)


def sys_capset(thread: Thread, header: int, data: int) -> int:
    return _capabilities(thread, 126, header, data, 1)
