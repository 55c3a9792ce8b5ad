"""Addresses, leases, links, elements and files: what is decided before anything is made."""

from __future__ import annotations

import ipaddress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from krun.errors import BadSpec, KrunError
from krun.network import (
    address,
    definition,
    files,
    join,
    leases,
    netlink,
    reader,
    resolve,
    rules,
    state,
)
from krun.network.leases import Leases, Want
from krun.network.model import Dns, Network, Port, Route

V4 = st.ip_addresses(v=4)
V6 = st.ip_addresses(v=6)


@given(st.one_of(V4, V6), st.integers(0, 128))
def test_prefixes_are_those_of_ipaddress(one: Any, length: int) -> None:
    length = min(length, one.max_prefixlen)
    ours = address.parse_prefix(f"{one}/{length}")
    theirs = ipaddress.ip_interface(f"{one}/{length}")
    assert ipaddress.ip_address(str(ours.address)) == one
    assert (ours.first, ours.last) == (
        int(theirs.network.network_address),
        int(theirs.network.broadcast_address),
    )
    assert address.contains(ours, ours.address)


@given(st.text(max_size=20))
def test_no_text_but_an_address_is_an_address(text: str) -> None:
    try:
        ours = address.parse_address(text)
    except ValueError:
        with pytest.raises(ValueError):
            # inet_pton takes no zone; ipaddress does.
            ipaddress.ip_address(text if "%" not in text else "")
        return
    assert ipaddress.ip_address(str(ours)) == ipaddress.ip_address(text)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 30)), max_size=80))
def test_no_address_is_held_twice(steps: list[tuple[bool, int]]) -> None:
    held = Leases({}, {})
    alive: list[str] = []
    for number, (take, which) in enumerate(steps):
        if take:
            try:
                held, granted = leases.grant(
                    held, f"{number:08x}", [Want("10.0.0.0/28", reserved=("10.0.0.1",))]
                )
            except KrunError:
                assert len(alive) == 13
                continue
            assert granted[0] not in alive
            assert address.contains(
                address.parse_network("10.0.0.0/28"), address.parse_prefix(granted[0]).address
            )
            alive.append(granted[0])
        elif alive:
            gone = alive.pop(which % len(alive)).partition("/")[0]
            held = held._replace(held={k: v for k, v in held.held.items() if k != gone})
    assert len(held.held) == len(alive)


def test_addresses_go_round() -> None:
    want = [Want("10.0.0.0/29")]
    held, first = leases.grant(Leases({}, {}), "m1", want)
    held, second = leases.grant(held._replace(held={}), "m2", want)
    assert (first, second) == (["10.0.0.1/29"], ["10.0.0.2/29"])


def test_all_wants_or_none() -> None:
    before = Leases({"10.0.0.5": "aaaaaaaa"}, {})
    with pytest.raises(KrunError, match=r"10\.0\.0\.5 is in use by member aaaaaaaa"):
        leases.grant(before, "m1", [Want("10.0.0.0/29"), Want(fixed="10.0.0.5/29")])
    assert before == Leases({"10.0.0.5": "aaaaaaaa"}, {})
    with pytest.raises(KrunError, match="gateway"):
        leases.grant(before, "m1", [Want(fixed="10.0.0.1/29", reserved=("10.0.0.1",))])


def test_large_range_ends_quickly() -> None:
    _, granted = leases.grant(Leases({}, {}), "m", [Want("fd00::/64", length=48)])
    assert granted == ["fd00::1/48"]


NET = definition.define("kbr0", ["10.0.0.0/24", "fd00::/64"])


def test_definition() -> None:
    assert NET.gateways == ("10.0.0.1", "fd00::1")
    named = definition.define("n", ["10.0.0.0/24"], ["10.0.0.254"])
    assert named.gateways == ("10.0.0.254",)
    assert definition.conflicts(named, [NET]) == "10.0.0.0/24 overlaps 10.0.0.0/24 of network kbr0"
    assert definition.conflicts(NET, [NET]) == ""
    for ranges, gateways, words in (
        (["10.0.0.1/24"], [], "host bits"),
        (["10.0.0.0/31"], [], "no room"),
        (["10.0.0.0/24", "10.0.0.0/25"], [], "overlaps"),
        ([], [], "no range"),
        (["10.0.0.0/24"], ["10.0.1.1"], "outside its ranges"),
        (["10.0.0.0/24"], ["x"], "not an IPv4"),
    ):
        with pytest.raises(KrunError, match=words):
            definition.define("n", ranges, gateways)


def test_first_free_network_is_clear_of_the_hosts() -> None:
    taken = [address.parse_network("10.91.0.0/23"), address.parse_network("fd91:0:0:2::/64")]
    assert definition.first_free(taken, True) == ("10.91.3.0/24", "fd91:0:0:3::/64")
    assert definition.first_free(taken, False) == ("10.91.2.0/24",)
    with pytest.raises(KrunError):
        definition.first_free([address.parse_network("10.0.0.0/8")], False)


def wants(text: str, one: definition.Definition | None = NET) -> list[Want]:
    return resolve.wants(reader.parse(text).interfaces[0], one, "path")


def test_wants() -> None:
    reserved = NET.gateways
    assert wants("bridge:kbr0") == [
        Want("10.0.0.0/24", "", 24, reserved),
        Want("fd00::/64", "", 64, reserved),
    ]
    assert wants("bridge:kbr0,ip=10.0.0.9/24") == [Want(fixed="10.0.0.9/24")]
    assert wants("bridge:kbr0,ip=10.0.0.9/24,ip=auto")[1:] == [Want("fd00::/64", "", 64, reserved)]
    assert wants("bridge:kbr0,range=10.0.0.128/25") == [Want("10.0.0.128/25", "", 24, reserved)]
    for text in ("ip=10.0.1.9/24", "range=10.0.1.0/24", "range=10.0.0.0/23", "ip=10.0.0.1/24"):
        with pytest.raises(BadSpec):
            wants(f"bridge:kbr0,{text}")


def test_links_of_a_bridge() -> None:
    network = reader.parse("bridge:kbr0;bridge:kbr0,name=back0")
    granted = (("10.0.0.2/24", "fd00::2/64"), ("10.0.0.3/24",))
    one, two = resolve.links(network, (NET, NET), granted, "01234567")
    assert (one.host_name, two.host_name) == ("krun01234567", "krun01234567-1")
    assert one.routes == (Route("0.0.0.0/0", "10.0.0.1"), Route("::/0", "fd00::1"))
    assert two.routes == ()
    assert state.member_of_link(two.host_name) == "01234567"
    assert state.member_of_link("krun0") == state.member_of_link("krun0123456x") == ""


def test_links_that_are_routed() -> None:
    network = reader.parse("routed,range=10.1.0.0/24,range=fd01::/64")
    (one,) = resolve.links(network, (None,), (("10.1.0.1/24", "fd01::1/64"),), "01234567")
    assert one.addresses == ("10.1.0.1/32", "fd01::1/128")
    assert one.host_routes == ("10.1.0.1/32", "fd01::1/128")
    assert one.host_addresses == ("169.254.1.1/32", "fe80::1/64")
    assert one.routes[0] == Route("169.254.1.1/32")
    assert Route("0.0.0.0/0", "169.254.1.1") in one.routes
    assert Route("::/0", "fe80::1") in one.routes


def test_published_elements() -> None:
    targets = {4: "10.0.0.2", 6: "fd00::2"}
    made = rules.publications([Port(8080, 80), Port(53, 53, "udp", "::1")], targets, "01234567")
    assert [(family, name) for family, name, _ in made] == [
        ("inet", "publish4"),
        ("inet", "publish6"),
        ("inet", "publish_at6"),
    ]
    assert made[2][2] == [
        {"elem": {"val": {"concat": ["::1", "udp", 53]}, "comment": "01234567"}},
        {"concat": ["fd00::2", 53]},
    ]
    with pytest.raises(KrunError, match="has no IPv6 address"):
        rules.publications([Port(80, 80, "tcp", "::1")], {4: "10.0.0.2"}, "01234567")


def test_resolv_conf() -> None:
    host = "# made\nnameserver 127.0.0.53\nnameserver ::1\nnameserver 192.0.2.1\nsearch a\n"
    assert files.resolv_conf(Dns(), host) == "# made\nnameserver 192.0.2.1\nsearch a\n"
    assert files.resolv_conf(Dns(("192.0.2.2",)), host) == "nameserver 192.0.2.2\n"
    assert files.resolv_conf(Dns(search=("b",)), host).endswith("192.0.2.1\nsearch b\n")


def test_files_keep_what_the_caller_wrote() -> None:
    network = Network((), hosts=(("db", "10.0.0.9"),))
    shown = {
        "/etc/resolv.conf": "nameserver 192.0.2.7\n",
        "/etc/hosts": "127.0.0.1\tlocalhost\n127.0.1.1\tweb\n192.0.2.8\tadded\n",
        "/etc/hostname": "web\n",
    }
    made = files.texts(network, "web", ("10.0.0.2",), shown, "nameserver 192.0.2.1\n")
    assert made == {
        "/etc/hosts": "127.0.0.1\tlocalhost\n192.0.2.8\tadded\n10.0.0.2\tweb\n10.0.0.9\tdb\n"
    }
    made = files.texts(network, "web", ("10.0.0.2",), {}, "nameserver 192.0.2.1\n")
    assert made["/etc/resolv.conf"] == "nameserver 192.0.2.1\n"
    assert made["/etc/hostname"] == "web\n"


def test_joined() -> None:
    spec: Any = {
        "hostname": "old",
        "mounts": [{"destination": "/etc/hosts", "source": "a"}, {"destination": "/x"}],
        "linux": {
            "namespaces": [{"type": "network"}, {"type": "pid"}],
            "sysctl": {"kernel.x": "1"},
            "netDevices": {"dev0": {}},
        },
    }
    network = Network((), sysctls=(("net.x", "2"),), hostname="new")
    mounts: Any = [{"destination": "/etc/hosts", "source": "b"}]
    assert join.joined(spec, network, "/n", mounts) == {
        "hostname": "new",
        "mounts": [{"destination": "/x"}, {"destination": "/etc/hosts", "source": "b"}],
        "linux": {
            "namespaces": [{"type": "pid"}, {"type": "network", "path": "/n"}],
            "sysctl": {"kernel.x": "1", "net.x": "2"},
        },
    }
    assert "netDevices" in spec["linux"]


@given(st.text(st.characters(exclude_characters="\0"), min_size=1, max_size=60))
def test_roots_have_names(root: str) -> None:
    try:
        name = state.quote(root)
    except KrunError:
        assert len(root.encode()) > 80
        return
    except UnicodeEncodeError:
        return
    assert "/" not in name
    assert state.unquote(name) == root


def test_fair_queue_is_asked_for_as_tc_asks() -> None:
    """What `tc qdisc add … fq maxrate 8mbit` sends as its options (recorded with strace)."""
    assert netlink.fair_queue(1_000_000) == bytes.fromhex("0800070040420f00")


def test_refusal_has_the_words_of_the_kernel() -> None:
    """A recorded acknowledgement, capped, with an attribute NLMSGERR_ATTR_MSG."""
    said = b"Unknown device type.\0"
    header = netlink._HEADER.pack(0, 2, 0x300, 1, 0)
    part = header + (-95).to_bytes(4, "little", signed=True) + header
    part += netlink._ATTRIBUTE.pack(4 + len(said), 1) + said + b"\0\0\0"
    with pytest.raises(netlink.Refused, match=r"Operation not supported \(Unknown device type\)"):
        netlink._check(part, 0x300)
    netlink._check(header + bytes(4), 0)
