"""Route netlink, rtnetlink(7): pyroute2's messages over a plain socket; the one importer of it.

pyroute2's own sockets bring asyncio and every protocol it knows, 60 ms and more.  The messages
alone take 17 ms, with a bare package module in the place of the package's `__init__`.  Nothing
here is on the path of a start that finds a namespace in the pool.
"""

from __future__ import annotations

import gc
import os
import struct
import sys
from _socket import AF_NETLINK, SOCK_CLOEXEC, SOCK_RAW, socket

from krun.errors import KrunError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

AF_UNSPEC, AF_INET, AF_BRIDGE, AF_INET6 = 0, 2, 7, 10
RT_SCOPE_UNIVERSE, RT_SCOPE_LINK = 0, 253

# linux/netlink.h, linux/rtnetlink.h, linux/if.h
_NETLINK_ROUTE, _SOL_NETLINK, _CAP_ACK, _EXT_ACK = 0, 270, 10, 11
_REQUEST, _ACK, _EXCL, _CREATE, _DUMP = 0x1, 0x4, 0x200, 0x400, 0x300
_DUMP_INTERRUPTED, _ACK_TLVS = 0x10, 0x200
_ERROR, _DONE = 2, 3
_ACK_MESSAGE = 1
_NEWLINK, _DELLINK, _GETLINK, _SETLINK, _NEWADDR, _GETADDR = 16, 17, 18, 19, 20, 22
_NEWROUTE, _GETROUTE, _NEWQDISC = 24, 26, 36
_IFF_UP = 1
_TABLE_MAIN, _PROTOCOL_STATIC, _TYPE_UNICAST = 254, 4, 1
_TC_ROOT, _TC_ROOT_HANDLE = 0xFFFFFFFF, 0x10000
_TCA_FQ_FLOW_MAX_RATE = 7

_HEADER = struct.Struct("=IHHII")
_ATTRIBUTE = struct.Struct("=HH")
_BUFFER = 1 << 16
# A dump that changes meanwhile is made again; a host where links come and go all the time has one
# that is a little stale.
_DUMPS = 5

Attributes = list[tuple[str, object]]


class Refused(OSError):
    """The kernel refuses a request: errno, and the kernel's own words where it has some."""


def _load(module: str) -> Any:
    """Import one of pyroute2's modules of messages; raises KrunError where there is no pyroute2."""
    if "pyroute2" not in sys.modules:
        from importlib.machinery import PathFinder
        from importlib.util import module_from_spec

        spec = PathFinder.find_spec("pyroute2")
        if spec is None:
            raise KrunError(
                "pyroute2 is not installed, and a container's network is made with it",
                "pip install pyroute2, or apt install python3-pyroute2",
            )
        # Without its loader run, the package is its search path alone.
        sys.modules["pyroute2"] = module_from_spec(spec)
    name = f"pyroute2.netlink.rtnl.{module}"
    if name not in sys.modules:
        # Collecting garbage between modules finds none, and takes a tenth of the time.
        gc.disable()
        try:
            __import__(name)
        finally:
            gc.enable()
    return sys.modules[name]


class Route:
    """A route netlink socket of the network namespace that the thread is in when it is made."""

    def __init__(self) -> None:
        self._links = _load("ifinfmsg").ifinfmsg
        self._socket = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, _NETLINK_ROUTE)
        for option in (_CAP_ACK, _EXT_ACK):
            self._socket.setsockopt(_SOL_NETLINK, option, 1)
        self._serial = 0

    def __enter__(self) -> Route:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def _ask(self, kind: int, flags: int, message: Any) -> tuple[list[Any], bool]:
        """Send one request; return the answers, and whether they are of one moment.

        Raises Refused.
        """
        self._serial += 1
        header = message["header"]
        header["type"], header["flags"] = kind, _REQUEST | _ACK | flags
        header["sequence_number"] = self._serial
        message.encode()
        self._socket.send(message.data)
        answers: list[Any] = []
        whole = True
        while True:
            data = self._socket.recv(_BUFFER)
            position = 0
            while position < len(data):
                size, answer, flags, serial, _ = _HEADER.unpack_from(data, position)
                part = data[position : position + size]
                position += size + 3 & ~3
                if serial != self._serial:
                    continue
                whole = whole and not flags & _DUMP_INTERRUPTED
                if answer == _ERROR:
                    _check(part, flags)
                    return answers, whole
                if answer == _DONE:
                    return answers, whole
                one = type(message)(part)
                one.decode()
                answers.append(one)

    def _list(self, kind: int, message: type, **fields: int) -> list[Any]:
        for _ in range(_DUMPS):
            request = message()
            request.update(fields)
            answers, whole = self._ask(kind, _DUMP, request)
            if whole:
                break
        return answers

    def _link(self, index: int, attributes: Attributes, up: bool | None, family: int) -> Any:
        message = self._links()
        message["family"], message["index"] = family, index
        if up is not None:
            message["flags"], message["change"] = _IFF_UP if up else 0, _IFF_UP
        message["attrs"] = attributes
        return message

    def make_link(self, attributes: Attributes, up: bool | None = None) -> None:
        """Make a device (IFLA_* of linux/if_link.h)."""
        self._ask(_NEWLINK, _CREATE | _EXCL, self._link(0, attributes, up, AF_UNSPEC))

    def set_link(
        self, index: int, attributes: Attributes | None = None, up: bool | None = None
    ) -> None:
        """Change a device."""
        self._ask(_NEWLINK, 0, self._link(index, attributes or [], up, AF_UNSPEC))

    def set_port(self, index: int, attributes: Attributes) -> None:
        """Change a bridge's port (IFLA_BRPORT_*)."""
        # The attribute is marked as nested (NLA_F_NESTED), without which it is one byte.
        nested: Any = ("IFLA_PROTINFO", {"attrs": attributes}, 0x8000)
        self._ask(_SETLINK, 0, self._link(index, [nested], None, AF_BRIDGE))

    def delete_link(self, index: int) -> None:
        """Delete a device."""
        self._ask(_DELLINK, 0, self._link(index, [], None, AF_UNSPEC))

    def links(self) -> list[Any]:
        """Return every device."""
        return self._list(_GETLINK, self._links)

    def link(self, index: int) -> Any:
        """Return one device."""
        return self._ask(_GETLINK, 0, self._link(index, [], None, AF_UNSPEC))[0][0]

    def make_address(
        self, index: int, family: int, address: str, length: int, flags: int = 0
    ) -> None:
        """Give a device an address (IFA_F_* in flags)."""
        message = _load("ifaddrmsg").ifaddrmsg()
        message["family"], message["index"], message["prefixlen"] = family, index, length
        message["attrs"] = [("IFA_LOCAL", address), ("IFA_ADDRESS", address)]
        if flags:
            message["attrs"].append(("IFA_FLAGS", flags))
        self._ask(_NEWADDR, _CREATE | _EXCL, message)

    def addresses(self, index: int) -> list[Any]:
        """Return a device's addresses."""
        listed = self._list(_GETADDR, _load("ifaddrmsg").ifaddrmsg)
        return [message for message in listed if message["index"] == index]

    def make_route(
        self,
        family: int,
        destination: str,
        length: int,
        index: int,
        *,
        via: str = "",
        metric: int = 0,
        scope: int = RT_SCOPE_UNIVERSE,
    ) -> None:
        """Make a route by a device, to destination/length."""
        message = _load("rtmsg").rtmsg()
        message["family"], message["dst_len"], message["scope"] = family, length, scope
        message["table"], message["proto"] = _TABLE_MAIN, _PROTOCOL_STATIC
        message["type"] = _TYPE_UNICAST
        attributes: Attributes = [("RTA_DST", destination), ("RTA_OIF", index)]
        if via:
            attributes.append(("RTA_GATEWAY", via))
        if metric:
            attributes.append(("RTA_PRIORITY", metric))
        message["attrs"] = attributes
        self._ask(_NEWROUTE, _CREATE | _EXCL, message)

    def routes(self, family: int) -> list[Any]:
        """Return the routes of a family."""
        return self._list(_GETROUTE, _load("rtmsg").rtmsg, family=family)

    def make_queue(self, index: int, kind: str, options: Any) -> None:
        """Give a device a root queue, tc(8)."""
        message = _load("tcmsg").tcmsg()
        message["index"], message["parent"] = index, _TC_ROOT
        message["handle"] = _TC_ROOT_HANDLE
        message["attrs"] = [("TCA_KIND", kind), ("TCA_OPTIONS", options)]
        self._ask(_NEWQDISC, _CREATE | _EXCL, message)


def _check(part: bytes, flags: int) -> None:
    """Raise Refused unless an acknowledgement (struct nlmsgerr) says that all is well."""
    (negative,) = struct.unpack_from("=i", part, _HEADER.size)
    if not negative:
        return
    text = os.strerror(-negative)
    # The header of the request follows, and then, as _CAP_ACK is set, the attributes.
    position = _HEADER.size + 4 + _HEADER.size
    while flags & _ACK_TLVS and position < len(part):
        size, kind = _ATTRIBUTE.unpack_from(part, position)
        if kind == _ACK_MESSAGE:
            said = part[position + _ATTRIBUTE.size : position + size].rstrip(b"\0")
            text = f"{text} ({said.decode('utf-8', 'replace').rstrip('.')})"
        position += size + 3 & ~3
    raise Refused(-negative, text)


def token_bucket(rate: int, burst: int) -> Any:
    """Return the options of tc-tbf(8): rate in bytes a second, burst in bytes, 50 ms of queue."""
    _load("tcmsg")
    table = sys.modules["pyroute2.netlink.rtnl.tcmsg"].plugins["tbf"]
    return table.get_parameters({"rate": rate, "burst": burst, "latency": "50ms"})


def fair_queue(rate: int) -> bytes:
    """Return the options of tc-fq(8), which pyroute2 does not know: bytes a second of each flow."""
    value = struct.pack("=I", rate)
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(value), _TCA_FQ_FLOW_MAX_RATE) + value
