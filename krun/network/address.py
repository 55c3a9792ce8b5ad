"""Addresses and networks of both families as integers; pure, and cheap to import.

The ipaddress module costs 4 ms, which a start cannot afford.
"""

from __future__ import annotations

from _socket import AF_INET, AF_INET6, inet_ntop, inet_pton

from krun.record import Record

_FAMILIES = {4: AF_INET, 6: AF_INET6}
BITS = {4: 32, 6: 128}


class Address(Record):
    """One address: `version` is 4 or 6."""

    version: int
    value: int

    def __str__(self) -> str:
        packed = self.value.to_bytes(BITS[self.version] // 8, "big")
        return inet_ntop(_FAMILIES[self.version], packed)


class Prefix(Record):
    """An address with the length of its network prefix in bits."""

    version: int
    value: int
    length: int

    @property
    def address(self) -> Address:
        """The address without the length."""
        return Address(self.version, self.value)

    @property
    def first(self) -> int:
        """The network's own number: every host bit is 0."""
        host = BITS[self.version] - self.length
        return self.value >> host << host

    @property
    def last(self) -> int:
        """The number with every host bit 1 (IPv4's broadcast address)."""
        return self.first | (1 << (BITS[self.version] - self.length)) - 1

    def __str__(self) -> str:
        return f"{self.address}/{self.length}"


def parse_address(text: str) -> Address:
    """Read 10.0.0.1 or fd00::1; raises ValueError."""
    version = 6 if ":" in text else 4
    try:
        packed = inet_pton(_FAMILIES[version], text)
    except (OSError, ValueError):
        raise ValueError(f"{text!r} is not an IPv4 or IPv6 address") from None
    return Address(version, int.from_bytes(packed, "big"))


def parse_prefix(text: str) -> Prefix:
    """Read 10.0.0.1/24 or fd00::1/64, host bits kept; raises ValueError."""
    address, slash, digits = text.partition("/")
    found = parse_address(address)
    bits = BITS[found.version]
    if not slash or not (digits.isascii() and digits.isdigit()) or int(digits) > bits:
        raise ValueError(f"{text!r} is not an address with a prefix length (ADDRESS/0..{bits})")
    return Prefix(found.version, found.value, int(digits))


def parse_network(text: str) -> Prefix:
    """Read a network such as 10.0.0.0/24; raises ValueError when a host bit is set."""
    network = parse_prefix(text)
    if network.value != network.first:
        corrected = Prefix(network.version, network.first, network.length)
        raise ValueError(f"{text!r} has host bits set (the network is {corrected})")
    return network


def contains(network: Prefix, address: Address) -> bool:
    """Whether the address lies in the network."""
    return network.version == address.version and network.first <= address.value <= network.last


def overlap(one: Prefix, other: Prefix) -> bool:
    """Whether two networks share an address."""
    return one.version == other.version and one.first <= other.last and other.first <= one.last


def usable(network: Prefix) -> tuple[int, int]:
    """Return the first and last number that a host may have (RFC 1122, 4291, 3021, 6164)."""
    if network.length >= BITS[network.version] - 1:
        return network.first, network.last
    # IPv4 keeps the last for broadcast, IPv6 the first for the subnet-router anycast address.
    return network.first + 1, network.last - (1 if network.version == 4 else 0)
