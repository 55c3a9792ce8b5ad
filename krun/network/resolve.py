"""From what was asked for to what will be made: names, addresses, gateways, routes; pure."""

from __future__ import annotations

from krun.errors import BadSpec
from krun.network.address import BITS, contains, overlap, parse_network, parse_prefix
from krun.network.leases import Want
from krun.network.model import AUTO, Bandwidth, Interface, Route
from krun.network.reader import NAME_BYTES
from krun.network.state import LINK
from krun.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from krun.network.definition import Definition
    from krun.network.model import Network

# A veth without a bridge is routed: the host's end answers as this link-local gateway, so that
# no address of the range is spent on the host (the way Calico's and Cilium's endpoints do it).
ROUTED_GATEWAYS = {4: "169.254.1.1", 6: "fe80::1"}


class Link(Record):
    """One interface with every value decided.

    `host_name` is the veth's end on the host; `host_addresses` and `host_routes` are what a
    routed veth needs there; `peers` are the networks its packets may come from and go to.
    """

    kind: str
    name: str
    host_name: str
    bridge: str
    parent: str
    mode: str
    mac: str
    mtu: int
    addresses: tuple[str, ...]
    routes: tuple[Route, ...]
    host_addresses: tuple[str, ...]
    host_routes: tuple[str, ...]
    bandwidth: Bandwidth
    peers: tuple[str, ...]


def host_name(member: str, index: int) -> str:
    """Return the name of a veth's host end."""
    name = f"{LINK}{member}-{index}" if index else f"{LINK}{member}"
    return name[:NAME_BYTES]


def _check_within(interface: Interface, definition: Definition, path: str) -> None:
    ranges = [parse_network(text) for text in definition.ranges]
    shown = f"{', '.join(definition.ranges)} of network {definition.name}"
    for index, text in enumerate(interface.ranges):
        network = parse_network(text)
        if not any(overlap(r, network) and r.length <= network.length for r in ranges):
            raise BadSpec(f"{path}.ranges[{index}]", f"{text} is outside the range {shown}")
    for index, text in enumerate(interface.addresses):
        if text != AUTO and not any(contains(r, parse_prefix(text).address) for r in ranges):
            raise BadSpec(f"{path}.addresses[{index}]", f"{text} is outside the range {shown}")


def wants(interface: Interface, definition: Definition | None, path: str) -> list[Want]:
    """Return the addresses to lease for an interface; raises BadSpec for one out of range."""
    if definition is not None:
        _check_within(interface, definition, path)
    links = [parse_network(text) for text in (definition.ranges if definition else ())]
    reserved = interface.gateways + (definition.gateways if definition else ())
    found = []
    versions = set()
    for text in interface.addresses:
        if text == AUTO:
            continue
        prefix = parse_prefix(text)
        if str(prefix.address) in reserved:
            raise BadSpec(f"{path}.addresses", f"{prefix.address} is the gateway's")
        versions.add(prefix.version)
        found.append(Want(fixed=text))
    if AUTO not in interface.addresses:
        return found
    for text in interface.ranges or (definition.ranges if definition else ()):
        network = parse_network(text)
        if network.version in versions:
            continue
        versions.add(network.version)
        length = next((one.length for one in links if overlap(one, network)), network.length)
        found.append(Want(str(network), "", length, reserved))
    return found


def links(
    network: Network,
    definitions: tuple[Definition | None, ...],
    addresses: tuple[tuple[str, ...], ...],
    member: str,
) -> tuple[Link, ...]:
    """Return the interfaces to make; definitions and addresses run parallel to the interfaces.

    The first interface that has a gateway of a family gets that family's default route.
    """
    made = []
    have_default: set[int] = set()
    for index, interface in enumerate(network.interfaces):
        definition = definitions[index]
        own = [parse_prefix(text) for text in addresses[index]]
        routed = interface.kind == "veth" and not interface.bridge
        routes = list(interface.routes)
        gateways = interface.gateways or (definition.gateways if definition else ())
        host_addresses: tuple[str, ...] = ()
        host_routes: tuple[str, ...] = ()
        if routed:
            versions = sorted({one.version for one in own})
            gateways = tuple(ROUTED_GATEWAYS[version] for version in versions)
            host_addresses = tuple(
                f"{ROUTED_GATEWAYS[version]}/{32 if version == 4 else 64}" for version in versions
            )
            host_routes = tuple(f"{one.address}/{BITS[one.version]}" for one in own)
            if 4 in versions:
                routes.insert(0, Route(f"{ROUTED_GATEWAYS[4]}/32"))
            own = [one._replace(length=BITS[one.version]) for one in own]
        given = {route.destination for route in routes}
        for gateway in gateways:
            version = 6 if ":" in gateway else 4
            everything = "::/0" if version == 6 else "0.0.0.0/0"
            usable = any(one.version == version for one in own)
            if usable and version not in have_default and everything not in given:
                have_default.add(version)
                routes.append(Route(everything, gateway))
        made.append(
            Link(
                interface.kind,
                interface.name,
                (interface.host_name or host_name(member, index))
                if interface.kind == "veth"
                else "",
                interface.bridge,
                interface.parent,
                interface.mode,
                interface.mac,
                interface.mtu or (definition.mtu if definition else 0),
                tuple(str(one) for one in own),
                tuple(routes),
                host_addresses,
                host_routes,
                interface.bandwidth,
                interface.peers,
            )
        )
    return tuple(made)
