"""System V shared memory, semaphores and message queues: the host's, of the container's namespace.

Structures are those of asm-generic/shmbuf.h, sembuf.h and msgbuf.h; commands of linux/ipc.h.
"""

from __future__ import annotations

import struct

from krun.monitor.builtin.arguments import INT, buffer, signed
from krun.monitor.builtin.blocking import interruptible
from krun.monitor.builtin.hostcall import Scratch, call
from krun.monitor.builtin.signals import Interrupted

TYPE_CHECKING = False
if TYPE_CHECKING:
    from krun.monitor.builtin.thread import Thread

EINVAL, E2BIG = 22, 7
PAGE = 4096
SYS_shmctl, SYS_semop, SYS_semctl, SYS_msgsnd, SYS_msgrcv, SYS_msgctl = 31, 65, 66, 69, 70, 71
SYS_semtimedop = 220
IPC_RMID, IPC_SET, IPC_STAT, IPC_INFO = 0, 1, 2, 3
IPC_NOWAIT = 0o4000
SHM_RDONLY, SHM_RND, SHM_REMAP, SHM_EXEC = 0o10000, 0o20000, 0o40000, 0o100000

# What the kernel reads (1) or writes (2) at the pointer of each command, and its size.
SHM = {IPC_SET: (1, 112), IPC_STAT: (2, 112), IPC_INFO: (2, 72), 13: (2, 112), 14: (2, 48)}
SHM |= {15: (2, 112), IPC_RMID: (0, 0), 11: (0, 0), 12: (0, 0)}
SEM = {IPC_SET: (1, 104), IPC_STAT: (2, 104), IPC_INFO: (2, 40), 18: (2, 104), 19: (2, 40)}
SEM |= {20: (2, 104), IPC_RMID: (0, 0), 11: (0, 0), 12: (0, 0), 14: (0, 0), 15: (0, 0), 16: (0, 0)}
MSG = {IPC_SET: (1, 120), IPC_STAT: (2, 120), IPC_INFO: (2, 32), 11: (2, 120), 12: (2, 32)}
MSG |= {13: (2, 120), IPC_RMID: (0, 0)}
GETALL, SETALL = 13, 17


def _pointer(
    thread: Thread, commands: dict[int, tuple[int, int]], command: int, address: int
) -> int:
    direction, size = commands[command]
    return buffer(thread, address, size, direction) if direction else address


def sys_shmctl(thread: Thread, number: int, command: int, address: int) -> int:
    command &= INT
    if command not in SHM:
        return -EINVAL
    return call(31, signed(number), command, _pointer(thread, SHM, command, address))


def sys_msgctl(thread: Thread, number: int, command: int, address: int) -> int:
    command &= INT
    if command not in MSG:
        return -EINVAL
    return call(71, signed(number), command, _pointer(thread, MSG, command, address))


def sys_semctl(thread: Thread, number: int, index: int, command: int, argument: int) -> int:
    command &= INT
    if command in (GETALL, SETALL):
        return _all_values(thread, number, command, argument)
    if command not in SEM:
        return -EINVAL
    argument = _pointer(thread, SEM, command, argument)
    return call(SYS_semctl, signed(number), signed(index), command, argument)


def _all_values(thread: Thread, number: int, command: int, address: int) -> int:
    """GETALL and SETALL: as many shorts as the set has semaphores, which the kernel alone knows.

    So they go through memory that ends where it must, whatever the id means by then.
    """
    memory = thread.process.memory
    result = call(SYS_semctl, signed(number), 0, IPC_STAT, thread.scratch.address + 1024)
    if result < 0:
        return result
    # sem_nsems of struct semid64_ds.
    size = 2 * struct.unpack_from("<Q", thread.scratch.view, 1024 + 80)[0]
    copy = Scratch((size + PAGE - 1) & -PAGE, 1 << 32)
    try:
        if command == SETALL:
            copy.put(memory.read(address, size))
        result = call(SYS_semctl, signed(number), 0, command, copy.address)
        if command == GETALL and result >= 0:
            memory.write(address, copy.get(size))
    finally:
        copy.release()
    return result


def sys_semop(thread: Thread, number: int, operations: int, count: int) -> int:
    return sys_semtimedop(thread, number, operations, count, 0)


def sys_semtimedop(thread: Thread, number: int, operations: int, count: int, timeout: int) -> int:
    count &= INT
    if not count:
        return -EINVAL
    if count > 500:
        # SEMOPM of the kernel.
        return -E2BIG
    place = buffer(thread, operations, 6 * count, 1)
    limit = buffer(thread, timeout, 16, 1) if timeout else 0
    try:
        return interruptible(thread, SYS_semtimedop, signed(number), place, count, limit)
    except Interrupted as error:
        raise Interrupted(False) from error


def sys_msgsnd(thread: Thread, number: int, message: int, size: int, flags: int) -> int:
    if size >= 1 << 31:
        return -EINVAL
    place = buffer(thread, message, 8 + size, 1)
    try:
        return interruptible(thread, SYS_msgsnd, signed(number), place, size, flags)
    except Interrupted as error:
        raise Interrupted(False) from error


def sys_msgrcv(thread: Thread, number: int, message: int, size: int, kind: int, flags: int) -> int:
    if size >= 1 << 31:
        return -EINVAL
    place = buffer(thread, message, 8 + size, 2)
    try:
        return interruptible(thread, SYS_msgrcv, signed(number), place, size, kind, flags)
    except Interrupted as error:
        raise Interrupted(False) from error


def sys_shmat(thread: Thread, number: int, address: int, flags: int) -> int:
    """The segment's pages are laid over a slot's, as a shared mapping is."""
    flags &= INT
    if address & (PAGE - 1):
        if not flags & SHM_RND:
            return -EINVAL
        address &= -PAGE
    if not address and flags & SHM_REMAP:
        return -EINVAL
    # The namespace's view of it is asked first, so errors are the kernel's.
    scratch = Scratch(PAGE)
    try:
        result = call(SYS_shmctl, signed(number), IPC_STAT, scratch.address)
        size = struct.unpack_from("<Q", scratch.view, 48)[0]
    finally:
        scratch.release()
    if result < 0:
        return result
    prot = 1 if flags & SHM_RDONLY else 3
    if flags & SHM_EXEC:
        prot |= 4
    return thread.process.memory.attach(
        signed(number), size, address, prot, bool(flags & SHM_REMAP)
    )


def sys_shmdt(thread: Thread, address: int) -> int:
    return thread.process.memory.detach(address)
