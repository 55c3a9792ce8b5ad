"""What a container's network costs: krun's pool, krun without it, and podman's own bridge.

Run as root: `python tests/bench/network.py [ROUNDS]`.  The variants alternate in one run, on a
machine of the bench's own (mount and network namespaces); medians and differences are printed.
The monitor is the tests' stand-in, so the payload's own time is next to nothing.  Then a hundred
containers are started, eight at a time, without a pool and with one.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

from e2e import machine as parts  # noqa: E402
from e2e.machine import IMAGE, Client  # noqa: E402
from e2e.test_network_clients import TAG, WIRES, NetworkMachine, burst, delete_all  # noqa: E402
from km import build  # noqa: E402

PLAIN, POOLED, MADE = "no network", "from the pool", "made at once"
REQUESTS = {PLAIN: None, POOLED: "bridge:kn0", MADE: "bridge:kn0,mtu=1500"}


def prepare(directory: Path) -> NetworkMachine:
    """The machine with krun, an image and a network."""
    machine = NetworkMachine(directory, WIRES)
    build.km(directory)
    policy = {
        "paths": {"km": f"{directory}/km"},
        "defaults": {"monitor": "km", "engine": "crun"},
    }
    machine.write("/etc/krun/policy.json", json.dumps(policy))
    prefix = directory / "usr"
    machine.run(sys.executable, "-m", "krun", "install", "--prefix", prefix, cwd=parts.REPOSITORY)
    os.symlink(prefix / "bin/krun", directory / "krun")
    payload = build.payload(directory)
    rootfs = parts.make_rootfs(directory / "rootfs", payload)
    parts.make_image(directory / "image.tar", rootfs, IMAGE, ["/payload"])
    ranges = ["--range", "10.91.7.0/24", "--range", "fd91:7::/64"]
    machine.run(directory / "krun", "network", "create", "kn0", *ranges)
    return machine


def compare(variants: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Return the milliseconds of each round of each variant; they take turns."""
    taken: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, run in variants.items():
            start = time.perf_counter()
            run()
            taken[name].append((time.perf_counter() - start) * 1000)
    return taken


def show(title: str, taken: dict[str, list[float]], base: str) -> dict[str, float]:
    """Print and return the medians."""
    medians = {name: statistics.median(values) for name, values in taken.items()}
    print(f"{title} ({len(next(iter(taken.values())))} rounds)")
    for name, median in medians.items():
        change = median - medians[base]
        print(
            f"  {name:<28}{median:8.1f} ms  {change:+7.1f} ms  {median / medians[base]:5.2f} ×"
            f"  (fastest {min(taken[name]):.1f})"
        )
    return medians


def bundle(machine: NetworkMachine, name: str, request: str | None, word: str) -> Path:
    """Make a bundle whose payload does `word`, in the network asked for."""
    directory = machine.directory / f"bundle-{name}"
    directory.mkdir(exist_ok=True)
    example = parts.REPOSITORY / "tests/data/bundles/crun-spec/config.json"
    config = json.loads(example.read_text())
    config["process"].update(args=["/payload", word], terminal=False, rlimits=[])
    config["root"] = {"path": str(machine.directory / "rootfs"), "readonly": True}
    if request:
        config["kontain"] = {"network": request}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def bench_create(machine: NetworkMachine, rounds: int) -> dict[str, list[float]]:
    """Time krun create alone; the containers are deleted outside of the measurement."""
    krun = Client(machine, [machine.directory / "krun", "--root", machine.directory / "root"], {})
    made: list[str] = []

    def creator(name: str, request: str | None) -> Callable[[], None]:
        directory = bundle(machine, name.replace(" ", "-"), request, "args")

        def create() -> None:
            made.append(f"b{len(made)}-{TAG}")
            krun("create", "--bundle", directory, made[-1], stdout=null, stderr=null)

        return create

    with open(os.devnull, "w") as null:
        variants = {name: creator(name, request) for name, request in REQUESTS.items()}
        taken = compare(variants, rounds)
    for id in made:
        krun("delete", "--force", id)
    return taken


def bench_burst(machine: NetworkMachine, number: int, size: int) -> None:
    """Create and start containers, eight at a time; fails at the first that fails."""
    krun = Client(machine, [machine.directory / "krun", "--root", machine.directory / "root"], {})
    krun("network", "pool", "bridge:kn0", "--size", size)
    ids = [f"burst{n}-{TAG}" for n in range(number)]
    start = time.perf_counter()
    addresses = burst(krun, bundle(machine, "burst", "bridge:kn0", "nap"), ids)
    seconds = time.perf_counter() - start
    given = [address for each in addresses.values() for address in each]
    if len(set(given)) != 2 * number:
        raise AssertionError(f"{number} containers have {len(set(given))} addresses")
    start = time.perf_counter()
    delete_all(krun, ids)
    gone = time.perf_counter() - start
    krun("network", "pool", "bridge:kn0", "--size", 0)
    print(
        f"{number} starts, 8 at a time, a pool of {size}: {seconds:.1f} s, deleted in {gone:.1f} s"
    )


def bench_podman(machine: NetworkMachine, rounds: int) -> dict[str, list[float]]:
    """Time podman run --rm with podman's bridge, with krun's network and with none."""
    home = machine.directory / "podman"
    home.mkdir()
    conf = parts.make_containers_conf(home / "containers.conf", str(machine.directory / "krun"))
    options: list[object] = ["--root", home / "root", "--runroot", home / "run"]
    options += ["--tmpdir", home / "tmp", "--storage-driver", "overlay", "--runtime", "krun"]
    options += ["--network-config-dir", home / "networks"]
    podman = Client(machine, ["podman", *options], {"CONTAINERS_CONF": str(conf)})
    podman("load", "-q", "-i", machine.directory / "image.tar")

    def runner(*arguments: str) -> Callable[[], None]:
        def run() -> None:
            podman("run", "--rm", *arguments, IMAGE, "/payload", "args")

        return run

    annotation = "--annotation=app.kontain.network="
    variants = {
        "podman's bridge": runner("--network", "bridge"),
        **{
            f"krun, {name}": runner("--network", "none", *([annotation + r] if r else []))
            for name, r in (
                (PLAIN, ""),
                (POOLED, "bridge:kn0"),
                (MADE, "bridge:kn0 mtu=1500"),
            )
        },
    }
    for run in variants.values():
        run()
    return compare(variants, rounds)


def main(rounds: int) -> int:
    """Measure and print; the status says whether the goals are met."""
    directory = Path(tempfile.mkdtemp(prefix="krun-nb-", dir="/tmp"))
    directory.chmod(0o755)
    machine = prepare(directory)
    pool = [machine.directory / "krun", "network", "pool", "bridge:kn0", "--size"]
    try:
        # Twice what is taken, so that no filler works while the time is taken.
        machine.run(*pool, 2 * rounds + 4)
        create = show("krun create", bench_create(machine, rounds), PLAIN)
        machine.run(*pool, 2 * rounds + 6)
        podman = show("podman run --rm", bench_podman(machine, rounds), "podman's bridge")
        machine.run(*pool, 0)
        for size in (0, 16):
            bench_burst(machine, 100, size)
        machine.run(directory / "krun", "network", "rm", "kn0")
    finally:
        machine.close()
        shutil.rmtree(directory, ignore_errors=True)
    goals = {
        "create from the pool: at most 2 ms more": create[POOLED] - create[PLAIN] <= 2,
        "create made at once: at most 150 ms more": create[MADE] - create[PLAIN] <= 150,
        "podman with krun's network: at most half of its bridge's time": podman[f"krun, {POOLED}"]
        <= podman["podman's bridge"] / 2,
    }
    for goal, met in goals.items():
        print(f"{'met    ' if met else 'NOT MET'} {goal}")
    return 0 if all(goals.values()) else 1


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 15))
