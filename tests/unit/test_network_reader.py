"""Requests for a network: the object, its short form, and what is wrong with bad ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import documents
import pytest
from hypothesis import given

from krun import network, schema
from krun.errors import BadSpec
from krun.network import make, model, pool, reader
from krun.network.model import Bandwidth, Dns, Interface, Network, Port, Route

TOP = Path(__file__).parents[2] / "spec-schema"
GOOD = sorted((TOP / "good").glob("network.*.json"))
BAD = sorted((TOP / "bad").glob("network.*.json"))
EXPECTED = json.loads((TOP / "bad/expected.json").read_text())


@pytest.mark.parametrize("path", GOOD, ids=lambda path: path.stem)
def test_good_example(path: Path) -> None:
    assert isinstance(reader.parse(json.loads(path.read_text())), Network)


@pytest.mark.parametrize("path", BAD, ids=lambda path: path.stem)
def test_bad_example_names_the_path_of_the_schema(path: Path) -> None:
    with pytest.raises(BadSpec) as caught:
        reader.parse(json.loads(path.read_text()), "network")
    expected = EXPECTED[path.name]
    assert caught.value.path == (f"network.{expected}" if expected else "network")


def test_short_form() -> None:
    text = (
        "bridge:kbr0,name=net0,ip=auto,ip=10.0.0.9/24,range=fd00::/64,gw=10.0.0.1,mtu=1400,"
        "mac=02:00:00:00:00:01,host=web0,peer=10.0.0.0/24,in=1mbit,out=16000,"
        "route=203.0.113.0/24@10.0.0.254,route=198.51.100.0/24,port=8080:80/tcp,dns=192.0.2.53,"
        "search=example.org,option=ndots:2,hostname=web,sysctl=net.ipv4.ip_forward:1,"
        "masquerade=off; macvlan:eth1,name=lan0,mode=vepa,ip=192.0.2.9/24"
    )
    with pytest.raises(BadSpec, match=r"bandwidth.egress: must be bits per second"):
        reader.parse(text)
    assert reader.parse(text.replace("out=16000", "out=16kbit")) == Network(
        (
            Interface(
                "veth",
                "net0",
                "kbr0",
                host_name="web0",
                mac="02:00:00:00:00:01",
                mtu=1400,
                addresses=("auto", "10.0.0.9/24"),
                ranges=("fd00::/64",),
                gateways=("10.0.0.1",),
                routes=(Route("203.0.113.0/24", "10.0.0.254"), Route("198.51.100.0/24")),
                bandwidth=Bandwidth(1_000_000, 16_000),
                peers=("10.0.0.0/24",),
            ),
            Interface("macvlan", "lan0", parent="eth1", mode="vepa", addresses=("192.0.2.9/24",)),
        ),
        (Port(8080, 80),),
        False,
        (("net.ipv4.ip_forward", "1"),),
        Dns(("192.0.2.53",), ("example.org",), ("ndots:2",)),
        (),
        "web",
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("bridge:kbr0,ip=10.0.0.1", "with a prefix length"),
        ("bridge:kbr0,ip=10.0.0.0/24", "the network's own or its broadcast"),
        ("bridge:kbr0,ip=10.0.0.255/24", "the network's own or its broadcast"),
        ("bridge:kbr0,ip=10.0.1.9/24,range=10.0.0.0/24", "is outside the range 10.0.0.0/24"),
        ("bridge:kbr0,ip=10.0.0.9/24,ip=10.0.0.9/24", "is there twice"),
        ("bridge:kbr0,ip=10.0.0.9/24,gw=10.0.1.1", "not on the link"),
        ("bridge:kbr0,range=10.0.0.1/24", "has host bits set"),
        ("bridge:a-name-of-16-byt", "has 16 bytes"),
        ("bridge:kbr/0", "cannot be the name"),
        ("bridge:kbr0,name=lo", "lo is there already"),
        ("bridge:kbr0;bridge:kbr1,name=eth0", "is there twice"),
        ("bridge:kbr0,mtu=70000", "from 68 to 65535"),
        ("bridge:kbr0,mtu=many", "from 68 to 65535"),
        ("bridge:kbr0,mtu=1000,ip=fd00::2/64", "IPv6 needs at least 1280"),
        ("bridge:kbr0,mode=l2", "is no mode of veth"),
        ("macvlan:eth0,ip=192.0.2.1/24,mode=l2", "macvlan has bridge, private"),
        ("macvlan:eth0", "needs ranges"),
        ("macvlan:eth0,ip=192.0.2.1/24,peer=192.0.2.0/24", "only a veth can have it"),
        ("macvlan:eth0,ip=192.0.2.1/24,in=1mbit", "only a veth can limit"),
        ("macvlan:eth0,ip=192.0.2.1/24,port=80", "needs a veth"),
        ("ipvlan:eth0,ip=192.0.2.1/24,mac=02:00:00:00:00:01", "its parent's MAC"),
        ("routed", "needs ranges"),
        ("bridge:kbr0,port=0:80", "is no port"),
        ("bridge:kbr0,port=80:90-91", "1 ports outside and 2 inside"),
        ("bridge:kbr0,port=9-8", "ends before it begins"),
        ("bridge:kbr0,port=80,port=127.0.0.1:80:81", "is published twice"),
        ("bridge:kbr0,port=80/icmp", "none of tcp, udp, sctp"),
        ("bridge:kbr0,sysctl=kernel.shmmax:1", "is not a sysctl of the network"),
        ("bridge:kbr0,colour=red", "is not understood"),
        ("bridge:kbr0,ip", "is not KEY=VALUE"),
        ("vxlan:7", "is no interface"),
        ("bridge:kbr0,mac=01:00:00:00:00:01", "multicast"),
        ("bridge:kbr0,hostname=two words", "is not KEY=VALUE"),
    ],
)
def test_bad_short_form(text: str, words: str) -> None:
    with pytest.raises(BadSpec) as caught:
        reader.parse(text)
    assert words in str(caught.value)


def test_words_may_stand_apart_by_spaces() -> None:
    commas = "bridge:kbr0,name=net0,port=80;macvlan:eth1,ip=192.0.2.9/24"
    spaces = " bridge:kbr0  name=net0 port=80 ; macvlan:eth1 ip=192.0.2.9/24 "
    assert reader.parse(spaces) == reader.parse(commas)
    assert schema.explain(spaces, "network") == []


def test_port_ranges() -> None:
    assert reader.parse_port("[::1]:8000-8001:80-81/udp") == (
        Port(8000, 80, "udp", "::1"),
        Port(8001, 81, "udp", "::1"),
    )
    assert reader.parse_port("0.0.0.0:80:81") == (Port(80, 81),)


NAMES = (
    "interfaces ports kind bridge addresses routes dns bandwidth peers mtu "
    "name sysctls hosts destination ingress parent"
)


@given(documents.with_names(*NAMES.split()))
def test_any_document_is_read_or_refused(document: Any) -> None:
    try:
        read = reader.parse(document)
    except BadSpec:
        return
    assert isinstance(read, Network)
    # What the reader takes, the schema takes.
    assert schema.explain(document, "network") == []


def test_annotation_wins_over_the_extension() -> None:
    spec: Any = {
        "kontain": {"network": "bridge:one"},
        "annotations": {model.ANNOTATION: '{"interfaces": [{"bridge": "two"}]}'},
        "linux": {"netDevices": {"dev0": {"name": "data0"}}},
    }
    read = reader.of(spec)
    assert read is not None
    assert [i.bridge or i.parent for i in read.interfaces] == ["two", "dev0"]
    assert network.asked(spec)
    assert not network.asked({})
    assert reader.of({}) is None
    spec["annotations"][model.ANNOTATION] = "{"
    with pytest.raises(BadSpec, match="is not JSON"):
        reader.of(spec)


@pytest.mark.parametrize(
    "text",
    [
        "bridge",
        "bridge:kbr0",
        "bridge:kbr0,ip=auto",
        "bridge:kbr0 ip=auto",
        "bridge:kbr0,mtu=1400",
        "bridge,name=net0",
    ],
)
def test_pool_key_has_an_inverse_and_the_plain_key_agrees(text: str) -> None:
    read = reader.parse(text)
    key = model.pool_key(read)
    assert model.pool_key(make.network_of(key)) == key
    assert make.network_of(key).interfaces == read.interfaces
    for spec in ({"kontain": {"network": text}}, {"annotations": {model.ANNOTATION: text}}):
        assert pool.plain_key(spec) in (key, "")  # type: ignore[arg-type]
    assert bool(pool.plain_key({"kontain": {"network": text}})) == (
        "mtu" not in text and "name" not in text
    )


@pytest.mark.parametrize(
    "text",
    [
        "routed,range=10.0.0.0/24",
        "bridge:kbr0,ip=10.0.0.9/24",
        "bridge:kbr0,mac=02:00:00:00:00:01",
        "bridge:kbr0,in=1mbit",
        "bridge:kbr0,peer=10.0.0.0/24",
        "bridge:kbr0,host=web0",
        "bridge:kbr0,masquerade=off",
        "bridge:kbr0;bridge:kbr1",
        "macvlan:eth0,ip=192.0.2.1/24",
    ],
)
def test_what_is_not_the_same_for_all_has_no_pool(text: str) -> None:
    assert model.pool_key(reader.parse(text)) == ""
    assert pool.plain_key({"kontain": {"network": text}}) == ""
