"""Networks that containers share: a bridge, its ranges of addresses and what becomes of packets."""

from __future__ import annotations

import os

from krun import jsontext
from krun.errors import KrunError
from krun.network import state
from krun.network.address import (
    Address,
    Prefix,
    contains,
    overlap,
    parse_address,
    parse_network,
    usable,
)
from krun.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

# Where first use looks for a free network: 10.91.0.0/16 by /24, and the same number in a ULA.
_FREE4 = "10.91.{}.0/24"
_FREE6 = "fd91:0:0:{:x}::/64"


class Definition(Record):
    """A network: `name` is its bridge's; gateways are the bridge's addresses, one a range."""

    name: str
    ranges: tuple[str, ...]
    gateways: tuple[str, ...]
    mtu: int = 0
    masquerade: bool = True
    permanent: bool = False


def gateway_of(network: Prefix) -> str:
    """Return the address that a bridge takes when none is named: the first usable one."""
    return str(Address(network.version, usable(network)[0]))


def define(
    name: str,
    ranges: Iterable[str],
    gateways: Iterable[str] = (),
    *,
    mtu: int = 0,
    masquerade: bool = True,
    permanent: bool = False,
) -> Definition:
    """Return a checked definition; raises KrunError.  Pure."""
    networks: list[Prefix] = []
    for text in ranges:
        try:
            network = parse_network(text)
        except ValueError as error:
            raise KrunError(f"network {name}: {error}") from None
        if network.last - network.first < 3:
            raise KrunError(f"network {name}: {text} has no room for a gateway and a container")
        if any(overlap(network, other) for other in networks):
            raise KrunError(f"network {name}: {text} overlaps another of its ranges")
        networks.append(network)
    if not networks:
        raise KrunError(f"network {name} has no range")
    named = []
    for text in gateways:
        try:
            address = parse_address(text)
        except ValueError as error:
            raise KrunError(f"network {name}: gateway {error}") from None
        if not any(contains(network, address) for network in networks):
            raise KrunError(f"network {name}: gateway {text} is outside its ranges")
        named.append(address)
    chosen = tuple(
        next((str(a) for a in named if contains(network, a)), gateway_of(network))
        for network in networks
    )
    return Definition(name, tuple(str(n) for n in networks), chosen, mtu, masquerade, permanent)


def first_free(taken: Iterable[Prefix], ipv6: bool) -> tuple[str, ...]:
    """Return ranges for a network defined on first use, clear of those taken.  Pure."""
    taken = list(taken)
    for number in range(256):
        ranges = [_FREE4.format(number)]
        if ipv6:
            ranges.append(_FREE6.format(number))
        networks = [parse_network(text) for text in ranges]
        if not any(overlap(one, other) for one in networks for other in taken):
            return tuple(ranges)
    raise KrunError(
        "no free network is left in 10.91.0.0/16", "name one: krun network create NAME --range …"
    )


def _from_document(document: Any, path: str, permanent: bool) -> Definition:
    try:
        return define(
            document["name"],
            document["ranges"],
            document.get("gateways", ()),
            mtu=document.get("mtu", 0),
            masquerade=document.get("masquerade", True),
            permanent=permanent,
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise KrunError(f"{path}: is no network definition: {error}") from None


def _paths(directory: str, name: str) -> tuple[str, str]:
    return f"{state.DEFINITIONS}/{name}.json", f"{directory}/networks/{name}.json"


def read(directory: str, name: str) -> Definition | None:
    """Return a network's definition: the administrator's, else that of first use."""
    for path in _paths(directory, name):
        document = state.read(path)
        if document is not None:
            return _from_document(document, path, path.startswith(state.DEFINITIONS))
    return None


def all_of(directory: str) -> list[Definition]:
    """Return every defined network, by name."""
    names = {
        entry[: -len(".json")]
        for place in (state.DEFINITIONS, f"{directory}/networks")
        for entry in state.entries(place)
        if entry.endswith(".json")
    }
    found = (read(directory, name) for name in sorted(names))
    return [one for one in found if one is not None]


def write(directory: str, one: Definition) -> None:
    """Save a definition where its permanence belongs."""
    path = _paths(directory, one.name)[0 if one.permanent else 1]
    os.makedirs(os.path.dirname(path), 0o755, exist_ok=True)
    document = one._asdict()
    del document["permanent"]
    state.write(path, jsontext.dumps(document, indent="  ") + "\n")


def forget(directory: str, name: str) -> None:
    """Remove a network's definition."""
    for path in _paths(directory, name):
        try:
            os.unlink(path)
        except FileNotFoundError:
            pass


def conflicts(one: Definition, others: Iterable[Definition]) -> str:
    """Return what else uses one of the ranges, "" when nothing does.  Pure."""
    for other in others:
        if other.name == one.name:
            continue
        for text in one.ranges:
            for taken in other.ranges:
                if overlap(parse_network(text), parse_network(taken)):
                    return f"{text} overlaps {taken} of network {other.name}"
    return ""
