"""The links, addresses, routes and queues of a container, made through route netlink."""

from __future__ import annotations

import os
from _socket import if_nametoindex
from errno import EEXIST, ENODEV, ENOENT, EOPNOTSUPP, ESRCH

from krun.errors import KrunError
from krun.network import netlink
from krun.network.address import parse_prefix
from krun.network.namespace import Inside
from krun.network.netlink import AF_INET, AF_INET6, RT_SCOPE_LINK, RT_SCOPE_UNIVERSE, Route

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from krun.network import model
    from krun.network.address import Prefix
    from krun.network.definition import Definition
    from krun.network.model import Bandwidth
    from krun.network.netlink import Attributes
    from krun.network.resolve import Link

# linux/if_addr.h
IFA_F_NODAD = 0x02
_COUNTERS = tuple(
    f"{side}_{what}" for side in ("rx", "tx") for what in ("bytes", "packets", "dropped", "errors")
)
# linux/if_link.h
_MACVLAN_MODES = {"private": 1, "vepa": 2, "bridge": 4, "passthru": 8}
_IPVLAN_MODES = {"l2": 0, "l3": 1, "l3s": 2}


def connect_in(namespace: int) -> Route:
    """Return a route netlink socket of the network namespace with that descriptor."""
    with Inside(namespace):
        return Route()


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
        if not isinstance(error, netlink.Refused):
            return False
        if error.errno in self._ignore:
            return True
        hint = "the kernel lacks it" if error.errno in (EOPNOTSUPP, ENOENT) else ""
        raise KrunError(f"{self._what}: {error.strerror}", hint) from error


def index_of(device: str) -> int:
    """Return the number of a device of this thread's namespace, 0 when there is none.

    An ioctl(2), which costs less than a message.
    """
    try:
        return if_nametoindex(device)
    except OSError:
        return 0


def kind_of(message: Any) -> str:
    """Return a link's kind (bridge, veth, …), "" for a plain device."""
    info = message.get_attr("IFLA_LINKINFO")
    return (info.get_attr("IFLA_INFO_KIND") or "") if info else ""


def describe(route: Route) -> dict[str, Any]:
    """Return what `krun network` shows of every device: kind, state, master, counters."""
    messages = route.links()
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


def networks_in_use(route: Route) -> list[str]:
    """Return the destinations of the host's routes, which a new network must not overlap."""
    found = []
    for family in (AF_INET, AF_INET6):
        for message in route.routes(family):
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


def add_address(route: Route, index: int, text: str, what: str) -> None:
    """Give a device an address; it is usable at once, as krun's leases say that it is unique."""
    prefix = parse_prefix(text)
    family, flags = (AF_INET, 0) if prefix.version == 4 else (AF_INET6, IFA_F_NODAD)
    with refusing(f"{what}: address {text}", EEXIST):
        route.make_address(index, family, str(prefix.address), prefix.length, flags)


def ensure_bridge(route: Route, definition: Definition) -> int:
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
    attributes: Attributes = [("IFLA_IFNAME", name), ("IFLA_ADDRESS", mac)]
    if definition.mtu:
        attributes.append(("IFLA_MTU", definition.mtu))
    attributes.append(_kind("bridge"))
    with refusing(f"make bridge {name}", EEXIST):
        route.make_link(attributes)
    index = index_of(name)
    for gateway, network in zip(definition.gateways, definition.ranges, strict=True):
        length = parse_prefix(network).length
        add_address(route, index, f"{gateway}/{length}", f"bridge {name}")
        forward(parse_prefix(network).version)
    with refusing(f"bridge {name} up"):
        route.set_link(index, up=True)
    # A published port reached by 127.0.0.1 is routed out of the bridge; the table krun drops
    # packets to loopback addresses that come in (CVE-2020-8558).
    sysctl(f"net/ipv4/conf/{name}/route_localnet", "1")
    return index


def _limit(route: Route, index: int, rate: int, limits: Bandwidth, what: str) -> None:
    """Limit what a device sends to `rate` bits per second."""
    size = limits.burst or max(rate // 8 // 100, 16 * 1024)
    with refusing(f"{what}: limit to {rate} bit/s with {limits.queue}"):
        if limits.queue == "fq":
            route.make_queue(index, "fq", netlink.fair_queue(rate // 8))
        else:
            route.make_queue(index, "tbf", netlink.token_bucket(rate // 8, size))


def _parent(link: Link) -> int:
    index = index_of(link.parent)
    if not index:
        raise KrunError(f"{link.kind} {link.name}: the host has no device {link.parent}")
    return index


def _kind(kind: str, *data: tuple[str, object]) -> tuple[str, object]:
    """Return the attribute that says what kind a new device is."""
    said: Attributes = [("IFLA_INFO_KIND", kind)]
    if data:
        said.append(("IFLA_INFO_DATA", {"attrs": list(data)}))
    return ("IFLA_LINKINFO", {"attrs": said})


def _make(host: Route, namespace: int, link: Link, bridge: int) -> None:
    """Make one link with its inner end in the namespace."""
    what = f"{link.kind} {link.name}"
    mtu: Attributes = [("IFLA_MTU", link.mtu)] if link.mtu else []
    inner: Attributes = [("IFLA_IFNAME", link.name), ("IFLA_NET_NS_FD", namespace), *mtu]
    if link.mac:
        inner.append(("IFLA_ADDRESS", link.mac))
    if link.kind == "veth":
        outer: Attributes = [("IFLA_IFNAME", link.host_name), *mtu]
        if bridge:
            outer.append(("IFLA_MASTER", bridge))
        with refusing(f"make {what} ({link.host_name} on the host)"):
            host.make_link([*outer, _kind("veth", ("VETH_INFO_PEER", {"attrs": inner}))], up=True)
        return
    parent = _parent(link)
    if link.kind == "device":
        with refusing(f"move device {link.parent} into the container"):
            host.set_link(parent, inner)
        return
    if link.kind == "ipvlan":
        kind = _kind("ipvlan", ("IFLA_IPVLAN_MODE", _IPVLAN_MODES[link.mode or "l2"]))
    else:
        kind = _kind("macvlan", ("IFLA_MACVLAN_MODE", _MACVLAN_MODES[link.mode or "bridge"]))
    with refusing(f"make {what} on {link.parent}"):
        host.make_link([*inner, ("IFLA_LINK", parent), kind])


def _addresses_of(route: Route, index: int) -> list[str]:
    """Return the global, permanent addresses of a device."""
    return [
        f"{message.get_attr('IFA_ADDRESS')}/{message['prefixlen']}"
        for message in route.addresses(index)
        if message["scope"] == RT_SCOPE_UNIVERSE
    ]


def _configure_host_end(host: Route, link: Link) -> None:
    """Address and limit the host's end of a veth."""
    limits = link.bandwidth
    index = index_of(link.host_name)
    if link.bridge:
        # With br_netfilter a container's packet to its own published port is turned round in the
        # bridge, which sends nothing back by the port it came from unless that is a hairpin.
        with refusing(f"{link.host_name}: hairpin"):
            host.set_port(index, [("IFLA_BRPORT_MODE", 1)])
    for address in link.host_addresses:
        add_address(host, index, address, link.host_name)
    for destination in link.host_routes:
        prefix = parse_prefix(destination)
        forward(prefix.version)
        with refusing(f"{link.host_name}: route to {destination}"):
            _add_route(host, prefix, index)
    if link.host_routes:
        sysctl(f"net/ipv4/conf/{link.host_name}/route_localnet", "1")
    if limits.ingress:
        _limit(host, index, limits.ingress, limits, link.host_name)


def _add_route(route: Route, prefix: Prefix, index: int, via: str = "", metric: int = 0) -> None:
    """Make a route by a gateway, or on the device's own link."""
    ipv4 = prefix.version == 4
    route.make_route(
        AF_INET if ipv4 else AF_INET6,
        str(prefix.address),
        prefix.length,
        index,
        via=via,
        metric=metric,
        # IPv6 has no scopes of routes.
        scope=RT_SCOPE_LINK if ipv4 and not via else RT_SCOPE_UNIVERSE,
    )


def configure(
    inside: Route, index: int, addresses: Iterable[str], routes: Iterable[model.Route], what: str
) -> None:
    """Give a container's interface its addresses and routes; those it has are passed over."""
    for address in addresses:
        add_address(inside, index, address, what)
    for wanted in routes:
        with refusing(f"{what}: route {wanted.destination} via {wanted.via or 'the link'}", EEXIST):
            prefix = parse_prefix(wanted.destination)
            _add_route(inside, prefix, index, wanted.via, wanted.metric)


def attach(host: Route, inside: Route, namespace: int, link: Link, bridge: int) -> None:
    """Make one interface of a container, addressed, routed and up."""
    what = f"{link.kind} {link.name}"
    addresses = list(link.addresses)
    if link.kind == "device" and not addresses:
        addresses = _addresses_of(host, _parent(link))
    _make(host, namespace, link, bridge)
    with Inside(namespace):
        index = index_of(link.name)
    with refusing(f"{what} up"):
        inside.set_link(index, up=True)
    configure(inside, index, addresses, link.routes, what)
    if link.bandwidth.egress:
        _limit(inside, index, link.bandwidth.egress, link.bandwidth, what)
    if link.kind == "veth":
        _configure_host_end(host, link)


def prepare(inside: Route, namespace: int) -> None:
    """Bring lo up in a new namespace, and set what every container expects."""
    with refusing("lo up"):
        inside.set_link(1, up=True)
    with Inside(namespace):
        # A payload without CAP_NET_BIND_SERVICE serves port 80, and pings, as under docker.
        sysctl("net/ipv4/ip_unprivileged_port_start", "0")
        sysctl("net/ipv4/ping_group_range", "0 2147483647")


def move_back(namespace: int, host_namespace: int, name: str, outside: str) -> None:
    """Return a moved device to the host under its old name."""
    with Inside(namespace), Route() as inside:
        index = index_of(name)
        if not index:
            return
        with refusing(f"move device {name} back to the host as {outside}", ENODEV):
            inside.set_link(index, up=False)
            inside.set_link(index, [("IFLA_NET_NS_FD", host_namespace), ("IFLA_IFNAME", outside)])


def delete(route: Route, device: str) -> None:
    """Delete a device; gone already is fine."""
    index = index_of(device)
    if index:
        with refusing(f"delete {device}", ENODEV, ESRCH):
            route.delete_link(index)
