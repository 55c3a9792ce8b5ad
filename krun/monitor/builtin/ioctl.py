"""ioctl(2): the requests that a payload may make of terminals, sockets and block devices."""

from __future__ import annotations

import struct

from krun.monitor.builtin.arguments import INT, buffer, descriptor, within
from krun.monitor.builtin.hostcall import call

TYPE_CHECKING = False
if TYPE_CHECKING:
    from krun.monitor.builtin.thread import Thread

ENOTTY = 25

# Terminals and devices: request, bytes the kernel reads (1) or writes (2), size.
IOCTLS = {
    0x5401: (2, 36),  # TCGETS
    0x5402: (1, 36),
    0x5403: (1, 36),
    0x5404: (1, 36),
    0x5405: (2, 18),  # TCGETA
    0x5406: (1, 18),
    0x5407: (1, 18),
    0x5408: (1, 18),
    0x5409: (0, 0),  # TCSBRK
    0x540A: (0, 0),
    0x540B: (0, 0),
    0x540C: (0, 0),  # TIOCEXCL
    0x540D: (0, 0),
    0x540E: (0, 0),  # TIOCSCTTY
    0x540F: (2, 4),  # TIOCGPGRP
    0x5410: (1, 4),
    0x5411: (2, 4),  # TIOCOUTQ
    0x5413: (2, 8),  # TIOCGWINSZ
    0x5414: (1, 8),
    0x541B: (2, 4),  # FIONREAD
    0x5421: (1, 4),  # FIONBIO
    0x5422: (0, 0),  # TIOCNOTTY
    0x5423: (1, 4),
    0x5424: (2, 4),
    0x5425: (0, 0),
    0x5429: (2, 4),  # TIOCGSID
    0x5450: (0, 0),  # FIONCLEX
    0x5451: (0, 0),  # FIOCLEX
    0x5452: (1, 4),  # FIOASYNC
    0x80045430: (2, 4),  # TIOCGPTN
    0x40045431: (1, 4),  # TIOCSPTLCK
    0x80045439: (2, 4),  # TIOCGPTLCK
    0x802C542A: (2, 44),  # TCGETS2
    0x402C542B: (1, 44),
    0x402C542C: (1, 44),
    0x402C542D: (1, 44),
    0x8910: (3, 40),  # SIOCGIFNAME
    0x8913: (3, 40),
    0x8915: (3, 40),
    0x8917: (3, 40),
    0x8919: (3, 40),
    0x891B: (3, 40),
    0x891D: (3, 40),
    0x8921: (3, 40),
    0x8927: (3, 40),
    0x8933: (3, 40),
    0x8942: (3, 40),
    0x8904: (2, 4),  # SIOCGPGRP
    0x8905: (2, 4),
    0x1268: (2, 4),  # BLKSSZGET
    0x80081272: (2, 8),
    0x40049409: (0, 0),  # FICLONE: the argument is a descriptor
}
SIOCGIFCONF, FICLONE, TIOCGPTPEER = 0x8912, 0x40049409, 0x5441


def sys_ioctl(thread: Thread, fd: int, request: int, argument: int) -> int:
    fd = descriptor(thread, fd)
    request &= INT
    if request == SIOCGIFCONF:
        return _interfaces(thread, fd, argument)
    if request == FICLONE:
        return call(16, fd, request, descriptor(thread, argument))
    if request == TIOCGPTPEER:
        return within(thread, call(16, fd, request, argument))
    known = IOCTLS.get(request)
    if known is None:
        # A closed descriptor is EBADF before an unknown request is ENOTTY.
        result = call(72, fd, 1)
        return result if result < 0 else -ENOTTY
    direction, size = known
    if direction:
        argument = buffer(thread, argument, size, direction)
    return call(16, fd, request, argument)


def _interfaces(thread: Thread, fd: int, argument: int) -> int:
    memory = thread.process.memory
    size, pointer = struct.unpack("<i4xQ", memory.read(argument, 16))
    place = buffer(thread, pointer, max(size, 0), 2) if pointer else 0
    address = thread.scratch.put(struct.pack("<i4xQ", size, place), 1024)
    result = call(16, fd, SIOCGIFCONF, address)
    if result >= 0:
        memory.write(argument, thread.scratch.get(4, 1024))
    return result
