"""Which member has which address: one file, replaced as a whole under a lock.

A lease is written before its address is configured, and removed after the interface that had it
is down, so no address is ever on two interfaces.  Addresses are handed out in a circle: one that
was just given back comes round again last, when no neighbour cache knows it any more.  A file that
is lost or damaged is made anew from the members' records.
"""

from __future__ import annotations

import os

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


def _stored(directory: str) -> Leases | None:
    """Return the leases as they are on disk; None where the file is lost or damaged."""
    try:
        document = state.read(f"{directory}/leases.json")
    except KrunError:
        return None
    if not isinstance(document, dict):
        return None
    leases = Leases(document.get("leases", 0), document.get("last", 0))
    for table in leases:
        if not isinstance(table, dict) or not all(isinstance(one, str) for one in table.values()):
            return None
    return leases


def recorded(directory: str) -> Leases:
    """Return the leases that the members' records show.

    A member that is about to be made may have leases and no record yet: only who holds
    bridge.lock, under which both are written, may take these for all.
    """
    held: dict[str, str] = {}
    seen: set[str] = set()
    while True:
        passed = set()
        # Those in dying/ first: an address that is given back may have another owner already.
        for member, place in reversed(state.members(directory).items()):
            if member in seen:
                continue
            record = state.read(f"{place}/{state.RECORD}")
            if record is None:
                if not os.path.isdir(place):
                    passed.add(member)
                continue
            seen.add(member)
            for one in record["interfaces"]:
                # slirp4netns's address is the same in every container.
                if one["kind"] != "user":
                    held.update((text.partition("/")[0], member) for text in one["addresses"])
        # One that moved between being listed and being read is listed again.
        if not passed:
            return Leases(held, {})


def read(directory: str) -> Leases:
    """Return the leases; where the file is lost, those that the members' records show."""
    return _stored(directory) or recorded(directory)


def _write(directory: str, leases: Leases) -> None:
    text = jsontext.dumps({"leases": leases.held, "last": leases.last})
    state.write(f"{directory}/leases.json", text, 0o600)


def rebuild(directory: str) -> list[str]:
    """Write the file anew from the members' records, if it is lost; return the addresses in it.

    The caller holds bridge.lock.
    """
    with state.Lock(f"{directory}/leases.lock"):
        if _stored(directory) is not None:
            return []
        leases = recorded(directory)
        if leases.held or os.path.exists(f"{directory}/leases.json"):
            _write(directory, leases)
        return sorted(leases.held)


def take(directory: str, member: str, wants: list[Want]) -> list[str]:
    """Lease addresses for a member: all of them, or none and a KrunError.

    The caller holds bridge.lock.
    """
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
        leases = _stored(directory)
        if leases is None:
            # Their records are about to go, so that they are in no file made from the records.
            return
        held = {address: member for address, member in leases.held.items() if member not in gone}
        if len(held) != len(leases.held):
            _write(directory, Leases(held, leases.last))
