"""Published ports, masquerading and peers: elements of the nftables sets in rules.nft.

The rules are loaded once, as text; elements go in and come out through nft's JSON interface, a
transaction at a time.  nft is started without the subprocess module, as publishing a port is
part of a start.
"""

from __future__ import annotations

import os

from krun import jsontext
from krun.errors import KrunError
from krun.network.address import parse_address, parse_network

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from krun.network.model import Port
    from krun.network.resolve import Link

_PLACES = ("/usr/sbin/nft", "/sbin/nft", "/usr/bin/nft", "/usr/local/sbin/nft")
TABLES = (("inet", "krun"), ("bridge", "krun"))
_PROTOCOL_NUMBERS = {"tcp": 6, "udp": 17, "sctp": 132}


class NftFailed(Exception):
    """nft ended with an error; the text is its own."""


def program() -> str:
    """Return the path of nft; raises KrunError when there is none."""
    for path in _PLACES:
        if os.access(path, os.X_OK):
            return path
    raise KrunError(
        "nft is not installed; ports, masquerading and peers are nftables rules",
        'apt install nftables, or ask for "masquerade": false and no ports',
    )


def _read(fd: int) -> str:
    os.lseek(fd, 0, os.SEEK_SET)
    pieces = []
    while piece := os.read(fd, 1 << 16):
        pieces.append(piece)
    return b"".join(pieces).decode("utf-8", "replace")


def nft(arguments: list[str], text: str = "") -> str:
    """Run nft with text as its input; return what it printed.  Raises NftFailed."""
    path = program()
    files = [os.memfd_create(name) for name in ("nft-input", "nft-output", "nft-errors")]
    try:
        os.write(files[0], text.encode("utf-8"))
        os.lseek(files[0], 0, os.SEEK_SET)
        actions = [(os.POSIX_SPAWN_DUP2, fd, number) for number, fd in enumerate(files)]
        pid = os.posix_spawn(path, [path, *arguments], {"PATH": "/usr/sbin"}, file_actions=actions)
        _, status = os.waitpid(pid, 0)
        if os.waitstatus_to_exitcode(status):
            said = _read(files[2]).strip().splitlines()
            raise NftFailed(said[0] if said else f"nft ended with status {status}")
        return _read(files[1])
    finally:
        for fd in files:
            os.close(fd)


def load() -> None:
    """Load the two tables; only for a host that has not got them."""
    with open(f"{os.path.dirname(__file__)}/rules.nft") as file:
        text = file.read()
    # Declaring each table first and deleting it makes the load a replacement in one transaction.
    head = "".join(f"table {f} {t} {{}}\ndelete table {f} {t}\n" for f, t in TABLES)
    try:
        nft(["-f", "-"], head + text)
    except NftFailed as error:
        raise KrunError(f"nftables: {error}", "is CONFIG_NF_TABLES in the kernel?") from None


def loaded() -> bool:
    """Whether both tables are there."""
    try:
        listing = nft(["-j", "list", "tables"])
    except NftFailed:
        return False
    tables = [one["table"] for one in jsontext.loads(listing)["nftables"] if "table" in one]
    return all(
        any(one["family"] == family and one["name"] == name for one in tables)
        for family, name in TABLES
    )


def unload() -> None:
    """Remove both tables, with every rule and element."""
    head = "".join(f"table {f} {t} {{}}\ndelete table {f} {t}\n" for f, t in TABLES)
    try:
        nft(["-f", "-"], head)
    except NftFailed as error:
        raise KrunError(f"nftables: {error}") from None


def _change(verb: str, elements: list[tuple[str, str, Any]]) -> None:
    """Run one transaction over (family, set, element)."""
    commands = [
        {verb: {"element": {"family": family, "table": "krun", "name": name, "elem": [element]}}}
        for family, name, element in elements
    ]
    nft(["-j", "-f", "-"], jsontext.dumps({"nftables": commands}))


def _prefix(text: str) -> Any:
    network = parse_network(text)
    return {"prefix": {"addr": str(network.address), "len": network.length}}


def _named(value: Any, member: str) -> Any:
    return {"elem": {"val": value, "comment": member}} if member else value


def masquerade(networks: Iterable[str], member: str = "") -> None:
    """Masquerade packets of these networks that leave to elsewhere; again is fine."""
    elements: list[tuple[str, str, Any]] = [
        ("inet", f"subnets{6 if ':' in text else 4}", _named(_prefix(text), member))
        for text in networks
    ]
    if elements:
        _change("add", elements)


def stop_masquerade(networks: Iterable[str]) -> None:
    """Undo masquerade() of a network; one that is not there is passed over."""
    for text in networks:
        try:
            _change("delete", [("inet", f"subnets{6 if ':' in text else 4}", _prefix(text))])
        except NftFailed:
            pass


def publications(
    ports: Iterable[Port], targets: dict[int, str], member: str
) -> list[tuple[str, str, Any]]:
    """Return the map elements that publish ports on a container's addresses.  Pure.

    Raises KrunError for an address of a family that the container has not got.
    """
    elements: list[tuple[str, str, Any]] = []
    for port in ports:
        versions = [parse_address(port.address).version] if port.address else sorted(targets)
        for version in versions:
            if version not in targets:
                raise KrunError(
                    f"port {port.host}/{port.protocol} on {port.address}: "
                    f"the container has no IPv{version} address"
                )
            key: list[Any] = [port.protocol, port.host]
            name = f"publish{version}"
            if port.address:
                key.insert(0, port.address)
                name = f"publish_at{version}"
            to = {"concat": [targets[version], port.container]}
            elements.append(("inet", name, [_named({"concat": key}, member), to]))
    return elements


def guards(links: Iterable[Link], member: str) -> list[tuple[str, str, Any]]:
    """Return the elements that limit links to their peers.  Pure."""
    elements: list[tuple[str, str, Any]] = []
    for link in links:
        if not link.peers:
            continue
        family = "bridge" if link.bridge else "inet"
        elements.append((family, "guarded", _named(link.host_name, member)))
        for text in link.peers:
            value = {"concat": [link.host_name, _prefix(text)]}
            version = parse_network(text).version
            elements.append((family, f"peers{version}", _named(value, member)))
    return elements


def publish(elements: list[tuple[str, str, Any]]) -> None:
    """Add elements, all or none; raises KrunError when a port is taken."""
    if not elements:
        return
    try:
        _change("create", elements)
    except NftFailed as error:
        if "File exists" not in str(error):
            raise KrunError(f"nftables: {error}") from None
        wanted = ", ".join(_shown(element) for _, name, element in elements if "publish" in name)
        raise KrunError(
            f"a port is already published by another container: {wanted}", "see krun network ls"
        ) from None


def _shown(element: Any) -> str:
    key = element[0]["elem"]["val"]["concat"]
    return f"{key[-1]}/{key[-2]}"


def _listing() -> list[tuple[str, str, Any]]:
    """Return (family, set, element) of every element in krun's tables."""
    found = []
    for family, table in TABLES:
        try:
            text = nft(["-j", "list", "table", family, table])
        except NftFailed:
            continue
        for one in jsontext.loads(text)["nftables"]:
            body = one.get("set") or one.get("map")
            if body:
                found += [(family, body["name"], element) for element in body.get("elem", ())]
    return found


def _comment(element: Any) -> str:
    key = element[0] if isinstance(element, list) else element
    body = key.get("elem") if isinstance(key, dict) else None
    return body.get("comment", "") if isinstance(body, dict) else ""


def members() -> set[str]:
    """Return every member that has an element."""
    return {name for _, _, element in _listing() if (name := _comment(element))}


def withdraw(gone: Iterable[str]) -> None:
    """Remove every element of these members."""
    names = set(gone)
    elements = [one for one in _listing() if _comment(one[2]) in names]
    if not elements:
        return
    try:
        _change("delete", elements)
    except NftFailed:
        # Another process removed some meanwhile, which undoes the whole transaction.
        for one in elements:
            try:
                _change("delete", [one])
            except NftFailed:
                pass


def check_free(ports: Iterable[Port]) -> None:
    """Raise KrunError when a program of the host listens on one of the ports."""
    ports = tuple(ports)
    if not ports:
        return
    import _socket as socket

    kinds = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM, "sctp": socket.SOCK_STREAM}
    for port in ports:
        for family in (socket.AF_INET, socket.AF_INET6):
            if port.address and (":" in port.address) != (family == socket.AF_INET6):
                continue
            try:
                probe = socket.socket(
                    family,
                    kinds[port.protocol] | socket.SOCK_CLOEXEC,
                    _PROTOCOL_NUMBERS[port.protocol],
                )
            except OSError:
                # The kernel has no such protocol or family, so nobody listens there.
                continue
            try:
                if port.protocol == "tcp":
                    # A connection in TIME_WAIT does not hold the port, a listener does.
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                probe.bind(
                    (port.address or ("0.0.0.0" if family == socket.AF_INET else "::"), port.host)
                )
            except OSError as error:
                raise KrunError(
                    f"port {port.host}/{port.protocol} on {port.address or 'the host'}: "
                    f"{error.strerror}",
                    "publish another port, or stop what listens there",
                ) from error
            finally:
                probe.close()
