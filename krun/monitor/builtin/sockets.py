"""System calls on sockets that need more than checked arguments."""

from __future__ import annotations

import struct

from krun.monitor.builtin.areas import Fault
from krun.monitor.builtin.arguments import (
    INT,
    KERNEL_ADDRESS,
    MAX_RW_COUNT,
    Refused,
    buffer,
    descriptor,
    signed,
    within,
)
from krun.monitor.builtin.blocking import can_interrupt, interruptible
from krun.monitor.builtin.hostcall import call
from krun.monitor.builtin.signals import Interrupted
from krun.monitor.builtin.transfers import (
    O_NONBLOCK,
    POLLIN,
    POLLOUT,
    SOL_SOCKET,
    put_vectors,
    ready,
    vectors,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from krun.monitor.builtin.thread import Thread

EAGAIN, EINVAL, ENOSYS, EMSGSIZE, ENOPROTOOPT, EOPNOTSUPP, EFAULT = 11, 22, 38, 90, 92, 95, 14
SOCKADDR_STORAGE = 128
MSG_DONTWAIT, MSG_WAITALL = 0x40, 0x100

# Options and control messages whose data the kernel copies as they are.  Others may hold pointers
# (netfilter's tables, TCP_ZEROCOPY_RECEIVE, XDP's and RDS's memory): no host address may come from
# a payload, so of a level or option that is not known to be flat there is none.
FLAT = {
    0: frozenset((*range(1, 64),)),  # IPPROTO_IP
    1: frozenset((*range(26), *range(27, 51), *range(52, 128))),  # SOL_SOCKET
    6: frozenset((*range(35), *range(36, 64))),  # IPPROTO_TCP
    17: frozenset((1, *range(100, 108))),  # IPPROTO_UDP
    41: frozenset((*range(1, 64), *range(66, 80))),  # IPPROTO_IPV6
    58: frozenset((1,)),  # IPPROTO_ICMPV6
    136: frozenset((1, 10, 11)),  # IPPROTO_UDPLITE
    255: frozenset((1, 7)),  # SOL_RAW
    263: frozenset((*range(1, 22), 23, 24)),  # SOL_PACKET
    270: frozenset(range(1, 13)),  # SOL_NETLINK
    279: frozenset(range(1, 8)),  # SOL_ALG
    282: frozenset(range(1, 5)),  # SOL_TLS
}
SO_ATTACH_FILTER = SO_GET_FILTER = 26
SO_ATTACH_REUSEPORT_CBPF = 51
MOST_INSTRUCTIONS = 4096
# No option is longer; the kernel copies what it needs of a length that is.
MOST_OPTION = 1 << 16


def _name(thread: Thread, address: int, length: int) -> tuple[int, int]:
    """Host addresses of where a socket's name goes and of its length.

    The kernel reads the length from the payload's memory, and writes no more than a
    struct sockaddr_storage whatever it says.
    """
    if not address:
        return 0, 0
    return buffer(thread, address, SOCKADDR_STORAGE, 2), buffer(thread, length, 4, 3)


def _socket_address(thread: Thread, fd: int, number: int, address: int, length: int) -> int:
    fd = descriptor(thread, fd)
    place = buffer(thread, address, SOCKADDR_STORAGE, 2)
    return call(number, fd, place, buffer(thread, length, 4, 3))


def sys_getsockname(thread: Thread, fd: int, address: int, length: int) -> int:
    return _socket_address(thread, fd, 51, address, length)


def sys_getpeername(thread: Thread, fd: int, address: int, length: int) -> int:
    return _socket_address(thread, fd, 52, address, length)


def sys_connect(thread: Thread, fd: int, address: int, length: int) -> int:
    fd = descriptor(thread, fd)
    size = signed(length)
    if not 0 <= size <= 128:
        # sockfd_lookup goes first: what is no socket is ENOTSOCK.
        return call(42, fd, 0, size)
    place = buffer(thread, address, size, 1)
    if call(72, fd, 3) & O_NONBLOCK:
        return call(42, fd, place, size)
    return interruptible(thread, 42, fd, place, size)


def sys_accept(thread: Thread, fd: int, address: int, length: int) -> int:
    return sys_accept4(thread, fd, address, length, 0)


def sys_accept4(thread: Thread, fd: int, address: int, length: int, flags: int) -> int:
    fd = descriptor(thread, fd)
    place, counter = _name(thread, address, length)
    if ready(thread, fd, POLLIN, 1) and can_interrupt(thread):
        # Someone else who waits on it too may have been faster.
        return within(thread, interruptible(thread, 288, fd, place, counter, flags))
    return within(thread, call(288, fd, place, counter, flags))


def _ready(thread: Thread, fd: int, events: int, flags: int) -> bool:
    """Wait for a socket, unless the call's flags say not to; whether it took a wait."""
    return not flags & MSG_DONTWAIT and ready(thread, fd, events)


def _contended(thread: Thread, flags: int) -> bool:
    """Whether a call after a wait must not wait itself: another reader may have been faster.

    A signal would not end it there.
    """
    return can_interrupt(thread) and not flags & MSG_WAITALL


def sys_sendto(
    thread: Thread, fd: int, data: int, size: int, flags: int, address: int, length: int
) -> int:
    fd = descriptor(thread, fd)
    size = min(size, MAX_RW_COUNT)
    place = buffer(thread, data, size, 1)
    target = buffer(thread, address, length & INT, 1) if address else 0
    if address and length & INT > 128:
        return -EINVAL
    _ready(thread, fd, POLLOUT, flags)
    return call(44, fd, place, size, flags, target, length & INT if address else 0)


def sys_recvfrom(
    thread: Thread, fd: int, data: int, size: int, flags: int, address: int, length: int
) -> int:
    fd = descriptor(thread, fd)
    size = min(size, MAX_RW_COUNT)
    place = buffer(thread, data, size, 2)
    source, counter = _name(thread, address, length)
    while _ready(thread, fd, POLLIN, flags) and _contended(thread, flags):
        result = call(45, fd, place, size, flags | MSG_DONTWAIT, source, counter)
        if result != -EAGAIN:
            return result
    return call(45, fd, place, size, flags, source, counter)


SCM_RIGHTS = 1


def _message(thread: Thread, header: int, prot: int) -> tuple[int, int, int]:
    """Host copy of a struct msghdr with host pointers, its control room's place and size."""
    memory = thread.process.memory
    name, name_size, iov, count, control, control_size, flags = struct.unpack(
        "<QI4xQQQQi4x", memory.read(header, 56)
    )
    if count > 1024:
        raise Refused(EMSGSIZE)
    if name_size > 1 << 31:
        raise Refused(EINVAL)
    if not name:
        name_size = 0
    name_size = min(name_size, 128)
    pieces = vectors(thread, iov, count, prot)
    control_size = min(control_size, 16384) if control else 0
    # The control data is copied: it holds descriptors, which are checked in the copy.
    room = 49152
    if prot == 1 and control_size:
        data = memory.read(control, control_size)
        _check_rights(thread, data)
        thread.scratch.put(data, room)
    elif control_size:
        memory.host(control, control_size, 2)
    message = struct.pack(
        "<QI4xQQQQi4x",
        buffer(thread, name, name_size, 3 - prot if prot == 1 else 2) if name_size else 0,
        name_size,
        put_vectors(thread, pieces),
        len(pieces),
        thread.scratch.address + room if control_size else 0,
        control_size,
        flags,
    )
    return thread.scratch.put(message, 1024), control, control_size


def _check_rights(thread: Thread, data: bytes) -> None:
    offset = 0
    while offset + 16 <= len(data):
        size, level, kind = struct.unpack_from("<Qii", data, offset)
        if size < 16:
            return
        if level not in FLAT:
            raise Refused(EINVAL)
        if level == SOL_SOCKET and kind == SCM_RIGHTS:
            end = min(offset + size, len(data))
            for (fd,) in struct.iter_unpack("<I", data[offset + 16 : end - (end - offset) % 4]):
                descriptor(thread, fd)
        offset += (size + 7) & -8


def sys_sendmsg(thread: Thread, fd: int, header: int, flags: int) -> int:
    fd = descriptor(thread, fd)
    _ready(thread, fd, POLLOUT, flags)
    try:
        place, _, _ = _message(thread, header, 1)
    except (Refused, Fault):
        # What is wrong with the descriptor or the flags goes first.
        result = call(46, fd, KERNEL_ADDRESS, flags)
        if result != -EFAULT:
            return result
        raise
    return call(46, fd, place, flags)


def sys_recvmsg(thread: Thread, fd: int, header: int, flags: int) -> int:
    fd = descriptor(thread, fd)
    if not flags & MSG_DONTWAIT:
        _message(thread, header, 2)
    result = -EAGAIN
    while result == -EAGAIN and _ready(thread, fd, POLLIN, flags) and _contended(thread, flags):
        place, control, control_size = _message(thread, header, 2)
        result = call(47, fd, place, flags | MSG_DONTWAIT)
    if result == -EAGAIN:
        place, control, control_size = _message(thread, header, 2)
        result = call(47, fd, place, flags)
    if result < 0:
        return result
    memory = thread.process.memory
    view = thread.scratch.view
    name_size = struct.unpack_from("<I", view, 1024 + 8)[0]
    used, got = struct.unpack_from("<Qi", view, 1024 + 40)
    memory.write(header + 8, struct.pack("<I", name_size))
    memory.write(header + 40, struct.pack("<Qi", used, got))
    if control_size:
        memory.write(control, view[49152 : 49152 + min(used, control_size)])
    return result


def _many(thread: Thread, fd: int, headers: int, count: int, flags: int, send: bool) -> int:
    memory = thread.process.memory
    done = 0
    while done < min(count & INT, 1024):
        header = headers + 64 * done
        try:
            if send:
                result = sys_sendmsg(thread, fd, header, flags)
            else:
                result = sys_recvmsg(thread, fd, header, flags & ~0x10000)
        except (Fault, Refused, Interrupted):
            if not done:
                raise
            thread.requeue()
            return done
        if result < 0:
            return done or result
        memory.write(header + 56, struct.pack("<I", result))
        done += 1
        if flags & 0x10000:
            flags |= MSG_DONTWAIT
    return done


def sys_sendmmsg(thread: Thread, fd: int, headers: int, count: int, flags: int) -> int:
    return _many(thread, fd, headers, count, flags, True)


def sys_recvmmsg(
    thread: Thread, fd: int, headers: int, count: int, flags: int, timeout: int
) -> int:
    if timeout:
        return -ENOSYS
    return _many(thread, fd, headers, count, flags, False)


def sys_getsockopt(
    thread: Thread, fd: int, level: int, option: int, address: int, length: int
) -> int:
    memory = thread.process.memory
    size = struct.unpack("<i", memory.read(length, 4))[0]
    if size < 0:
        return -EINVAL
    # The length of a filter counts instructions.
    filtering = (signed(level), signed(option)) == (SOL_SOCKET, SO_GET_FILTER)
    if not filtering and signed(option) not in FLAT.get(signed(level), ()):
        return _no_option(thread, fd, ENOPROTOOPT if signed(level) in FLAT else EOPNOTSUPP)
    place = buffer(thread, address, size * 8 if filtering else size, 2)
    counter = thread.scratch.put(struct.pack("<i", size), 1024)
    result = call(55, descriptor(thread, fd), level, option, place, counter)
    if result >= 0:
        memory.write(length, thread.scratch.get(4, 1024))
    return result


def sys_setsockopt(
    thread: Thread, fd: int, level: int, option: int, address: int, length: int
) -> int:
    fd = descriptor(thread, fd)
    level, option, size = signed(level), signed(option), signed(length)
    if level == SOL_SOCKET and option in (SO_ATTACH_FILTER, SO_ATTACH_REUSEPORT_CBPF):
        return _attach(thread, fd, option, address, size)
    if option not in FLAT.get(level, ()):
        return _no_option(thread, fd, ENOPROTOOPT)
    return call(
        54, fd, level, option, buffer(thread, address, min(max(size, 0), MOST_OPTION), 1), size
    )


def _no_option(thread: Thread, fd: int, errno: int) -> int:
    """An error, or what is wrong with the descriptor."""
    counter = thread.scratch.put(struct.pack("<i", 4), 1024)
    result = call(55, descriptor(thread, fd), SOL_SOCKET, 3, thread.scratch.address + 1032, counter)
    return result if result < 0 else -errno


def _attach(thread: Thread, fd: int, option: int, address: int, size: int) -> int:
    """A classic BPF filter: struct sock_fprog, whose instructions are copied."""
    memory = thread.process.memory
    if size != 16:
        return call(54, fd, SOL_SOCKET, option, buffer(thread, address, max(size, 0), 1), 1)
    count, pointer = struct.unpack("<H6xQ", memory.read(address, 16))
    place = 0
    if pointer:
        instructions = memory.read(pointer, 8 * min(count, MOST_INSTRUCTIONS))
        place = thread.scratch.put(instructions, 24576)
    program = thread.scratch.put(struct.pack("<H6xQ", count, place), 1024)
    if count > MOST_INSTRUCTIONS:
        return -EINVAL
    return call(54, fd, SOL_SOCKET, option, program, 16)
