"""The device rules of a v2 cgroup: an eBPF program of type CGROUP_DEVICE (bpf(2)).

The program gets struct bpf_cgroup_dev_ctx { u32 access_type; u32 major; u32 minor; }, where the
low half of access_type is the kind of device and the high half the access asked for.
"""

from __future__ import annotations

import errno
import os

from krun.errors import KrunError
from krun.linux.flags import SYS_bpf
from krun.linux.libc import buffer, pinned, syscall

TYPE_CHECKING = False
if TYPE_CHECKING:
    from krun.plan.model import Rule

_BPF_PROG_LOAD = 5
_BPF_PROG_ATTACH = 8
_BPF_PROG_DETACH = 9
_BPF_PROG_QUERY = 16
_BPF_PROG_GET_FD_BY_ID = 13
_BPF_PROG_TYPE_CGROUP_DEVICE = 15
_BPF_CGROUP_DEVICE = 6
_BPF_F_ALLOW_MULTI = 2

_KINDS = {"b": 1, "c": 2}
_ACCESS = {"m": 1, "r": 2, "w": 4}

# Instruction codes (linux/bpf.h, linux/bpf_common.h).
_LDX_W = 0x61
_MOV_REG = 0xBC
_MOV_IMM = 0xB7
_AND_IMM = 0x54
_RSH_IMM = 0x74
_JNE_IMM = 0x55
_JNE_REG = 0x5D
_EXIT = 0x95


def _instruction(code: int, dst: int, src: int, offset: int, immediate: int) -> bytes:
    return (
        bytes((code, src << 4 | dst))
        + offset.to_bytes(2, "little", signed=True)
        + (immediate & 0xFFFFFFFF).to_bytes(4, "little")
    )


def assemble(rules: tuple[Rule, ...]) -> bytes:
    """Return the program: the last rule that matches wins, without one access is denied.

    r2 is the kind, r3 the access asked for, r4 the major and r5 the minor number.  An allowing
    rule matches when all that is asked for is in it, a denying one when any of it is.
    """
    program = [
        _instruction(_LDX_W, 2, 1, 0, 0),
        _instruction(_MOV_REG, 3, 2, 0, 0),
        _instruction(_AND_IMM, 2, 0, 0, 0xFFFF),
        _instruction(_RSH_IMM, 3, 0, 0, 16),
        _instruction(_LDX_W, 4, 1, 4, 0),
        _instruction(_LDX_W, 5, 1, 8, 0),
    ]
    for rule in reversed(rules):
        block = _block(rule)
        program += block
        if len(block) == 2:
            # It matches everything: what comes before it can never decide, and the verifier
            # refuses instructions that are never reached.
            return b"".join(program)
    program += [_instruction(_MOV_IMM, 0, 0, 0, 0), _instruction(_EXIT, 0, 0, 0, 0)]
    return b"".join(program)


def _block(rule: Rule) -> list[bytes]:
    """Return the instructions of one rule; jumps lead behind it."""
    tests: list[tuple[int, int, int, int]] = []
    if rule.kind in _KINDS:
        tests.append((_JNE_IMM, 2, 0, _KINDS[rule.kind]))
    access = 0
    for letter in rule.access:
        access |= _ACCESS.get(letter, 0)
    masked = access != 7
    if rule.major != -1:
        tests.append((_JNE_IMM, 4, 0, rule.major))
    if rule.minor != -1:
        tests.append((_JNE_IMM, 5, 0, rule.minor))
    body: list[tuple[int, int, int, int]] = []
    if masked:
        body.append((_MOV_REG, 1, 3, 0))
        body.append((_AND_IMM, 1, 0, access))
        # allow: (asked & access) == asked; deny: (asked & access) != 0
        body.append((_JNE_REG, 1, 3, 0) if rule.allow else (0x15, 1, 0, 0))
    tail = [
        _instruction(_MOV_IMM, 0, 0, 0, int(rule.allow)),
        _instruction(_EXIT, 0, 0, 0, 0),
    ]
    lines = tests + body
    total = len(lines) + len(tail)
    block = []
    for index, (code, dst, src, immediate) in enumerate(lines):
        jump = code in (_JNE_IMM, _JNE_REG, 0x15)
        block.append(_instruction(code, dst, src, total - index - 1 if jump else 0, immediate))
    return block + tail


def attach_device_filter(path: str, rules: tuple[Rule, ...]) -> None:
    """Load the program and attach it to a v2 cgroup in place of those attached before.

    Raises KrunError where the kernel has no such programs.
    """
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        old = _attached(directory)
        new = _load(assemble(rules))
        try:
            _attach(directory, new, _BPF_PROG_ATTACH, _BPF_F_ALLOW_MULTI)
        finally:
            os.close(new)
        for number in old:
            fd = _command(_BPF_PROG_GET_FD_BY_ID, number.to_bytes(4, "little") + bytes(12))
            try:
                _attach(directory, fd, _BPF_PROG_DETACH, 0)
            finally:
                os.close(fd)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ENOSYS):
            text = f"device rules of {path}: {error.strerror}"
            raise KrunError(text, "the kernel lacks CONFIG_CGROUP_BPF") from error
        raise OSError(error.errno, error.strerror, path) from None
    finally:
        os.close(directory)


def _command(command: int, attributes: bytes) -> int:
    return syscall(SYS_bpf, command, attributes, len(attributes))


def _load(program: bytes) -> int:
    holder, address = pinned(program)
    licence, licence_address = pinned(b"GPL\0")
    attributes = (
        _BPF_PROG_TYPE_CGROUP_DEVICE.to_bytes(4, "little")
        + (len(program) // 8).to_bytes(4, "little")
        + address.to_bytes(8, "little")
        + licence_address.to_bytes(8, "little")
        + bytes(24)
    )
    fd = _command(_BPF_PROG_LOAD, attributes)
    del holder, licence
    return fd


def _attach(directory: int, program: int, command: int, flags: int) -> None:
    words = (directory, program, _BPF_CGROUP_DEVICE, flags)
    _command(command, b"".join(word.to_bytes(4, "little") for word in words))


def _attached(directory: int) -> list[int]:
    """Return the ids of the device programs attached to the cgroup itself."""
    ids = buffer(4 * 64)
    from _ctypes import addressof

    attributes = buffer(32)
    head = (
        directory.to_bytes(4, "little")
        + _BPF_CGROUP_DEVICE.to_bytes(4, "little")
        + bytes(8)
        + addressof(ids).to_bytes(8, "little")
        + (64).to_bytes(4, "little")
        + bytes(4)
    )
    attributes[:] = head
    syscall(SYS_bpf, _BPF_PROG_QUERY, attributes, 32)
    count = int.from_bytes(bytes(attributes)[24:28], "little")
    raw = bytes(ids)
    return [int.from_bytes(raw[i * 4 : i * 4 + 4], "little") for i in range(count)]
