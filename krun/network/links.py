"""The kernel's links, addresses, routes and queues; the one importer of pyroute2.

Importing pyroute2 costs 120 ms, because its `__init__` loads every protocol it knows.  Its
subpackages work without that: a bare package module in its place saves a third.  Nothing here is
on the path of a start that finds a namespace in the pool.
"""

from __future__ import annotations

import gc
import os
import sys
from _socket import if_nametoindex
from errno import EEXIST, ENODEV, ENOENT, EOPNOTSUPP, ESRCH

from krun.errors import KrunError
from krun.network.address import parse_prefix
from krun.network.namespace import Inside

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from krun.network.definition import Definition
    from krun.network.model import Bandwidth
    from krun.network.resolve import Link

# The bare kernel's numbers (linux/if_addr.h, linux/rtnetlink.h).
IFA_F_NODAD = 0x02
RT_SCOPE_LINK = 253
AF_INET, AF_INET6 = 2, 10
TC_H_ROOT_HANDLE = 0x10000
_COUNTERS = tuple(
    f"{side}_{what}" for side in ("rx", "tx") for what in ("bytes", "packets", "dropped", "errors")
)
_MACVLAN_DEFAULT, _IPVLAN_MODES = "bridge", {"l2": 0, "l3": 1, "l3s": 2}


def _iproute() -> Any:
    """Return pyroute2's IPRoute class."""
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
    # Collecting garbage between two of 300 modules finds none, and takes a tenth of the time.
    gc.disable()
    try:
        from pyroute2.iproute.linux import IPRoute
    finally:
        gc.enable()
    return IPRoute


def _netlink_error() -> Any:
    from pyroute2.netlink.exceptions import NetlinkError

    return NetlinkError


def connect() -> Any:
    """Return a route netlink socket of the namespace that this thread is in."""
    return _iproute()()


def connect_in(namespace: int) -> Any:
    """Return a route netlink socket of the network namespace with that descriptor."""
    with Inside(namespace):
        return connect()


class refusing:
    """Tell what failed where the kernel refuses: `with refusing("what"): …`.

    `ignore` holds errno values that mean it was so already.
    """

    def __init__(self, what: str, *ignore: int) -> None:
        self._what = what
        self._ignore = ignore

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> bool:
        if error is None or not isinstance(error, _netlink_error()):
            return False
        code: int = error.code  # type: ignore[attr-defined]
        if code in self._ignore:
            return True
        hint = "the kernel lacks it" if code in (EOPNOTSUPP, ENOENT) else ""
        raise KrunError(f"{self._what}: {os.strerror(code)}", hint) from error


def index_of(device: str) -> int:
    """Return the number of a device of this thread's namespace, 0 when there is none.

    An ioctl(2): looking a name up through route netlink costs pyroute2 3 ms.
    """
    try:
        return if_nametoindex(device)
    except OSError:
        return 0


def kind_of(message: Any) -> str:
    """Return a link's kind (bridge, veth, …), "" for a plain device."""
    info = message.get_attr("IFLA_LINKINFO")
    return (info.get_attr("IFLA_INFO_KIND") or "") if info else ""


def describe(route: Any) -> dict[str, Any]:
    """Return what `krun network` shows of every device: kind, state, master, counters."""
    messages = list(route.get_links())
    names = {message["index"]: message.get_attr("IFLA_IFNAME") for message in messages}
    found = {}
    for message in messages:
        counters = message.get_attr("IFLA_STATS64") or {}
        found[message.get_attr("IFLA_IFNAME")] = {
            "kind": kind_of(message),
            "state": message.get_attr("IFLA_OPERSTATE"),
            "mac": message.get_attr("IFLA_ADDRESS"),
            "mtu": message.get_attr("IFLA_MTU"),
            "master": names.get(message.get_attr("IFLA_MASTER"), ""),
            "counters": {key: counters[key] for key in _COUNTERS if key in counters},
        }
    return found


def networks_in_use(route: Any) -> list[str]:
    """Return the destinations of the host's routes, which a new network must not overlap."""
    found = []
    for family in (AF_INET, AF_INET6):
        for message in route.get_routes(family=family):
            destination = message.get_attr("RTA_DST")
            if destination and message["dst_len"]:
                found.append(f"{destination}/{message['dst_len']}")
    return found


def sysctl(name: str, value: str) -> None:
    """Write /proc/sys/NAME of this thread's namespace; one that does not exist is passed over."""
    try:
        with open(f"/proc/sys/{name}", "w") as file:
            file.write(value)
    except FileNotFoundError:
        pass


def _read_sysctl(name: str) -> str:
    try:
        with open(f"/proc/sys/{name}") as file:
            return file.read().strip()
    except FileNotFoundError:
        return ""


def forward(version: int) -> None:
    """Make the host route packets of a family between its interfaces."""
    if version == 4:
        if _read_sysctl("net/ipv4/ip_forward") != "1":
            sysctl("net/ipv4/ip_forward", "1")
        return
    if _read_sysctl("net/ipv6/conf/all/forwarding") == "1":
        return
    # A router ignores router advertisements unless accept_ra is 2, and the host may have its
    # default route from them (Documentation/networking/ip-sysctl.rst).
    for device in os.listdir("/proc/sys/net/ipv6/conf"):
        if device not in ("all", "default"):
            name = f"net/ipv6/conf/{device}/accept_ra"
            if _read_sysctl(name) == "1":
                sysctl(name, "2")
    sysctl("net/ipv6/conf/all/forwarding", "1")


def have_ipv6() -> bool:
    """Whether the kernel speaks IPv6."""
    return os.path.isdir("/proc/sys/net/ipv6")


def add_address(route: Any, index: int, text: str, what: str) -> None:
    """Give a device an address; it is usable at once, as krun's leases say that it is unique."""
    prefix = parse_prefix(text)
    arguments: dict[str, Any] = {"family": AF_INET if prefix.version == 4 else AF_INET6}
    if prefix.version == 6:
        arguments["flags"] = IFA_F_NODAD
    with refusing(f"{what}: address {text}", EEXIST):
        route.addr(
            "add", index=index, address=str(prefix.address), prefixlen=prefix.length, **arguments
        )


def ensure_bridge(route: Any, definition: Definition) -> int:
    """Make a network's bridge unless it is there; return its number.

    That the name belongs to no other device was checked before.
    """
    name = definition.name
    index = index_of(name)
    if index:
        return index
    # With an address of its own the bridge does not take over that of a port, so neighbours'
    # caches stay right when a container goes.
    mac = "02:" + ":".join(f"{byte:02x}" for byte in os.urandom(5))
    arguments = {"mtu": definition.mtu} if definition.mtu else {}
    with refusing(f"make bridge {name}", EEXIST):
        route.link("add", ifname=name, kind="bridge", address=mac, **arguments)
    index = index_of(name)
    for gateway, network in zip(definition.gateways, definition.ranges, strict=True):
        length = parse_prefix(network).length
        add_address(route, index, f"{gateway}/{length}", f"bridge {name}")
        forward(parse_prefix(network).version)
    with refusing(f"bridge {name} up"):
        route.link("set", index=index, state="up")
    # A published port reached by 127.0.0.1 is routed out of the bridge; the table krun drops
    # packets to loopback addresses that come in (CVE-2020-8558).
    sysctl(f"net/ipv4/conf/{name}/route_localnet", "1")
    return index


def _limit(route: Any, index: int, rate: int, limits: Bandwidth, what: str) -> None:
    """Limit what a device sends to `rate` bits per second."""
    size = limits.burst or max(rate // 8 // 100, 16 * 1024)
    with refusing(f"{what}: limit to {rate} bit/s with {limits.queue}"):
        if limits.queue == "fq":
            route.tc("add", "fq", index, handle=TC_H_ROOT_HANDLE, fq_flow_max_rate=rate // 8)
        else:
            route.tc(
                "add",
                "tbf",
                index,
                handle=TC_H_ROOT_HANDLE,
                rate=rate // 8,
                burst=size,
                latency="50ms",
            )


def _parent(link: Link) -> int:
    index = index_of(link.parent)
    if not index:
        raise KrunError(f"{link.kind} {link.name}: the host has no device {link.parent}")
    return index


def _make(host: Any, namespace: int, link: Link, bridge: int) -> None:
    """Make one link with its inner end in the namespace."""
    what = f"{link.kind} {link.name}"
    inner: dict[str, Any] = {"net_ns_fd": namespace}
    if link.mac:
        inner["address"] = link.mac
    if link.mtu:
        inner["mtu"] = link.mtu
    if link.kind == "veth":
        arguments: dict[str, Any] = {"mtu": link.mtu} if link.mtu else {}
        if bridge:
            arguments["master"] = bridge
        with refusing(f"make {what} ({link.host_name} on the host)"):
            host.link(
                "add",
                ifname=link.host_name,
                kind="veth",
                state="up",
                peer={"ifname": link.name, **inner},
                **arguments,
            )
        return
    parent = _parent(link)
    if link.kind == "device":
        with refusing(f"move device {link.parent} into the container"):
            host.link("set", index=parent, ifname=link.name, **inner)
        return
    if link.kind == "ipvlan":
        inner["ipvlan_mode"] = _IPVLAN_MODES[link.mode or "l2"]
    else:
        inner["macvlan_mode"] = link.mode or _MACVLAN_DEFAULT
    with refusing(f"make {what} on {link.parent}"):
        host.link("add", ifname=link.name, kind=link.kind, link=parent, **inner)


def _addresses_of(route: Any, index: int) -> list[str]:
    """Return the global, permanent addresses of a device."""
    return [
        f"{message.get_attr('IFA_ADDRESS')}/{message['prefixlen']}"
        for message in route.get_addr(index=index)
        if message["scope"] == 0
    ]


def _configure_host_end(host: Any, link: Link) -> None:
    """Address and limit the host's end of a veth."""
    limits = link.bandwidth
    index = index_of(link.host_name)
    if link.bridge:
        # With br_netfilter a container's packet to its own published port is turned round in the
        # bridge, which sends nothing back by the port it came from unless that is a hairpin.
        with refusing(f"{link.host_name}: hairpin"):
            host.brport("set", index=index, mode=1)
    for address in link.host_addresses:
        add_address(host, index, address, link.host_name)
    for destination in link.host_routes:
        version = parse_prefix(destination).version
        forward(version)
        with refusing(f"{link.host_name}: route to {destination}"):
            host.route(
                "add",
                dst=destination,
                oif=index,
                family=AF_INET if version == 4 else AF_INET6,
                scope=RT_SCOPE_LINK if version == 4 else 0,
            )
    if link.host_routes:
        sysctl(f"net/ipv4/conf/{link.host_name}/route_localnet", "1")
    if limits.ingress:
        _limit(host, index, limits.ingress, limits, link.host_name)


def attach(host: Any, inside: Any, namespace: int, link: Link, bridge: int) -> None:
    """Make one interface of a container, addressed, routed and up."""
    what = f"{link.kind} {link.name}"
    addresses = list(link.addresses)
    if link.kind == "device" and not addresses:
        addresses = _addresses_of(host, _parent(link))
    _make(host, namespace, link, bridge)
    with Inside(namespace):
        index = index_of(link.name)
    with refusing(f"{what} up"):
        inside.link("set", index=index, state="up")
    for address in addresses:
        add_address(inside, index, address, what)
    for wanted in link.routes:
        prefix = parse_prefix(wanted.destination)
        arguments: dict[str, Any] = {"oif": index}
        if wanted.via:
            arguments["gateway"] = wanted.via
        elif prefix.version == 4:
            arguments["scope"] = RT_SCOPE_LINK
        if wanted.metric:
            arguments["priority"] = wanted.metric
        with refusing(f"{what}: route {wanted.destination} via {wanted.via or 'the link'}"):
            inside.route(
                "add",
                dst=wanted.destination,
                family=AF_INET if prefix.version == 4 else AF_INET6,
                **arguments,
            )
    if link.bandwidth.egress:
        _limit(inside, index, link.bandwidth.egress, link.bandwidth, what)
    if link.kind == "veth":
        _configure_host_end(host, link)


def prepare(inside: Any, namespace: int) -> None:
    """Bring lo up in a new namespace, and set what every container expects."""
    with refusing("lo up"):
        inside.link("set", index=1, state="up")
    with Inside(namespace):
        # A payload without CAP_NET_BIND_SERVICE serves port 80, and pings, as under docker.
        sysctl("net/ipv4/ip_unprivileged_port_start", "0")
        sysctl("net/ipv4/ping_group_range", "0 2147483647")


def move_back(namespace: int, host_namespace: int, name: str, outside: str) -> None:
    """Return a moved device to the host under its old name."""
    with Inside(namespace), connect() as inside:
        index = index_of(name)
        if not index:
            return
        with refusing(f"move device {name} back to the host as {outside}", ENODEV):
            inside.link("set", index=index, state="down")
            inside.link("set", index=index, net_ns_fd=host_namespace, ifname=outside)


def delete(route: Any, device: str) -> None:
    """Delete a device; gone already is fine."""
    index = index_of(device)
    if index:
        with refusing(f"delete {device}", ENODEV, ESRCH):
            route.link("del", index=index)
