"""Containers' networks on a real kernel: packets between containers, host and outside."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import needs
import pytest
from e2e.machine import wait_for
from kernel.builtin_host import NEEDS_KVM
from kernel.network_host import HOST4, HOST6, OUTSIDE4, OUTSIDE6, Container, Host
from km import build

pytestmark = needs.mark("unshare", "nsenter", "ip", "nft", "tc", root="network namespaces")

RANGES = ("--range", "10.91.7.0/24", "--range", "fd91:7::/64")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    host = Host(tmp_path_factory.mktemp("host"))
    host.krun("network", "create", "kn0", *RANGES)
    yield host
    host.close()


@pytest.fixture
def host(shared: Host) -> Iterator[Host]:
    """The host; whatever a test claims is deleted after it, and nothing may be left."""
    yield shared
    for id in os.listdir(shared.root):
        os.rmdir(f"{shared.root}/{id}")
    shared.krun("network", "gc")
    wait_for("nothing is left", shared.is_clean)


def reach(host: Host, source: list[str], target: Container, port: int) -> dict[int, str | None]:
    """Return whom the target saw, over IPv4 and IPv6."""
    found = {}
    for version in (4, 6):
        address = target.address(version)
        host.serve(target.inside(), address, port)
        found[version] = host.fetch(source, address, port)
    return found


def test_containers_reach_each_other_and_the_host(host: Host) -> None:
    one = host.claim("one", "bridge:kn0")
    two = host.claim("two", "bridge:kn0")
    assert set(one.addresses).isdisjoint(two.addresses)
    seen = reach(host, one.inside(), two, 80)
    assert seen == {4: one.address(4), 6: one.address(6)}
    for gateway in ("10.91.7.1", "fd91:7::1"):
        host.serve(host.inside(), gateway, 81)
        assert host.fetch(one.inside(), gateway, 81) in one.addresses
    assert reach(host, host.inside(), one, 82) == {4: "10.91.7.1", 6: "fd91:7::1"}


def test_packets_that_leave_are_masqueraded(host: Host) -> None:
    one = host.claim("masqueraded", "bridge:kn0")
    for outside, seen in ((OUTSIDE4, HOST4), (OUTSIDE6, HOST6)):
        host.serve(host.outside, outside, 80)
        assert host.fetch(one.inside(), outside, 80) == seen


def test_published_port(host: Host) -> None:
    one = host.claim("web", "bridge:kn0,port=8080:80/tcp")
    other = host.claim("other", "bridge:kn0")
    for version in (4, 6):
        host.serve(one.inside(), one.address(version), 80)
    assert host.fetch(host.outside, HOST4, 8080) == OUTSIDE4
    assert host.fetch(host.outside, HOST6, 8080) == OUTSIDE6
    assert host.fetch(host.inside(), HOST4, 8080)
    assert host.fetch(host.inside(), "127.0.0.1", 8080)
    assert host.fetch(host.inside(), HOST6, 8080)
    # A container sees a neighbour's published port, and its own, at the host's address.
    assert host.fetch(other.inside(), HOST4, 8080)
    assert host.fetch(one.inside(), HOST4, 8080)
    assert "8080->80/tcp" in host.krun("network", "ls", "kn0").stdout
    one.delete()
    assert host.fetch(host.outside, HOST4, 8080, timeout=1) is None


@NEEDS_KVM
def test_server_in_a_vm(host: Host, tmp_path: Path) -> None:
    """The monitor's socket calls are made in the container's network."""
    program = build.compile_static(
        build.TESTS / "payloads/http.c", tmp_path / "http", *build.FREESTANDING
    )
    one = host.claim("vm", "bridge:kn0,port=8088:80")
    server = subprocess.Popen(
        one.inside(sys.executable, "-m", "krun", "monitor", program, "80"),
        env=host.environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    host.servers.append(server)
    assert server.stdout is not None
    assert server.stdout.readline() == "serving\n"
    for address in (HOST4, f"[{HOST6}]"):
        command = [*host.outside, "curl", "-sS", "-m", "5", f"http://{address}:8088/"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.stdout == "hello\n", done.stderr


def test_port_is_published_on_one_address(host: Host) -> None:
    one = host.claim("local", "bridge:kn0,port=127.0.0.1:8081:80")
    host.serve(one.inside(), one.address(4), 80)
    assert host.fetch(host.inside(), "127.0.0.1", 8081)
    assert host.fetch(host.outside, HOST4, 8081, timeout=1) is None


def test_loopback_of_the_host_is_closed_to_containers(host: Host) -> None:
    one = host.claim("intruder", "bridge:kn0,port=8082:80")
    host.serve(host.inside(), "127.0.0.1", 9000)
    one.run("ip", "route", "add", "127.0.0.2/32", "via", "10.91.7.1")
    one.run("sh", "-c", "echo 1 > /proc/sys/net/ipv4/conf/eth0/route_localnet")
    assert host.fetch(one.inside(), "127.0.0.2", 9000, timeout=1) is None


def test_udp_port(host: Host) -> None:
    one = host.claim("udp", "bridge:kn0,port=5353:53/udp")
    echo = (
        "import socket\ns = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
        f"s.bind(({one.address(4)!r}, 53))\nprint('ready', flush=True)\n"
        "d, a = s.recvfrom(99)\ns.sendto(d + b'!', a)\n"
    )
    ask = (
        "import socket\ns = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\ns.settimeout(5)\n"
        f"s.sendto(b'name', ({HOST4!r}, 5353))\nprint(s.recv(99).decode())\n"
    )
    server = subprocess.Popen(
        one.inside(sys.executable, "-c", echo), stdout=subprocess.PIPE, text=True
    )
    assert server.stdout is not None
    assert server.stdout.readline() == "ready\n"
    done = subprocess.run(
        [*host.outside, sys.executable, "-c", ask], capture_output=True, text=True, timeout=20
    )
    assert done.stdout == "name!\n", done.stderr
    assert server.wait(5) == 0


def test_routed_veth_needs_no_bridge(host: Host) -> None:
    one = host.claim("routed", "routed,range=10.92.0.0/24,range=fd92::/64,port=8083:80")
    two = host.claim("routed2", "routed,range=10.92.0.0/24,range=fd92::/64")
    assert reach(host, two.inside(), one, 80) == {4: two.address(4), 6: two.address(6)}
    assert host.fetch(host.outside, HOST4, 8083) == OUTSIDE4
    host.serve(host.outside, OUTSIDE4, 90)
    assert host.fetch(one.inside(), OUTSIDE4, 90) == HOST4


@pytest.fixture
def parent(host: Host) -> Iterator[str]:
    """A device of the host with a neighbour, for an interface to be made on."""
    host.run("ip", "link", "add", "lan0", "up", "type", "veth", "peer", "name", "lan1")
    host.run("ip", "link", "set", "lan1", "up")
    yield "lan0"
    host.run("ip", "link", "del", "lan0")


def test_macvlan(host: Host, parent: str) -> None:
    form = f"macvlan:{parent},name=lan,ip=auto,range=10.93.0.0/24,mac=02:00:00:00:00:0{{}}"
    one = host.claim("mac1", form.format(1))
    two = host.claim("mac2", form.format(2))
    host.serve(one.inside(), one.address(4), 80)
    assert host.fetch(two.inside(), one.address(4), 80) == two.address(4)
    assert "02:00:00:00:00:02" in two.run("ip", "link", "show", "lan")
    one.delete()
    two.delete()
    wait_for("macvlans are gone", lambda: host.is_clean())


def supports(host: Host, *words: str) -> bool:
    """Whether the kernel does what ip(8) or tc(8) ask for on the device lan0."""
    return host.run(*words, status=None).returncode == 0


@pytest.mark.parametrize("mode", ["l2", "l3", "l3s"])
def test_ipvlan(host: Host, parent: str, mode: str) -> None:
    form = f"ipvlan:{parent},mode={mode},range=10.95.0.0/24,ip=10.95.0.{{}}/24"
    if not supports(host, "ip", "link", "add", "link", parent, "type", "ipvlan"):
        said = host.refuses("ipv1", form.format(1))
        assert "make ipvlan eth0 on lan0: Operation not supported" in said
        assert "the kernel lacks it" in said
        wait_for("nothing is left", host.is_clean)
        pytest.skip("the kernel has no ipvlan (CONFIG_IPVLAN): its refusal was checked")
    host.run("ip", "link", "del", "ipvlan0")
    one = host.claim("ipv1", form.format(1))
    two = host.claim("ipv2", form.format(2))
    host.serve(one.inside(), one.address(4), 80)
    assert host.fetch(two.inside(), one.address(4), 80) == two.address(4)
    shown = json.loads(one.run("ip", "-j", "-d", "link", "show", "eth0"))[0]
    assert shown["linkinfo"]["info_data"]["mode"] == mode
    one.delete()
    two.delete()


def test_fair_queue(host: Host, parent: str) -> None:
    request = {"interfaces": [{"bridge": "kn0", "bandwidth": {"ingress": "8mbit", "queue": "fq"}}]}
    if not supports(host, "tc", "qdisc", "add", "dev", parent, "root", "fq"):
        said = host.refuses("fair", request)
        assert "limit to 8000000 bit/s with fq" in said
        assert "the kernel lacks it" in said
        wait_for("nothing is left", host.is_clean)
        pytest.skip("the kernel has no fq (CONFIG_NET_SCH_FQ): its refusal was checked")
    one = host.claim("fair", request)
    shown = host.run("tc", "-j", "qdisc", "show", "dev", f"krun{one.member}").stdout
    queue = json.loads(shown)[0]
    assert queue["kind"] == "fq"
    assert queue["options"]["maxrate"] == 1_000_000


def test_device_is_moved_in_and_back(host: Host) -> None:
    host.run("ip", "link", "add", "dev0", "mtu", "1400", "type", "veth", "peer", "name", "dev1")
    host.run("ip", "address", "add", "192.0.2.7/24", "dev", "dev0")
    host.run("ip", "link", "set", "dev1", "up")
    try:
        spec = {
            "linux": {"namespaces": [], "netDevices": {"dev0": {"name": "data0"}}},
        }
        one = host.claim("device", None, spec)
        assert "netDevices" not in one.spec["linux"]
        assert "dev0" not in host.devices()
        shown = json.loads(one.run("ip", "-j", "address", "show", "data0"))[0]
        assert shown["mtu"] == 1400
        assert "UP" in shown["flags"]
        assert "192.0.2.7" in [a["local"] for a in shown["addr_info"]]
        one.delete()
        assert "dev0" in host.devices()
    finally:
        host.run("ip", "link", "del", "dev0")


def test_static_settings(host: Host) -> None:
    request = {
        "interfaces": [
            {
                "bridge": "kn0",
                "name": "net0",
                "hostName": "knhost0",
                "mac": "02:00:00:00:00:aa",
                "mtu": 1400,
                "addresses": ["10.91.7.99/24", "fd91:7::99/64"],
                "routes": [{"destination": "203.0.113.0/24", "via": "10.91.7.1", "metric": 7}],
            }
        ],
        "sysctls": {"net.ipv4.ip_forward": "1"},
        "dns": {"nameservers": ["192.0.2.53"], "search": ["example.org"], "options": ["ndots:2"]},
        "hosts": {"db": "10.91.7.50"},
        "hostname": "named",
    }
    one = host.claim("static", request)
    assert "knhost0" in host.devices()
    link = json.loads(one.run("ip", "-j", "link", "show", "net0"))[0]
    assert (link["address"], link["mtu"]) == ("02:00:00:00:00:aa", 1400)
    assert one.addresses == ["10.91.7.99", "fd91:7::99"]
    route = json.loads(one.run("ip", "-j", "route", "show", "203.0.113.0/24"))[0]
    assert (route["gateway"], route["metric"]) == ("10.91.7.1", 7)
    assert one.spec["hostname"] == "named"
    assert one.spec["linux"]["sysctl"] == {"net.ipv4.ip_forward": "1"}
    files = {m["destination"]: host.run("cat", m["source"]).stdout for m in one.spec["mounts"]}
    assert files["/etc/resolv.conf"] == (
        "nameserver 192.0.2.53\nsearch example.org\noptions ndots:2\n"
    )
    assert "10.91.7.99\tnamed\n" in files["/etc/hosts"]
    assert "10.91.7.50\tdb\n" in files["/etc/hosts"]
    assert files["/etc/hostname"] == "named\n"


def test_bandwidth_is_limited(host: Host) -> None:
    one = host.claim("slow", "bridge:kn0,in=8mbit,out=16mbit")
    two = host.claim("fast", "bridge:kn0")
    outer = json.loads(host.run("tc", "-j", "qdisc", "show", "dev", f"krun{one.member}").stdout)
    inner = json.loads(one.run("tc", "-j", "qdisc", "show", "dev", "eth0"))
    assert [q["kind"] for q in outer + inner] == ["tbf", "tbf"]
    assert [q["options"]["rate"] for q in outer + inner] == [1_000_000, 2_000_000]
    receive = (
        "import socket,sys\ns=socket.create_server((sys.argv[1],99))\nprint('ready',flush=True)\n"
        "c,_=s.accept()\nn=0\nwhile d:=c.recv(65536): n+=len(d)\nprint(n)\n"
    )
    server = subprocess.Popen(
        one.inside(sys.executable, "-c", receive, one.address(4)),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdout is not None
    assert server.stdout.readline() == "ready\n"
    send = (
        "import socket,sys\ns=socket.create_connection((sys.argv[1],99))\n"
        "s.sendall(bytes(700000))\ns.shutdown(1)\ns.recv(1)\n"
    )
    start = time.monotonic()
    two.run(sys.executable, "-c", send, one.address(4))
    seconds = time.monotonic() - start
    assert server.stdout.read() == "700000\n"
    # 700 kB at 1 MB/s; without the limit it takes some milliseconds.
    assert seconds > 0.5
    assert server.wait(5) == 0


@pytest.mark.parametrize("kind", ["bridge:kn0", "routed,range=10.92.0.0/24,range=fd92::/64"])
def test_peers(host: Host, kind: str) -> None:
    friend = host.claim("friend", "bridge:kn0")
    stranger = host.claim("stranger", "bridge:kn0")
    peers = ",".join(f"peer={a}/{128 if ':' in a else 32}" for a in friend.addresses)
    one = host.claim("guarded", f"{kind},{peers}")
    for version in (4, 6):
        address = one.address(version)
        host.serve(one.inside(), address, 80)
        assert host.fetch(friend.inside(), address, 80) == friend.address(version)
        assert host.fetch(stranger.inside(), address, 80, timeout=0.5) is None
        host.serve(stranger.inside(), stranger.address(version), 80)
        assert host.fetch(one.inside(), stranger.address(version), 80, timeout=0.5) is None
        host.serve(friend.inside(), friend.address(version), 80)
        assert host.fetch(one.inside(), friend.address(version), 80) == one.address(version)


def test_several_interfaces(host: Host) -> None:
    host.krun("network", "create", "kn1", "--range", "10.91.8.0/24", "--no-masquerade")
    one = host.claim("both", "bridge:kn0;bridge:kn1,name=back0")
    two = host.claim("back", "bridge:kn1")
    assert [i["name"] for i in one.record["interfaces"]] == ["eth0", "back0"]
    host.serve(one.inside(), one.addresses[2], 80)
    assert host.fetch(two.inside(), one.addresses[2], 80) == two.address(4)
    # One default route, by the first interface.
    assert len(json.loads(one.run("ip", "-j", "route", "show", "default"))) == 1
    one.delete()
    two.delete()
    host.krun("network", "rm", "kn1")
    assert "kn1" not in host.devices()


def test_counters_and_inspection(host: Host) -> None:
    one = host.claim("counted", "bridge:kn0")
    host.serve(one.inside(), one.address(4), 80)
    host.fetch(host.inside(), one.address(4), 80)
    shown = json.loads(host.krun("network", "inspect", "counted").stdout)
    assert shown["counters"]["rx_bytes"] > 0
    network = json.loads(host.krun("network", "inspect", "kn0").stdout)
    assert [c["id"] for c in network["containers"]] == ["counted"]
    assert network["ranges"][0] == {
        "range": "10.91.7.0/24",
        "gateway": "10.91.7.1",
        "capacity": 253,
        "leased": 1,
    }
    listed = json.loads(host.krun("network", "ls", "--format", "json").stdout)
    assert [one["name"] for one in listed] == ["kn0"]
    refused = host.krun("network", "rm", "kn0", status=1).stderr
    assert "in use by 1 containers: counted" in refused


def test_first_use_defines_the_network(host: Host) -> None:
    one = host.claim("first", "bridge:kn9")
    assert one.address(4).startswith("10.91.")
    assert one.address(6).startswith("fd91:")
    one.delete()
    host.krun("network", "rm", "kn9")
    assert "kn9" not in host.devices()
    assert "kn9" not in host.krun("network", "ls").stdout


def test_rules_return_after_a_flush(host: Host) -> None:
    host.run("nft", "flush", "ruleset")
    one = host.claim("after", "bridge:kn0,port=8084:80")
    host.serve(one.inside(), one.address(4), 80)
    assert host.fetch(host.outside, HOST4, 8084) == OUTSIDE4
    host.serve(host.outside, OUTSIDE4, 91)
    assert host.fetch(one.inside(), OUTSIDE4, 91) == HOST4


def test_bad_requests_make_nothing(host: Host) -> None:
    host.run("ip", "link", "add", "plain0", "type", "veth", "peer", "name", "plain1")
    host.serve(host.inside(), "0.0.0.0", 8085)
    taken = host.claim("taken", "bridge:kn0,ip=10.91.7.77/24,port=8086:80")
    before = host.devices(), host.left()
    network_path = {"linux": {"namespaces": [{"type": "network", "path": "/run/netns/outside"}]}}
    wrong = {
        "outside the range 10.91.7.0/24": host.refuses("bad", "bridge:kn0,ip=10.99.0.1/24"),
        "at most 15": host.refuses("bad", "bridge:kn0,name=sixteen-bytes-xx"),
        "not a bridge": host.refuses("bad", "bridge:plain0"),
        "Address already in use": host.refuses("bad", "bridge:kn0,port=8085:80"),
        "already published": host.refuses("bad", "bridge:kn0,port=8086:80"),
        "10.91.7.77 is in use": host.refuses("bad", "bridge:kn0,ip=10.91.7.77/24"),
        "is the gateway's": host.refuses("bad", "bridge:kn0,ip=10.91.7.1/24"),
        "no device missing0": host.refuses("bad", "macvlan:missing0,range=10.94.0.0/24"),
        "overlaps": host.refuses("bad", "bridge:kn5,range=10.91.7.0/25"),
        "--network none": host.refuses("bad", "bridge:kn0", network_path),
        "has a network already": host.refuses("taken", "bridge:kn0"),
    }
    for words, said in wrong.items():
        assert words in said
    wait_for("nothing was made", lambda: (host.devices(), host.left()) == before)
    host.run("ip", "link", "del", "plain0")
    taken.delete()


def test_exhausted_range(host: Host) -> None:
    host.krun("network", "create", "kn2", "--range", "10.91.9.0/29")
    made = [host.claim(f"full{n}", "bridge:kn2,ip=auto") for n in range(5)]
    assert len({one.address(4) for one in made}) == 5
    assert "every address is in use" in host.refuses("full5", "bridge:kn2")
    made[2].delete()
    assert host.claim("full5", "bridge:kn2").address(4) == made[2].address(4)
    for id in os.listdir(host.root):
        os.rmdir(f"{host.root}/{id}")
    host.krun("network", "gc")
    host.krun("network", "rm", "kn2")


def test_missing_nftables(host: Host, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    host.run("mount", "--bind", tmp_path / "empty", os.path.realpath("/usr/sbin/nft"))
    try:
        assert "nft is not installed" in host.refuses("bare", "bridge:kn0,port=8087:80")
        assert "nft is not installed" in host.refuses("bare", "bridge:kn8")
    finally:
        host.run("umount", os.path.realpath("/usr/sbin/nft"))
