"""The monitor's own seccomp filter: the system calls of the table and its own, nothing else.

A monitor that a payload had taken over could still call only what its payload may.  Everything
else is ENOSYS, which is what the table says to a payload too.
"""

from __future__ import annotations

import struct

from krun.monitor.builtin import hostcall, table

AUDIT_ARCH_X86_64 = 0xC000003E
RET_ALLOW, RET_ENOSYS, RET_KILL = 0x7FFF0000, 0x00050000 | 38, 0x80000000
LOAD, JUMP_EQUAL, JUMP_GREATER_EQUAL, RETURN = 0x20, 0x15, 0x35, 0x06
SYS_prctl, SYS_seccomp = 157, 317
PR_SET_NO_NEW_PRIVS = 38

# Numbers of the monitor's own calls that the payload's table lacks.
OWN = {"process_vm_readv": 310, "process_vm_writev": 311}


def numbers() -> list[int]:
    """The numbers that the filter allows, ascending."""
    table.load()
    by_name = {name: number for number, name in table.NAMES.items()}
    return sorted({*by_name.values(), *(by_name.get(n) or OWN[n] for n in _own_names(by_name))})


def _own_names(by_name: dict[str, int]) -> list[str]:
    return [name for name in table.MONITOR.split() if by_name.get(name) is None]


def ranges(allowed: list[int]) -> list[tuple[int, int]]:
    """Runs of consecutive numbers as [first, last + 1)."""
    found: list[tuple[int, int]] = []
    for number in allowed:
        if found and found[-1][1] == number:
            found[-1] = (found[-1][0], number + 1)
        else:
            found.append((number, number + 1))
    return found


def program(allowed: list[int]) -> list[tuple[int, int, int, int]]:
    """The filter as (code, jt, jf, k): a binary search over the borders of the ranges."""
    borders: list[tuple[int, int]] = [(0, RET_ENOSYS)]
    for first, last in ranges(allowed):
        if borders[-1][0] == first:
            borders[-1] = (first, RET_ALLOW)
        else:
            borders.append((first, RET_ALLOW))
        borders.append((last, RET_ENOSYS))

    def search(low: int, high: int) -> list[tuple[int, int, int, int]]:
        if high - low == 1:
            return [(RETURN, 0, 0, borders[low][1])]
        middle = (low + high) // 2
        left, right = search(low, middle), search(middle, high)
        if len(left) < 256:
            return [(JUMP_GREATER_EQUAL, len(left), 0, borders[middle][0]), *left, *right]
        # A conditional jump reaches 255 instructions; an unconditional one the rest.
        jump = (0x05, 0, 0, len(left))
        return [(JUMP_GREATER_EQUAL, 0, 1, borders[middle][0]), jump, *left, *right]

    return [
        (LOAD, 0, 0, 4),
        (JUMP_EQUAL, 1, 0, AUDIT_ARCH_X86_64),
        (RETURN, 0, 0, RET_KILL),
        (LOAD, 0, 0, 0),
        *search(0, len(borders)),
    ]


def decide(instructions: list[tuple[int, int, int, int]], number: int) -> int:
    """What the filter returns for a system call number, as the kernel would run it."""
    position = 0
    value = 0
    while True:
        code, true, false, k = instructions[position]
        position += 1
        if code == LOAD:
            value = AUDIT_ARCH_X86_64 if k == 4 else number
        elif code == RETURN:
            return k
        elif code == 0x05:
            position += k
        elif code == JUMP_EQUAL:
            position += true if value == k else false
        else:
            position += true if value >= k else false


def apply() -> None:
    """Install the filter for this process and what it forks; raises OSError.

    no_new_privs goes with it: the monitor itself never executes a program.
    """
    instructions = program(numbers())
    code = bytearray(b"".join(struct.pack("<HBBI", *each) for each in instructions))
    header = bytearray(struct.pack("<H6xQ", len(instructions), hostcall.address_of(code)))
    hostcall.checked("no_new_privs", SYS_prctl, PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    hostcall.checked("seccomp", SYS_seccomp, 1, 0, hostcall.address_of(header))
