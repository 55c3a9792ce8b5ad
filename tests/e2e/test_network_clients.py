"""Networks made by krun under real clients: podman, containerd and krun's own command line.

The machine has a network namespace of its own, and a neighbour outside that asks with curl.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from e2e import machine as parts
from e2e.conftest import ENGINES, need
from e2e.machine import IMAGE, Client, Machine, wait_for
from km import build

STATE = "/run/krun-network"
# Cgroups are the whole machine's: other runs of these tests have containers of their own names.
TAG = os.urandom(3).hex()
WEB, ONCE, BAD, CUT, ORPHAN = (f"{name}-{TAG}" for name in ("web", "once", "bad", "cut", "orphan"))
HOST4, HOST6 = "198.51.100.1", "fd00:51::1"
PORT = 8080

WIRES = f"""
mkdir -p {STATE} /run/netns
mount -t tmpfs tmpfs {STATE}
mount -t tmpfs tmpfs /run/netns
ip link set lo up
ip netns add outside
ip link add wire type veth peer name wire netns outside
ip address add {HOST4}/24 dev wire
ip address add {HOST6}/64 dev wire nodad
ip link set wire up
ip -n outside link set lo up
ip -n outside address add 198.51.100.2/24 dev wire
ip -n outside address add fd00:51::2/64 dev wire nodad
ip -n outside link set wire up
"""


# Answers every question for an IPv4 address with one of them.
NAME_SERVER = r"""
import socket, struct
server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
server.bind(("198.51.100.2", 53))
print("ready", flush=True)
while True:
    query, client = server.recvfrom(512)
    end = 12
    while query[end]:
        end += query[end] + 1
    question = query[12 : end + 5]
    answer = b""
    if question[-4:-2] == b"\0\1":
        answer = b"\xc0\x0c" + struct.pack("!HHIH", 1, 1, 60, 4) + bytes([192, 0, 2, 77])
    head = query[:2] + struct.pack("!HHHHH", 0x8180, 1, bool(answer), 0, 0)
    server.sendto(head + question + answer, client)
"""


class NetworkMachine(Machine):
    """A machine with a network of its own, and one neighbour named outside."""

    def curl(self, address: str, port: int = PORT, seconds: float = 5) -> str | None:
        """What curl gets from outside; None when nobody answers."""
        at = f"[{address}]" if ":" in address else address
        command = ["ip", "netns", "exec", "outside", "curl", "-sS", "-m", seconds]
        done = self.run(*command, f"http://{at}:{port}/", status=None)
        return done.stdout if done.returncode == 0 else None

    def left(self) -> dict[str, Any]:
        """Return what krun's networks have left on the machine."""
        leases = self.run("cat", f"{STATE}/leases.json", status=None).stdout
        links = json.loads(self.run("ip", "-j", "link").stdout)
        rules = self.run("nft", "-j", "list", "ruleset").stdout
        found = {
            "leases": json.loads(leases)["leases"] if leases else {},
            "netns": self.run("ls", f"{STATE}/netns", status=None).stdout.split(),
            "links": [one["ifname"] for one in links if one["ifname"].startswith("krun")],
            "rules": rules.count('"comment"'),
        }
        return {key: value for key, value in found.items() if value}


@pytest.fixture(scope="module")
def network(km: Path, payload: Path) -> Iterator[NetworkMachine]:
    need("unshare", "nsenter", "busybox", "crun", "ip", "nft", "curl")
    directory = Path(tempfile.mkdtemp(prefix="krun-net-", dir="/tmp"))
    directory.chmod(0o755)
    machine = NetworkMachine(directory, WIRES)
    shutil.copy(km, directory / "km")
    (directory / "km").chmod(0o755)
    policy = {"paths": {"km": f"{directory}/km"}, "defaults": {"monitor": "km"}}
    machine.write("/etc/krun/policy.json", json.dumps(policy))
    for engine in ENGINES:
        parts.make_launcher(directory / f"krun-{engine}", engine)
    rootfs = parts.make_rootfs(directory / "rootfs", payload)
    build.compile_static(build.TESTS / "payloads/http.c", rootfs / "http", *build.FREESTANDING)
    for name in ("resolv.conf", "hosts", "hostname"):
        (rootfs / "etc" / name).touch()
    parts.make_image(directory / "image.tar", rootfs, IMAGE, ["/payload"])
    krun = Client(machine, [directory / "krun-crun", "network"], {})
    krun("create", "kn0", "--range", "10.91.7.0/24", "--range", "fd91:7::/64")
    yield machine
    krun("rm", "kn0")
    assert machine.left() == {}
    machine.close()
    shutil.rmtree(directory)


@pytest.fixture
def krun(network: NetworkMachine, engine: str) -> Iterator[Client]:
    """krun with one engine; every container is deleted, and nothing of its network is left."""
    root = network.directory / f"root-{engine}"
    client = Client(network, [network.directory / f"krun-{engine}", "--root", root], {})
    yield client
    if root.exists():
        for id in os.listdir(root):
            client("delete", "--force", id, status=None)
    wait_for("the network is gone", lambda: not network.left())


@pytest.fixture
def bundle(network: NetworkMachine, tmp_path: Path) -> Callable[..., Path]:
    """Make a bundle that runs argv in the network asked for."""

    def make(request: Any, *argv: object, **extension: object) -> Path:
        example = parts.REPOSITORY / "tests/data/bundles/crun-spec/config.json"
        config = json.loads(example.read_text())
        config["process"].update(args=list(map(str, argv)), terminal=False, rlimits=[])
        config["root"] = {"path": str(network.directory / "rootfs"), "readonly": True}
        config["kontain"] = {"network": request, **extension}
        directory = tmp_path / "bundle"
        directory.mkdir(exist_ok=True)
        (directory / "config.json").write_text(json.dumps(config))
        return directory

    return make


def create(krun: Client, directory: Path, id: str) -> None:
    """Create and start; the payload's output goes to a file, as a pipe would never end."""
    with open(directory / "output", "w+") as output:
        done = krun("create", "--bundle", directory, id, stdout=output, stderr=output, status=None)
        output.seek(0)
        assert done.returncode == 0, output.read()
    krun("start", id)


def burst(krun: Client, directory: Path, ids: list[str]) -> dict[str, list[str]]:
    """Create and start containers, eight at a time; return the addresses of each.

    They live until delete_all().
    """

    def one(id: str) -> None:
        null = subprocess.DEVNULL
        with open(directory / f"{id}.log", "w+") as errors:
            done = krun(
                "create", "--bundle", directory, id, stdout=null, stderr=errors, status=None
            )
            if done.returncode == 0:
                done = krun("start", id, stdout=null, stderr=errors, status=None)
            errors.seek(0)
            assert done.returncode == 0, f"{id}: {errors.read()}"

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(one, ids))
    listed = json.loads(krun("network", "ls", "kn0", "--format", "json").stdout)
    found = {
        one["id"]: [text for each in one["interfaces"] for text in each["addresses"]]
        for one in listed
    }
    return {id: found[id] for id in ids}


def delete_all(krun: Client, ids: list[str]) -> None:
    """Delete containers, eight at a time."""
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda id: krun("delete", "--force", id), ids))


def ask(machine: NetworkMachine, address: str, expected: str, port: int = PORT) -> None:
    """Check what a server that is about to listen answers."""
    said = wait_for(f"an answer of {address}", lambda: machine.curl(address, port))
    assert said == expected


def test_server_answers_on_a_published_port(
    network: NetworkMachine, krun: Client, bundle: Callable[..., Path]
) -> None:
    directory = bundle(f"bridge:kn0,port={PORT}:80", "/http", 80)
    create(krun, directory, WEB)
    ask(network, HOST4, "hello\n")
    ask(network, HOST6, "hello\n")
    listed = krun("network", "ls", "kn0").stdout
    assert WEB in listed
    assert f"{PORT}->80/tcp" in listed
    krun("kill", WEB, "KILL")
    wait_for("it stopped", lambda: '"stopped"' in krun("state", WEB).stdout)
    krun("delete", WEB)
    assert network.curl(HOST4, seconds=1) is None


def test_container_sees_its_files(
    network: NetworkMachine, krun: Client, bundle: Callable[..., Path]
) -> None:
    request = {
        "interfaces": [{"bridge": "kn0"}],
        "ports": [f"{PORT}:80"],
        "dns": {"nameservers": ["192.0.2.53"]},
        "hosts": {"db": "10.91.7.99"},
        "hostname": "named",
    }
    for file, text in (("resolv.conf", "nameserver 192.0.2.53\n"), ("hostname", "named\n")):
        directory = bundle(request, "/http", 80, f"/etc/{file}")
        create(krun, directory, WEB)
        ask(network, HOST4, text)
        krun("delete", "--force", WEB)


@pytest.mark.parametrize("size", [0, 8], ids=["made", "pooled"])
def test_burst_of_starts(
    network: NetworkMachine, krun: Client, bundle: Callable[..., Path], size: int
) -> None:
    """Whole starts, eight at a time; what a pool cannot serve is made beside its filler."""
    directory = bundle("bridge:kn0", "/payload", "nap")
    krun("network", "pool", "bridge:kn0", "--size", size)
    ids = [f"burst{number}-{TAG}" for number in range(20)]
    addresses = burst(krun, directory, ids)
    given = [address for each in addresses.values() for address in each]
    assert len(given) == len(set(given)) == 2 * len(ids)
    for id in ids:
        assert json.loads(krun("state", id).stdout)["status"] == "running"
    delete_all(krun, ids)
    krun("network", "pool", "bridge:kn0", "--size", 0)


def test_run_ends_with_its_network(
    network: NetworkMachine, krun: Client, bundle: Callable[..., Path]
) -> None:
    directory = bundle("bridge:kn0", "/payload", "exit", 7)
    krun("run", "--bundle", directory, ONCE, status=7)
    wait_for("the network is gone", lambda: not network.left())


def test_failed_create_leaves_no_network(
    network: NetworkMachine, krun: Client, bundle: Callable[..., Path]
) -> None:
    directory = bundle("bridge:kn0", "/payload", "args")
    config = json.loads((directory / "config.json").read_text())
    config["mounts"].append(
        {"destination": "/data", "type": "bind", "source": "/nowhere", "options": ["bind"]}
    )
    (directory / "config.json").write_text(json.dumps(config))
    done = krun("create", "--bundle", directory, BAD, status=None)
    assert done.returncode != 0
    assert "/nowhere" in done.stderr
    wait_for("the network is gone", lambda: not network.left())


def test_killed_create_leaves_nothing_after_a_delete(
    network: NetworkMachine, krun: Client, bundle: Callable[..., Path]
) -> None:
    """Kill create later and later, at last when it is over already."""
    directory = bundle("bridge:kn0", "/payload", "nap")
    ends = []
    for milliseconds in range(20, 400, 60):
        words = network.inside(*krun.argv, "create", "--bundle", directory, CUT)
        null = subprocess.DEVNULL
        process = subprocess.Popen(words, stdin=null, stdout=null, stderr=null)
        time.sleep(milliseconds / 1000)
        process.kill()
        ends.append(process.wait())

        # crun may still be at work on what krun asked for.
        def deleted() -> bool:
            krun("delete", "--force", CUT, status=None)
            krun("network", "gc")
            return not network.left()

        wait_for("the network is gone", deleted)
    assert -signal.SIGKILL in ends


def test_user_mode_network(
    network: NetworkMachine, krun: Client, bundle: Callable[..., Path]
) -> None:
    need("slirp4netns")

    def helpers() -> list[str]:
        """Those of this machine: other tests' have the same command lines."""
        listed = network.run("ps", "-ww", "-eo", "mntns,args").stdout.splitlines()
        here = str(os.stat(f"/proc/{network.holder.pid}/ns/mnt").st_ino)
        slirp = [line.split(None, 1) for line in listed if "slirp4netns" in line and STATE in line]
        return [words for namespace, words in slirp if namespace == here]

    before = helpers()
    create(krun, bundle(f"user port={PORT}:80", "/http", 80), WEB)
    ask(network, HOST4, "hello\n")
    assert len(helpers()) == len(before) + 1
    # What collects in another mount namespace knows nothing of it, and leaves it alone.
    apart = ["unshare", "--mount", "sh", "-c", f'mount -t tmpfs tmpfs {STATE}; exec "$@"', "sh"]
    network.run(*apart, *krun.argv, "network", "gc")
    assert len(helpers()) == len(before) + 1
    krun("delete", "--force", WEB)
    assert network.curl(HOST4, seconds=1) is None
    krun("run", "--bundle", bundle("user", "/payload", "exit", 7), ONCE, status=7)
    wait_for("no helper is left", lambda: helpers() == before)
    # A helper without a record is an orphan.
    create(krun, bundle("user", "/payload", "nap"), ORPHAN)
    network.run("sh", "-c", f"rm -r {STATE}/containers/*/{ORPHAN}")
    assert "removed helper" in krun("network", "gc").stdout
    wait_for("no helper is left", lambda: helpers() == before)


def test_refusals_come_before_anything_is_made(
    network: NetworkMachine, krun: Client, bundle: Callable[..., Path]
) -> None:
    for request, words in (
        ("bridge:kn0,ip=10.99.0.1/24", "outside the range"),
        ("bridge:wire", "not a bridge"),
        ("bridge:a-much-too-long-name", "at most 15"),
        ("macvlan:none0,ip=192.0.2.1/24", "no device none0"),
    ):
        done = krun("create", "--bundle", bundle(request, "/payload"), BAD, status=1)
        assert words in done.stderr
        assert done.stderr.count("\n") == 1
        assert network.left() == {}


def test_default_network_of_the_host(
    network: NetworkMachine, krun: Client, bundle: Callable[..., Path], tmp_path: Path
) -> None:
    """--network and defaults.network are for containers that ask for none; each is named."""
    directory = bundle(None, "/http", 80)
    config = json.loads((directory / "config.json").read_text())
    del config["kontain"]
    (directory / "config.json").write_text(json.dumps(config))
    policy = {
        "paths": {"km": f"{network.directory}/km"},
        "defaults": {"monitor": "km", "network": {"interfaces": [{"bridge": "kn0", "mtu": 1}]}},
        "allow": {"network": False},
    }
    path = tmp_path / "policy.json"

    def given(*options: object) -> Client:
        path.write_text(json.dumps(policy))
        return Client(network, [krun.argv[0], "--policy", path, *options, *krun.argv[1:]], {})

    create_words = ["create", "--bundle", directory, WEB]
    done = given()(*create_words, status=1)
    assert f"{path}: defaults.network: interfaces[0].mtu: must be" in done.stderr
    done = given("--network", "brigde:kn0")(*create_words, status=1)
    assert "--network: 'brigde:kn0' is no interface" in done.stderr
    policy["defaults"]["network"] = f"bridge:kn0,port={PORT}:80"
    create(given(), directory, WEB)
    ask(network, HOST4, "hello\n")
    krun("delete", "--force", WEB)
    # A namespace that the client has made is left alone.
    config["linux"]["namespaces"] = [
        one if one["type"] != "network" else {**one, "path": "/run/netns/outside"}
        for one in config["linux"]["namespaces"]
    ]
    config["process"]["args"] = ["/payload", "args", "outside"]
    (directory / "config.json").write_text(json.dumps(config))
    assert given()("run", "--bundle", directory, WEB).stdout == "outside\n"
    assert network.left() == {}


def test_policy_may_forbid_networks(
    network: NetworkMachine, krun: Client, bundle: Callable[..., Path], tmp_path: Path
) -> None:
    policy = {
        "paths": {"km": f"{network.directory}/km"},
        "defaults": {"monitor": "km"},
        "allow": {"network": False},
    }
    path = tmp_path / "policy.json"
    path.write_text(json.dumps(policy))
    argv = [krun.argv[0], "--policy", path, *krun.argv[1:]]
    directory = bundle("bridge:kn0", "/payload", "args")
    done = network.run(*argv, "create", "--bundle", directory, BAD, status=1)
    assert "does not allow" in done.stderr
    assert network.left() == {}


@pytest.fixture(scope="module")
def podman_home(network: NetworkMachine) -> Path:
    need("podman", "conmon")
    home = network.directory / "podman"
    home.mkdir()
    return home


@pytest.fixture
def podman(network: NetworkMachine, podman_home: Path, engine: str) -> Iterator[Client]:
    """podman --runtime krun with one engine, on the machine with a network of its own."""
    options: list[object] = ["--root", podman_home / "root", "--runroot", podman_home / "run"]
    options += ["--tmpdir", podman_home / "tmp", "--storage-driver", "overlay"]
    options += ["--network-config-dir", podman_home / "networks"]
    conf = parts.make_containers_conf(
        podman_home / f"containers-{engine}.conf", str(network.directory / f"krun-{engine}")
    )
    client = Client(
        network, ["podman", *options, "--runtime", "krun"], {"CONTAINERS_CONF": str(conf)}
    )
    client("load", "-q", "-i", network.directory / "image.tar")
    yield client
    client("rm", "-f", "-t", "0", "--all", status=None)
    wait_for("the network is gone", lambda: not network.left())


def test_podman(network: NetworkMachine, podman: Client) -> None:
    asked = f"app.kontain.network=bridge:kn0 port={PORT}:80/tcp"
    options = ["-d", "--network", "none", "--add-host", "added:192.0.2.9", "--annotation", asked]
    podman("run", *options, "--name", "net-web", IMAGE, "/http", "80", "/etc/hosts")
    said = wait_for("an answer", lambda: network.curl(HOST4))
    assert "192.0.2.9\tadded" in said
    assert "10.91.7." in said
    podman("rm", "-f", "-t", "0", "net-web")
    wait_for("the network is gone", lambda: not network.left())
    done = podman(
        "run",
        "--rm",
        "--network",
        "none",
        "--annotation",
        "app.kontain.network=bridge:kn0",
        IMAGE,
        "/payload",
        "args",
        "in a network",
    )
    assert done.stdout == "in a network\n"
    bad = "app.kontain.network=bridge:kn0 ip=10.99.0.1/24"
    done = podman(
        "run", "--rm", "--network", "none", "--annotation", bad, IMAGE, "/payload", status=None
    )
    assert done.returncode != 0
    assert "outside the range" in done.stderr


def test_podman_with_a_pool(network: NetworkMachine, podman: Client) -> None:
    pool = [network.directory / "krun-crun", "network", "pool", "bridge:kn0", "--size"]
    network.run(*pool, "4")
    try:
        for number in range(4):
            asked = "app.kontain.network=bridge:kn0"
            options = ["--rm", "--network", "none", "--annotation", asked]
            done = podman("run", *options, IMAGE, "/payload", "args", number)
            assert done.stdout == f"{number}\n"
    finally:
        network.run(*pool, "0")


def test_ctr(network: NetworkMachine, engine: str) -> None:
    need("containerd", "ctr")
    settings = 'disabled_plugins = ["io.containerd.grpc.v1.cri"]\n'
    home = network.directory / f"containerd-{engine}"
    with parts.containerd(network, home, settings, "-n", "krun-net") as ctr:
        asked = f"app.kontain.network=bridge:kn0,port={PORT}:80/tcp"
        binary = network.directory / f"krun-{engine}"
        ctr("run", "-d", "--runc-binary", binary, "--annotation", asked, IMAGE, WEB, "/http")
        ask(network, HOST4, "hello\n")
        ctr("task", "kill", "-s", "SIGKILL", WEB)
        wait_for("the task ends", lambda: "STOPPED" in ctr("task", "ls").stdout)
        ctr("task", "delete", WEB, status=None)
        wait_for("the network is gone", lambda: not network.left())
        ctr("container", "delete", WEB)


@pytest.fixture(scope="module")
def docker(network: NetworkMachine) -> Iterator[Client]:
    """docker, and a dockerd of its own with a runtime NAME-ENGINE for each network."""
    need("dockerd", "containerd", "runc", "docker")
    # dockerd writes them into a script without quotes: no blanks.
    requests = {"web": f"bridge:kn0,port={PORT}:80", "plain": "bridge:kn0", "bad": "bridge:wire"}
    runtimes = {
        f"{name}-{engine}": {
            "path": f"{network.directory}/krun-{engine}",
            "runtimeArgs": ["--network", request],
        }
        for name, request in requests.items()
        for engine in ENGINES
    }
    with parts.dockerd(network, runtimes) as client:
        yield client


def test_docker(network: NetworkMachine, docker: Client, engine: str) -> None:
    """A runtime with a network of its own serves what docker gives none."""
    none = ["--network", "none"]
    options = ["-d", *none, "--hostname", "named", "--add-host", "added:192.0.2.9"]
    docker(
        "run",
        *options,
        "--name",
        WEB,
        "--runtime",
        f"web-{engine}",
        IMAGE,
        "/http",
        "80",
        "/etc/hosts",
    )
    said = wait_for("an answer", lambda: network.curl(HOST4))
    assert "192.0.2.9\tadded" in said
    assert "\tnamed" in said
    assert network.curl(HOST6) == said
    # Another container takes the port: docker shows what krun says.
    done = docker(
        "run", "--rm", *none, "--runtime", f"web-{engine}", IMAGE, "/payload", status=None
    )
    assert f"already published by another container: {PORT}/tcp" in done.stderr
    docker("restart", "-t", "0", WEB)
    assert wait_for("an answer again", lambda: network.curl(HOST4))
    docker("rm", "-f", WEB)
    wait_for("the network is gone", lambda: not network.left())
    done = docker(
        "run", "--rm", *none, "--runtime", f"plain-{engine}", IMAGE, "/payload", "args", "plain"
    )
    assert done.stdout == "plain\n"
    done = docker(
        "run", "--rm", *none, "--runtime", f"bad-{engine}", IMAGE, "/payload", status=None
    )
    assert "create failed: wire is a veth device of the host, not a bridge" in done.stderr
    wait_for("the network is gone", lambda: not network.left())


@pytest.fixture
def ordinary(network: NetworkMachine, tmp_path: Path) -> Iterator[None]:
    """A machine whose devices ordinary users may open, with a way out and a name server there."""
    for name, numbers in (("kvm", os.stat("/dev/kvm").st_rdev), ("net/tun", os.makedev(10, 200))):
        node = network.directory / Path(name).name
        if not node.exists():
            os.mknod(node, 0o600 | stat.S_IFCHR, numbers)
            node.chmod(0o666)
        network.run("mount", "--bind", node, f"/dev/{name}")
    network.run("ip", "route", "add", "default", "via", "198.51.100.2")
    network.run("ip", "-6", "route", "add", "default", "via", "fd00:51::2")
    network.write("/etc/resolv.conf", "nameserver 198.51.100.2\n")
    outside = network.inside("ip", "netns", "exec", "outside", sys.executable, "-c", NAME_SERVER)
    server = subprocess.Popen(outside, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    assert server.stdout.readline() == "ready\n"
    yield
    server.kill()
    server.wait()
    for family in ("-4", "-6"):
        network.run("ip", family, "route", "del", "default")
    for name in ("kvm", "net/tun"):
        network.run("umount", f"/dev/{name}")


@pytest.fixture(params=["slirp4netns", "pasta"])
def helper(network: NetworkMachine, request: pytest.FixtureRequest) -> Iterator[str]:
    """The one program for user-mode networks that can be executed."""
    need("slirp4netns", request.param)
    none = network.directory / "not-executable"
    none.touch()
    if request.param == "pasta":
        network.run("mount", "--bind", none, "/usr/bin/slirp4netns")
    yield request.param
    if request.param == "pasta":
        network.run("umount", "/usr/bin/slirp4netns")


@pytest.fixture
def rootless(network: NetworkMachine, ordinary: None, helper: str, engine: str) -> Iterator[Client]:
    """An ordinary user's podman --runtime krun; it keeps the mounts of its first start."""
    need("podman", "conmon", "newuidmap", "setpriv")
    # podman takes no run directory of more than 50 characters.
    home = network.directory / f"user-{engine}"
    client = parts.rootless_podman(network, home, engine)
    yield client
    parts.remove_rootless(client, home)
    left = network.run("find", home / "run/krun-network", "-mindepth", "2", "-type", "d").stdout
    assert [path for path in left.split() if path.count("/containers/") * path.count("%") < 1] == []


@pytest.mark.usefixtures("open_checkout")
def test_rootless_podman(network: NetworkMachine, rootless: Client, helper: str) -> None:
    """An ordinary user publishes a port and asks for names, through either helper."""
    options = ["--network", "none", "--annotation"]
    published = f"app.kontain.network=user port={PORT}:80"
    rootless("run", "-d", *options, published, "--name", WEB, IMAGE, "/http", "80")
    ask(network, HOST4, "hello\n")
    assert helper in network.run("ps", "-u", "4711", "-o", "args").stdout
    if helper == "slirp4netns":
        # pasta 2023_03_09 at times ends when its first connection does.
        done = rootless("run", "--rm", *options, published, IMAGE, "/payload", status=None)
        assert f"port {PORT}/tcp on the host: Address already in use" in done.stderr
    rootless("rm", "-f", "-t", "0", WEB)
    assert network.curl(HOST4, seconds=1) is None
    asking = ["nslookup", "name.test"]
    done = rootless("run", "--rm", *options, "app.kontain.network=user", IMAGE, *asking)
    assert "192.0.2.77" in done.stdout
    # A service on the host's loopback alone is not in the container's reach.
    serve = (
        "import socket\ns = socket.create_server(('127.0.0.1', 7777))\nprint('ready', flush=True)\n"
    )
    serve += "while True:\n    c, _ = s.accept()\n    c.sendall(b'reached\\n')\n    c.close()\n"
    listener = [sys.executable, "-c", serve]
    server = subprocess.Popen(network.inside(*listener), stdout=subprocess.PIPE)
    assert server.stdout is not None
    server.stdout.readline()
    gateway = {"slirp4netns": "10.0.2.2", "pasta": "198.51.100.2"}[helper]
    reach = f"sleep 1 | nc -w 1 {gateway} 7777; echo tried"
    asked = "app.kontain.network=user"
    done = rootless("run", "--rm", *options, asked, IMAGE, "sh", "-c", reach)
    assert done.stdout == "tried\n"
    server.kill()
    server.wait()
    asked = "app.kontain.network=bridge:kn0"
    done = rootless("run", "--rm", *options, asked, IMAGE, "/payload", status=None)
    assert "a veth interface needs the host's root (ask for the network user)" in done.stderr


@pytest.mark.usefixtures("open_checkout")
def test_ordinary_user_is_told_what_works(network: NetworkMachine, engine: str) -> None:
    home = network.directory / f"home-{engine}"
    krun = Client(network, [*parts.as_tester(home), network.directory / f"krun-{engine}"], {})
    krun("spec", "--rootless", "--bundle", home)
    config = json.loads((home / "config.json").read_text())
    config["process"].update(args=["/http", "80"], terminal=False, rlimits=[])
    config["root"] = {"path": str(network.directory / "rootfs"), "readonly": True}
    node = network.directory / "kvm"
    if not node.exists():
        os.mknod(node, 0o600 | stat.S_IFCHR, os.stat("/dev/kvm").st_rdev)
        node.chmod(0o666)
    network.run("mount", "--bind", node, "/dev/kvm")
    try:
        for request, words in (("bridge:kn0", "host's root"), ("user", "rootless podman")):
            config["kontain"] = {"network": request}
            (home / "config.json").write_text(json.dumps(config))
            done = krun("create", "--bundle", home, BAD, status=1)
            assert words in done.stderr
            assert done.stderr.count("\n") == 1
    finally:
        network.run("umount", "/dev/kvm")
