"""Make a member: namespace, interfaces, addresses, rules.  Off the path of a pooled start."""

from __future__ import annotations

import os

from krun import jsontext, log
from krun.errors import KrunError
from krun.host import rootless
from krun.network import (
    definition,
    leases,
    links,
    namespace,
    netlink,
    reader,
    resolve,
    rules,
    state,
)
from krun.network.address import BITS, parse_network, parse_prefix

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from krun.network.definition import Definition
    from krun.network.model import Interface, Network
    from krun.network.netlink import Route
    from krun.network.resolve import Link


def check_bridge_name(host: Route, name: str) -> None:
    """Raise KrunError when a device that is no bridge has the name."""
    index = links.index_of(name)
    kind = links.kind_of(host.link(index)) if index else "bridge"
    if kind != "bridge":
        raise KrunError(
            f"{name} is a {kind or 'plain'} device of the host, not a bridge",
            "name another bridge; krun makes it on first use",
        )


def first_use(host: Route, directory: str, interface: Interface, masquerade: bool) -> Definition:
    """Define the network of a bridge that nobody defined, in ranges that nothing else uses."""
    others = definition.all_of(directory)
    in_use = links.networks_in_use(host)
    taken = [parse_network(text) for one in others for text in one.ranges]
    taken += [parse_prefix(text) for text in in_use]
    ranges = interface.ranges or definition.first_free(taken, links.have_ipv6())
    one = definition.define(
        interface.bridge, ranges, interface.gateways, mtu=interface.mtu, masquerade=masquerade
    )
    conflict = definition.conflicts(one, others)
    if conflict:
        raise KrunError(f"network {one.name}: {conflict}")
    return one


def restore_rules(directory: str) -> None:
    """Load the tables, and what the defined networks have in them."""
    with state.Lock(f"{directory}/bridge.lock"):
        _restore_rules(directory)


def _restore_rules(directory: str) -> None:
    if rules.loaded():
        return
    rules.load()
    for one in definition.all_of(directory):
        if one.masquerade:
            _masquerade(one)


def _masquerade(one: Definition) -> None:
    try:
        rules.masquerade(one.ranges)
    except rules.NftFailed as error:
        raise KrunError(f"nftables: masquerade {', '.join(one.ranges)}: {error}") from None


def ensure(host: Route, directory: str, one: Definition, known: bool) -> int:
    """Make a network's bridge and rules unless they are there; return the bridge's number."""
    if not known:
        definition.write(directory, one)
    if one.masquerade:
        try:
            rules.masquerade(one.ranges)
        except rules.NftFailed:
            _restore_rules(directory)
            _masquerade(one)
    return links.ensure_bridge(host, one)


def _definitions(
    host: Route, directory: str, network: Network, base: str
) -> tuple[tuple[Definition | None, ...], list[list[leases.Want]], set[str]]:
    """Return each interface's network and addresses wanted, and the networks yet unknown."""
    found: list[Definition | None] = []
    wanted = []
    unknown = set()
    for index, interface in enumerate(network.interfaces):
        one = None
        if interface.parent and not links.index_of(interface.parent):
            raise KrunError(f"{interface.kind} {interface.name}: no device {interface.parent}")
        if interface.bridge:
            check_bridge_name(host, interface.bridge)
            one = definition.read(directory, interface.bridge)
            if one is None:
                one = first_use(host, directory, interface, network.masquerade)
                unknown.add(one.name)
        found.append(one)
        wanted.append(resolve.wants(interface, one, f"{base}.interfaces[{index}]"))
    return tuple(found), wanted, unknown


def _grant(
    directory: str, member: str, wanted: list[list[leases.Want]]
) -> tuple[tuple[str, ...], ...]:
    flat = [one for group in wanted for one in group]
    try:
        granted = leases.take(directory, member, flat)
    except KrunError:
        from krun.network import removal

        # A container that was deleted a moment ago may still have what is wanted.
        if not removal.yield_all(directory):
            raise
        granted = leases.take(directory, member, flat)
    groups = []
    for group in wanted:
        groups.append(tuple(granted[: len(group)]))
        del granted[: len(group)]
    return tuple(groups)


def _record(member: str, directory: str, made: tuple[Link, ...]) -> dict[str, Any]:
    return {
        "member": member,
        "namespace": f"{directory}/netns/{member}",
        "inode": 0,
        "interfaces": [
            {
                "kind": link.kind,
                "name": link.name,
                "hostName": link.host_name,
                "bridge": link.bridge,
                "parent": link.parent,
                "addresses": list(link.addresses),
                "gateways": [route.via for route in link.routes if route.destination[-2:] == "/0"],
                "routes": [list(route) for route in link.routes],
            }
            for link in made
        ],
    }


def _rules(network: Network, made: tuple[Link, ...], member: str) -> list[tuple[str, str, Any]]:
    """Load what a member needs of rules that its network has not got: peers, routed sources."""
    elements = rules.guards(made, member)
    if network.masquerade:
        for link in made:
            if link.kind == "veth" and not link.bridge:
                for text in link.addresses:
                    prefix = parse_prefix(text)
                    value = {
                        "elem": {
                            "val": {
                                "prefix": {
                                    "addr": str(prefix.address),
                                    "len": BITS[prefix.version],
                                }
                            },
                            "comment": member,
                        }
                    }
                    elements.append(("inet", f"subnets{prefix.version}", value))
    return elements


def _build(host: Route, directory: str, network: Network, place: str, base: str) -> dict[str, Any]:
    """Make everything of one member whose record directory is `place`."""
    member = os.path.basename(place)
    with state.Lock(f"{directory}/bridge.lock"):
        definitions, wanted, unknown = _definitions(host, directory, network, base)
        if any(one and one.masquerade for one in definitions):
            rules.program()
        granted = _grant(directory, member, wanted)
        made = resolve.links(network, definitions, granted, member)
        record = _record(member, directory, made)
        path = f"{place}/{state.RECORD}"
        state.write(path, jsontext.dumps(record))
        bridges = {
            one.name: ensure(host, directory, one, one.name not in unknown)
            for one in definitions
            if one is not None
        }
        elements = _rules(network, made, member)
        if elements:
            state.write(f"{place}/{state.RULES}", "")
            _restore_rules(directory)
            rules.publish(elements)
    fd = namespace.create(record["namespace"])
    try:
        with links.connect_in(fd) as inside:
            links.prepare(inside, fd)
            for link in made:
                links.attach(host, inside, fd, link, bridges.get(link.bridge, 0))
        record["inode"] = os.fstat(fd).st_ino
    finally:
        os.close(fd)
    state.write(path, jsontext.dumps(record))
    return record


def make(directory: str, host: Route, network: Network, target: str, base: str) -> dict[str, Any]:
    """Make a member and move its record to target/MEMBER; nothing is left of a failed one."""
    member = state.new_member()
    place = f"{directory}/making/{member}"
    state.make_owned(place)
    try:
        record = _build(host, directory, network, place, base)
        if not state.move(place, f"{target}/{member}"):
            raise KrunError(f"{target} was removed while the network was made")
    except BaseException:
        from krun.network import removal

        state.bury(directory, place, member)
        removal.take_down(directory, [member])
        raise
    os.unlink(f"{target}/{member}/{state.OWNER}")
    return record


def into(
    directory: str, network: Network, path: str, base: str = "kontain.network"
) -> dict[str, Any]:
    """Make the network of one container, now."""
    if rootless():
        raise KrunError(
            f"a {network.interfaces[0].kind} interface needs the host's root"
            if network.interfaces
            else "a network needs the host's root",
            "ask for the network user",
        )
    with netlink.Route() as host:
        return make(directory, host, network, path, base)


def fill(directory: str, key: str, network: Network, size: int) -> int:
    """Fill a pool up to size; return how many were made.  The caller holds its filler.lock."""
    from krun.network import pool

    path = pool.directory_of(directory, key)
    made = 0
    with netlink.Route() as host:
        while len(pool.ready(directory, key)) < size:
            make(directory, host, network, path, "interface")
            made += 1
            log.debug(f"network pool {key}: {made} made")
    return made


def network_of(key: str) -> Network:
    """Return the network that the members of a pool have (the inverse of model.pool_key)."""
    bridge, name, *mtu = key.split(",")
    one: dict[str, Any] = {"bridge": bridge, "name": name}
    if mtu:
        one["mtu"] = int(mtu[0]) if mtu[0].isdigit() else 0
    return reader.parse({"interfaces": [one]}, f"pool {key}")
