"""The pool, kills at any moment, and the collection of what they leave."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import needs
import pytest
from e2e.machine import wait_for
from kernel.network_host import HOST4, OUTSIDE4, RELEASE, STATE, Host

pytestmark = needs.mark("unshare", "nsenter", "ip", "nft", "tc", root="network namespaces")

# Seconds: a filler is nice, and on a busy machine it gets a fiftieth of a processor.
FILLER = 60
# Creates and deletes in one process: the imports are paid once.  Each line it prints is a step
# that is over: "+ID ADDRESS" when a network is there, "!ID" when its lease was lost meanwhile,
# "-ID" before it is released.
CHURN = """
import os, sys, time
from krun import network
from krun.network import join, leases, reader, state
root, worker, rounds = sys.argv[1], sys.argv[2], int(sys.argv[3])
for number in range(rounds):
    id = f"{worker}-{number}"
    spec = {"kontain": {"network": sys.argv[4]}, "linux": {"namespaces": []}}
    spec = network.claim(spec, id, root)
    os.mkdir(f"{root}/{id}")
    path = state.container(state.directory(), root, id)
    member = next(m for m in os.listdir(path) if state.is_member(m))
    record = state.read(f"{path}/{member}/{state.RECORD}")
    address = record["interfaces"][0]["addresses"][0]
    os.write(1, f"+{id} {address}\\n".encode())
    time.sleep(0.005)
    if leases.read(state.directory()).held.get(address.partition("/")[0]) != member:
        os.write(1, f"!{id}\\n".encode())
    os.write(1, f"-{id}\\n".encode())
    os.rmdir(f"{root}/{id}")
    network.release(id, root)
"""


@pytest.fixture
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    host = Host(tmp_path_factory.mktemp("host"))
    host.krun("network", "create", "kn0", "--range", "10.91.0.0/20", "--range", "fd91:7::/64")
    yield host
    host.close()


def pool_of(host: Host) -> dict[str, int]:
    listed = json.loads(host.krun("network", "pool", "--format", "json").stdout)
    return {one["key"]: one["ready"] for one in listed}


def remove_all(host: Host) -> None:
    """Delete every container and the network; nothing may be left."""
    for id in os.listdir(host.root):
        os.rmdir(f"{host.root}/{id}")
    host.krun("network", "gc")
    host.krun("network", "rm", "kn0")
    wait_for("nothing is left", host.is_clean)
    assert host.devices() == {"lo", "wire"}
    assert "krun" not in host.run("nft", "list", "tables").stdout


def test_pooled_network_needs_no_heavy_import(host: Host) -> None:
    host.krun("network", "pool", "bridge:kn0", "--size", "3")
    assert pool_of(host) == {"kn0,eth0": 3}
    one = host.claim("one", "bridge:kn0")
    assert not one.modules & {"pyroute2", "krun.network.links", "krun.network.make", "asyncio"}
    assert "krun.network.reader" not in one.modules
    two = host.claim("two", "bridge:kn0,port=8080:80")
    assert "pyroute2" not in two.modules
    host.serve(two.inside(), two.address(4), 80)
    assert host.fetch(host.outside, HOST4, 8080) == OUTSIDE4
    assert host.fetch(one.inside(), two.address(4), 80) == one.address(4)
    # The second claim left less than half, so a filler was started; it fills up and ends.
    wait_for("the pool is full", lambda: pool_of(host) == {"kn0,eth0": 3}, FILLER)
    host.krun("network", "pool", "bridge:kn0", "--size", "1")
    assert pool_of(host) == {"kn0,eth0": 1}
    host.krun("network", "pool", "bridge:kn0", "--size", "0")
    assert pool_of(host) == {}
    remove_all(host)


def test_empty_pool_and_other_requests_are_made_at_once(host: Host) -> None:
    host.krun("network", "pool", "bridge:kn0", "--size", "2")
    one = host.claim("one", "bridge:kn0,ip=10.91.1.200/20")
    assert "krun.network.links" in one.modules
    assert pool_of(host) == {"kn0,eth0": 2}
    remove_all(host)


def test_keeper_refills_until_it_is_told_to_end(host: Host) -> None:
    keeper = subprocess.Popen(
        host.inside(
            sys.executable, "-m", "krun", "network", "pool", "bridge:kn0", "-s", "2", "--keep"
        ),
        env=host.environment,
    )
    wait_for("the pool is full", lambda: pool_of(host) == {"kn0,eth0": 2})
    for number in range(3):
        host.claim(f"c{number}", "bridge:kn0")
        wait_for("the pool is full again", lambda: pool_of(host) == {"kn0,eth0": 2})
    keeper.send_signal(signal.SIGTERM)
    assert keeper.wait(10) == 0
    remove_all(host)


def test_pool_of_another_mount_namespace_is_left_alone(host: Host) -> None:
    host.krun("network", "pool", "bridge:kn0", "--size", "1")
    words = host.claim_words("elsewhere", "bridge:kn0")
    apart = ["unshare", "--mount", "sh", "-c", f'umount -l {STATE}/netns/*; exec "$@"', "sh"]
    done = json.loads(host.run(*apart, *words).stdout)
    assert "krun.network.links" in done["modules"]
    assert pool_of(host) == {"kn0,eth0": 1}
    remove_all(host)


def test_member_that_lost_its_interface_is_not_handed_out(host: Host) -> None:
    host.krun("network", "pool", "bridge:kn0", "--size", "2")
    name = next(d for d in host.devices() if d.startswith("krun"))
    host.run("ip", "link", "del", name)
    made = [host.claim(f"c{n}", "bridge:kn0") for n in range(2)]
    assert name.removeprefix("krun") not in {one.member for one in made}
    wait_for("the filler is at work", lambda: pool_of(host)["kn0,eth0"] > 0, FILLER)
    host.krun("network", "pool", "bridge:kn0", "--size", "0")
    remove_all(host)


def test_claim_that_finds_no_usable_member_starts_a_filler(host: Host) -> None:
    host.krun("network", "pool", "bridge:kn0", "--size", "1")
    name = next(d for d in host.devices() if d.startswith("krun"))
    host.run("ip", "link", "del", name)
    assert "krun.network.links" in host.claim("one", "bridge:kn0").modules
    wait_for("the pool is full", lambda: pool_of(host) == {"kn0,eth0": 1}, FILLER)
    host.krun("network", "pool", "bridge:kn0", "--size", "0")
    remove_all(host)


def test_after_a_reboot_the_definition_alone_is_there(
    host: Host, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A reboot empties /run and takes links, namespaces and rules; /etc/krun stays."""
    host.krun("network", "pool", "bridge:kn0", "--size", "2")
    first = host.claim("one", "bridge:kn0,port=8080:80")
    kept = host.run("cat", "/etc/krun/networks/kn0.json").stdout
    after = Host(tmp_path_factory.mktemp("after"))
    try:
        write = 'mkdir -p /etc/krun/networks && printf %s "$1" >/etc/krun/networks/kn0.json'
        after.run("sh", "-c", write, "sh", kept)
        assert after.krun("network", "gc").stdout == ""
        assert pool_of(after) == {}
        # The container's state may have outlived it, on a disk.
        os.mkdir(f"{after.root}/one")
        after.krun("network", "gc")
        os.rmdir(f"{after.root}/one")
        again = after.claim("one", "bridge:kn0,port=8080:80")
        assert len(set(again.addresses)) == len(first.addresses) == 2
        after.serve(again.inside(), again.address(4), 80)
        assert after.fetch(after.outside, HOST4, 8080) == OUTSIDE4
        remove_all(after)
    finally:
        after.close()


def test_create_is_killed_after_its_claim(host: Host) -> None:
    """A claim without a container is an orphan as soon as its process is gone."""
    done = json.loads(host.run(*host.claim_words("orphan", "bridge:kn0,port=8080:80")).stdout)
    member = done["spec"]["linux"]["namespaces"][-1]["path"].rpartition("/")[2]
    assert host.left()["elements"] == 2
    # The same id may be created again at once: the dead record makes way.
    host.claim("orphan", "bridge:kn0,port=8080:80")
    assert f"krun{member}" not in host.left()["links"]
    os.rmdir(f"{host.root}/orphan")
    said = host.krun("network", "gc").stdout
    assert "removed container orphan" in said
    remove_all(host)


def test_orphans_of_every_kind_are_collected(host: Host) -> None:
    one = host.claim("keep", "bridge:kn0")
    lease = f"{STATE}/leases.json"
    document = json.loads(host.run("cat", lease).stdout)
    document["leases"]["10.91.0.250"] = "0badc0de"
    host.run("sh", "-c", f"cat > {lease} <<'EOF'\n{json.dumps(document)}\nEOF")
    host.run("touch", f"{STATE}/netns/0badc0de")
    host.run("mount", "--bind", f"{STATE}/netns/{one.member}", f"{STATE}/netns/0badc0de")
    host.run("ip", "link", "add", "krun0badc0de", "type", "veth", "peer", "name", "knpeer")
    element = '{ tcp . 99 comment "0badc0de" : 10.91.0.250 . 99 }'
    host.run("nft", "add", "element", "inet", "krun", "publish4", element)
    host.run("mkdir", "-p", f"{STATE}/making/1badc0de", f"{STATE}/making/2badc0de")
    host.run("ln", "-s", "4194304:1", f"{STATE}/making/1badc0de/owner")
    removed = json.loads(host.krun("network", "gc", "--format", "json").stdout)
    assert removed == {
        "containers": [],
        "members": ["1badc0de"],
        "leases": ["0badc0de"],
        "namespaces": ["0badc0de"],
        "links": ["krun0badc0de"],
        "rules": ["0badc0de"],
        "helpers": [],
        "rebuilt": [],
    }
    left = host.left()
    assert left["links"] == [f"krun{one.member}"]
    assert set(left["leases"].values()) == {one.member}
    remove_all(host)


@pytest.mark.parametrize("damage", ["rm -f {}", "echo '{{' > {}", "echo '[]' > {}", ": > {}"])
def test_lost_leases_are_those_of_the_records(host: Host, damage: str) -> None:
    """No address is given twice, whoever finds the file lost first; a pool's are kept too."""
    host.krun("network", "pool", "bridge:kn0", "--size", "2")
    before = {n: host.claim(f"c{n}", "bridge:kn0,mtu=1400").addresses for n in range(3)}
    whole = json.loads(host.run("cat", f"{STATE}/leases.json").stdout)["leases"]
    assert len(whole) == 10
    lose = damage.format(f"{STATE}/leases.json")
    host.run("sh", "-c", lose)
    # The first to need an address makes the file anew.
    new = host.claim("new", "bridge:kn0,mtu=1400")
    leased = json.loads(host.run("cat", f"{STATE}/leases.json").stdout)["leases"]
    assert leased == whole | dict.fromkeys(new.addresses, new.member)
    # A delete, and a refused address, while it is lost; then gc.
    host.run("sh", "-c", lose)
    os.rmdir(f"{host.root}/c0")
    host.python(RELEASE, "c0", host.root)
    assert "is in use" in host.refuses("bad", f"bridge:kn0,ip={before[1][0]}/20")
    host.run("sh", "-c", lose)
    said = json.loads(host.krun("network", "gc", "--format", "json").stdout)["rebuilt"]
    kept = {address for address in leased if address not in before[0]}
    assert set(said) >= kept
    host.krun("network", "gc")
    assert set(host.left()["leases"]) == kept
    host.krun("network", "pool", "bridge:kn0", "--size", "0")
    remove_all(host)


@pytest.mark.parametrize("call", ["unshare", "setns", "mount", "sendto,sendmsg", "rename", "fsync"])
def test_every_failing_call_leaves_nothing(host: Host, call: str) -> None:
    """Make each of the first calls of a kind fail, by strace, and look at what is left."""
    needs.need("strace")
    failed = 0
    trace = Path(f"{host.root}.trace")
    for when in (1, 3):
        fault = ["-o", trace, "-f", "-e", f"inject={call}:error=EPERM:when={when}"]
        host.run("strace", *fault, *host.claim_words("one", "bridge:kn0"), status=None)
        failed += "(INJECTED)" in trace.read_text()
        host.krun("network", "gc")
        wait_for("nothing is left", lambda: "leases" not in host.left())
    assert failed
    remove_all(host)


@pytest.mark.parametrize(
    ("call", "times"),
    [
        ("rename", 4),
        ("mkdir", 3),
        ("symlink", 2),
        ("mount", 1),
        ("unshare", 1),
        ("umount2", 1),
        ("fsync", 3),
        ("sendto", 4),
        ("unlink", 4),
        ("rmdir", 3),
        ("vfork,clone3,clone", 2),
    ],
)
def test_kill_at_any_change_leaves_nothing(host: Host, call: str, times: int) -> None:
    """Kill a create and a delete at the first, second… call of each kind that changes something."""
    needs.need("strace")
    killed = 0
    trace = Path(f"{host.root}.trace")
    for when in range(1, times + 1):
        fault = ["-o", trace, "-f", "-e", f"inject={call}:signal=KILL:when={when}"]
        words = [sys.executable, "-c", CHURN, host.root, f"k{when}", "1", "bridge:kn0"]
        host.run("strace", *fault, *words, status=None)
        killed += "killed by SIGKILL" in trace.read_text()
        for id in os.listdir(host.root):
            os.rmdir(f"{host.root}/{id}")
        host.krun("network", "gc")
        wait_for("nothing is left", host.is_clean)
    assert killed
    remove_all(host)


@pytest.mark.parametrize("pooled", [False, True], ids=["direct", "pooled"])
def test_no_address_twice_under_random_kills(host: Host, pooled: bool) -> None:
    """Many processes create and delete at once, and are killed at random."""
    if pooled:
        host.krun("network", "pool", "bridge:kn0", "--size", "8")
    least = int(os.environ.get("KRUN_TEST_CHURN", "30"))
    rng = random.Random(5)
    lock = threading.Lock()
    alive: dict[str, str] = {}
    twice: list[str] = []
    lost: list[str] = []
    done = 0

    def follow(process: subprocess.Popen[str]) -> None:
        nonlocal done
        assert process.stdout is not None
        for line in process.stdout:
            with lock:
                if line[0] == "!":
                    lost.append(line)
                    continue
                if line[0] == "-":
                    alive.pop(line[1:].strip(), None)
                    done += 1
                    continue
                id, address = line[1:].split()
                if address in alive.values():
                    twice.append(f"{address}: {id} and {alive}")
                alive[id] = address

    processes: list[tuple[subprocess.Popen[str], threading.Thread]] = []
    serial = 0
    kills = 0

    def start() -> None:
        nonlocal serial
        serial += 1
        words = [sys.executable, "-c", CHURN, host.root, f"w{serial}", "100000", "bridge:kn0"]
        process = subprocess.Popen(
            host.inside(*words),
            env=host.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        thread = threading.Thread(target=follow, args=(process,))
        thread.start()
        processes.append((process, thread))

    for _ in range(4):
        start()
    while done < least:
        seen = done + rng.randrange(1, 6)
        wait_for("more steps are made", lambda target=seen: done >= target, 30)
        process, thread = processes.pop(rng.randrange(len(processes)))
        assert process.poll() is None, process.stderr and process.stderr.read()
        process.kill()
        process.wait()
        thread.join()
        kills += 1
        start()
        # What was killed in the middle of a create or a delete is collected while others work.
        if kills % 5 == 0:
            host.krun("network", "gc")
    for process, thread in processes:
        process.kill()
        process.wait()
        thread.join()
    assert not twice
    assert not lost
    assert kills >= least // 10
    host.krun("network", "pool", "bridge:kn0", "--size", "0")
    wait_for("no filler works", lambda: pool_of(host) == {})
    remove_all(host)


def test_burst(host: Host) -> None:
    """A hundred creates at once, of which sixteen find a namespace in the pool."""
    host.krun("network", "pool", "bridge:kn0", "--size", "16")
    claims = [
        subprocess.Popen(
            host.inside(*host.claim_words(f"b{n}", "bridge:kn0")),
            env=host.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for n in range(100)
    ]
    paths = set()
    for n, process in enumerate(claims):
        output, errors = process.communicate(timeout=100)
        assert process.returncode == 0, errors
        os.mkdir(f"{host.root}/b{n}")
        paths.add(json.loads(output)["spec"]["linux"]["namespaces"][-1]["path"])
    assert len(paths) == 100
    leases = json.loads(host.run("cat", f"{STATE}/leases.json").stdout)["leases"]
    assert len(set(leases.values())) >= 100
    for n in range(0, 100, 25):
        os.rmdir(f"{host.root}/b{n}")
        host.python(RELEASE, f"b{n}", host.root)
    host.krun("network", "pool", "bridge:kn0", "--size", "0")
    remove_all(host)
