"""Take networks down: of a container that is deleted, and of whatever was killed.

Every step may be repeated, and two processes may do it at once: the last to find something
removes it.  Addresses are given back when the interface that had them is down.
"""

from __future__ import annotations

import os

from krun.errors import KrunError
from krun.network import leases, namespace, state

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

_SIOCGIFFLAGS, _SIOCSIFFLAGS = 0x8913, 0x8914
_IFF_UP = 1


def alive(path: str, id: str, root: str) -> bool:
    """Whether a container, or the create that is about to make it, is there."""
    return os.path.isdir(f"{root}/{id}") or state.owned_by_living(path)


def _set_flags(device: str, clear: int) -> int:
    """Return a device's flags (netdevice(7)) after clearing some; raises OSError when gone.

    An ioctl(2) does what a route netlink socket does, without its import.
    """
    import _socket
    import fcntl

    request = bytearray(40)
    name = device.encode()
    request[: len(name)] = name
    any_socket = _socket.socket(_socket.AF_INET, _socket.SOCK_DGRAM | _socket.SOCK_CLOEXEC)
    try:
        fcntl.ioctl(any_socket.fileno(), _SIOCGIFFLAGS, request)
        flags = int.from_bytes(request[16:18], "little")
        if flags & clear:
            request[16:18] = (flags & ~clear).to_bytes(2, "little")
            fcntl.ioctl(any_socket.fileno(), _SIOCSIFFLAGS, request)
    finally:
        any_socket.close()
    return flags & ~clear


def _is_up(device: str) -> bool:
    try:
        return bool(_set_flags(device, 0) & _IFF_UP)
    except OSError:
        return False


def bring_down(devices: Iterable[str]) -> None:
    """Stop packets through these devices at once; one that is gone is passed over.

    The kernel deletes a veth some time after its namespace; until then its address would still
    answer.
    """
    for device in devices:
        try:
            _set_flags(device, _IFF_UP)
        except OSError:
            # Gone meanwhile (ENODEV).
            continue


def _move_devices_back(record: dict[str, Any]) -> None:
    """Return the host's own devices before their namespace ends."""
    moved = [one for one in record["interfaces"] if one["kind"] == "device"]
    path = record["namespace"]
    if not moved or state.inode(path) != record["inode"] or not record["inode"]:
        return
    from krun.network import links

    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    outside = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        for one in moved:
            links.move_back(fd, outside, one["name"], one["parent"])
    finally:
        os.close(outside)
        os.close(fd)


def _delete_named(devices: list[str]) -> None:
    """Delete devices whose names were asked for, and may be asked for again at once."""
    if not devices:
        return
    from krun.network import links, netlink

    with netlink.Route() as host:
        for device in devices:
            links.delete(host, device)


def _readable(place: str) -> dict[str, Any] | None:
    """Return a member's record; None without one, and for a damaged one.

    What it would tell, but for devices of the host, is found by the member's name.
    """
    try:
        record: dict[str, Any] | None = state.read(f"{place}/{state.RECORD}")
    except KrunError:
        return None
    return record


def take_down(directory: str, members: Iterable[str]) -> None:
    """Undo members whose records are in dying/."""
    members = list(members)
    places = {member: f"{directory}/dying/{member}" for member in members}
    records = {member: _readable(path) for member, path in places.items()}
    ruled = [m for m, path in places.items() if os.path.lexists(f"{path}/{state.RULES}")]
    if ruled:
        from krun.network import rules

        rules.withdraw(ruled)
    for record in records.values():
        if record is not None:
            names = [one["hostName"] for one in record["interfaces"] if one["hostName"]]
            bring_down(names)
            _delete_named([name for name in names if not state.member_of_link(name)])
            _move_devices_back(record)
    for member, path in places.items():
        if os.path.lexists(f"{path}/ports.json"):
            from krun.network import usermode

            usermode.end(directory, member, path)
        namespace.remove(f"{directory}/netns/{member}")
    leases.give_back(directory, members)
    for path in places.values():
        state.remove_tree(path)


def _retire(directory: str, path: str) -> list[str]:
    """Move the members of a container to dying/, and remove its record; under the lock."""
    moved = []
    for member in state.entries(path):
        if state.is_member(member) and state.bury(directory, f"{path}/{member}", member):
            moved.append(member)
    state.remove_tree(path)
    return moved


def release(id: str, root: str, wait: bool = True) -> None:
    """Take down the network of one container, and then what others left.

    Without `wait`, what nobody can notice is left to a process that outlives this one.
    """
    release_of(state.directory(), id, root, wait)


def release_of(directory: str, id: str, root: str, wait: bool = True) -> None:
    """See release(); `directory` is where networks are recorded."""
    path = state.container(directory, root, id)
    if not os.path.isdir(path):
        return
    with state.Lock(f"{directory}/lock"):
        members = _retire(directory, path)
    if wait or not all(_is_unnoticed(f"{directory}/dying/{member}") for member in members):
        _finish(directory, members)
        return
    # Taking a device down waits for the kernel's readers of it, 6 ms of a delete.  What is in
    # dying/ keeps its addresses meanwhile; one who wants them does the work itself (yield_all).
    if os.fork():
        return
    try:
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        for number in range(3):
            os.dup2(null, number)
        # An open pipe would tell conmon and containerd-shim that the runtime has not ended.
        os.closerange(3, 1 << 20)
        _finish(directory, members)
    finally:
        os._exit(0)


def _is_unnoticed(place: str) -> bool:
    """Whether a member has no more than veths, which are known by its own name.

    Published ports, devices of the host and names that were asked for are free when delete ends.
    """
    if os.path.lexists(f"{place}/{state.RULES}") or os.path.lexists(f"{place}/ports.json"):
        return False
    record = _readable(place)
    return record is not None and all(
        one["kind"] == "veth" and state.member_of_link(one["hostName"]) == record["member"]
        for one in record["interfaces"]
    )


def _finish(directory: str, members: list[str]) -> None:
    """Take down the members of a container, and what others left."""
    take_down(directory, members)
    # Many deletes at once need no more than one look at what others left.
    lock = state.Lock(f"{directory}/gc.lock")
    if lock.taken():
        try:
            gc(directory)
        finally:
            lock.release()


def yield_all(directory: str) -> bool:
    """Take down what waits in dying/; return whether there was anything."""
    dying = state.entries(f"{directory}/dying")
    if dying:
        take_down(directory, dying)
    return bool(dying)


def _devices() -> list[str]:
    import _socket

    return [name for _, name in _socket.if_nameindex()]


def _rebuild_leases(directory: str) -> list[str]:
    if not os.path.isdir(directory):
        return []
    with state.Lock(f"{directory}/bridge.lock"):
        return leases.rebuild(directory)


def gc(directory: str, thorough: bool = False) -> dict[str, list[str]]:
    """Remove all that belongs to no living container, pool or create; return what it was.

    What could be an orphan is listed first, what lives second: a member that comes to life in
    between is never taken for dead.  `thorough` looks at the firewall's elements too, and makes a
    lost file of leases anew, the addresses in which are `rebuilt`.
    """
    rebuilt = _rebuild_leases(directory) if thorough else []
    leased = set(leases.read(directory).held.values())
    mounted = set(state.entries(f"{directory}/netns"))
    devices = _devices()
    ruled: set[str] = set()
    helpers = []
    if thorough:
        from krun.network import rules, usermode

        helpers = usermode.helpers(directory)
        try:
            ruled = rules.members()
        except KrunError:
            # Without nft there are no rules of krun's either.
            ruled = set()
    removed: dict[str, list[str]] = {
        "containers": [],
        "members": [],
        "leases": [],
        "namespaces": [],
        "links": [],
        "rules": [],
        "helpers": [],
        "rebuilt": rebuilt,
    }
    with state.Lock(f"{directory}/lock"):
        for root, id in list(state.containers(directory)):
            path = state.container(directory, root, id)
            if not state.owner_of(path):
                state.remove_empty(path)
            elif not alive(path, id, root):
                _retire(directory, path)
                removed["containers"].append(id)
        for member in state.entries(f"{directory}/making"):
            path = f"{directory}/making/{member}"
            if not state.owner_of(path):
                state.remove_empty(path)
            elif not state.owned_by_living(path):
                state.bury(directory, path, member)
        dying = state.entries(f"{directory}/dying")
        if dying:
            take_down(directory, dying)
            removed["members"] = dying
        living = state.members(directory)
    removed["leases"] = sorted(leased - living.keys() - set(dying))
    if removed["leases"]:
        leases.give_back(directory, removed["leases"])
    removed["namespaces"] = sorted(mounted - living.keys() - set(dying))
    for member in removed["namespaces"]:
        namespace.remove(f"{directory}/netns/{member}")
    removed["links"] = _remove_links(devices, living, thorough)
    if helpers:
        removed["helpers"] = usermode.end_orphans(helpers, living)
    removed["rules"] = sorted(ruled - living.keys() - set(dying))
    if removed["rules"]:
        from krun.network import rules

        rules.withdraw(removed["rules"])
    return removed


def _remove_links(devices: list[str], living: dict[str, str], thorough: bool) -> list[str]:
    """Delete the host ends of veths whose member is gone.

    The end of a member just taken down is down and waits for the kernel to delete it, for which
    a delete need not import pyroute2; where a process holds the namespace on, it stays until the
    thorough gc.
    """
    orphans = [
        device
        for device in devices
        if (member := state.member_of_link(device)) and member not in living
    ]
    if not thorough:
        orphans = [device for device in orphans if _is_up(device)]
    if not orphans:
        return []
    from krun.network import links, netlink

    with netlink.Route() as host:
        for device in orphans:
            links.delete(host, device)
    return orphans
