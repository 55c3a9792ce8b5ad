"""Which member has which address: one file, replaced as a whole under a lock.

A lease is written before its address is configured, and removed after the interface that had it
is down, so no address is ever on two interfaces.  Addresses are handed out in a circle: one that
was just given back comes round again last, when no neighbour cache knows it any more.
"""

from __future__ import annotations

from krun import jsontext
from krun.errors import KrunError
from krun.network import state
from krun.network.address import Address, Prefix, contains, parse_network, parse_prefix, usable
from krun.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable


class Want(Record):
    """One address to lease: from `network`, or `fixed` itself when that is not empty.

    `length` is the prefix length the interface gets; `reserved` is what nobody may have.
    """

    network: str = ""
    fixed: str = ""
    length: int = 0
    reserved: tuple[str, ...] = ()


class Leases(Record):
    """All leases: address → member, and for each network the last address handed out."""

    held: dict[str, str]
    last: dict[str, str]


def exhausted(network: str, held: int) -> KrunError:
    """The error of a range without a free address."""
    return KrunError(
        f"network {network}: every address is in use ({held} leases)",
        "delete containers, lower the size of the pool, or define a larger range",
    )


def choose(leases: Leases, network: Prefix, reserved: Iterable[str]) -> Address:
    """Return the next free address of the network; raises KrunError when there is none.  Pure."""
    first, last = usable(network)
    avoid = set(reserved)
    previous = leases.last.get(str(network))
    start = first
    if previous is not None:
        start = parse_prefix(f"{previous}/0").value + 1
        if not first <= start <= last:
            start = first
    # No more than this many can be taken, so the walk ends even in an IPv6 network.
    steps = min(last - first + 1, len(leases.held) + len(avoid) + 1)
    value = start
    for _ in range(steps):
        address = Address(network.version, value)
        text = str(address)
        if text not in leases.held and text not in avoid:
            return address
        value = first if value == last else value + 1
    count = sum(contains(network, parse_prefix(f"{text}/0").address) for text in leases.held)
    raise exhausted(str(network), count)


def grant(leases: Leases, member: str, wants: Iterable[Want]) -> tuple[Leases, list[str]]:
    """Return the leases with those of wants added, and the addresses as ADDRESS/LENGTH.  Pure.

    Raises KrunError when an address is taken or a range is exhausted.
    """
    held, last = dict(leases.held), dict(leases.last)
    granted = []
    for want in wants:
        if want.fixed:
            prefix = parse_prefix(want.fixed)
            text = str(prefix.address)
            if text in held or text in want.reserved:
                owner = f"member {held[text]}" if text in held else "the network's gateway"
                raise KrunError(f"address {text} is in use by {owner}", "see krun network ls")
            granted.append(want.fixed)
        else:
            network = parse_network(want.network)
            address = choose(Leases(held, last), network, want.reserved)
            text = str(address)
            last[want.network] = text
            granted.append(f"{text}/{want.length or network.length}")
        held[text] = member
    return Leases(held, last), granted


def read(directory: str) -> Leases:
    """Return the leases as they are on disk."""
    document = state.read(f"{directory}/leases.json") or {}
    return Leases(document.get("leases", {}), document.get("last", {}))


def _write(directory: str, leases: Leases) -> None:
    text = jsontext.dumps({"leases": leases.held, "last": leases.last})
    state.write(f"{directory}/leases.json", text, 0o600)


def take(directory: str, member: str, wants: list[Want]) -> list[str]:
    """Lease addresses for a member: all of them, or none and a KrunError."""
    if not wants:
        return []
    with state.Lock(f"{directory}/leases.lock"):
        leases, granted = grant(read(directory), member, wants)
        _write(directory, leases)
    return granted


def give_back(directory: str, members: Iterable[str]) -> None:
    """End every lease of these members."""
    gone = set(members)
    with state.Lock(f"{directory}/leases.lock"):
        leases = read(directory)
        held = {address: member for address, member in leases.held.items() if member not in gone}
        if len(held) != len(leases.held):
            _write(directory, Leases(held, leases.last))
