"""Benchmarks of the image part: deciding, a refresh with nothing to do, pulls, hooks.

    python tests/bench/images.py [deciding|refresh|pulls|hooks]

Real podman, dockerd, containerd and docker-registry on loopback, each with its own root; needs
root.  Prints medians and, where two ways are compared, their ratio.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import images_parts as parts  # noqa: E402
import needs  # noqa: E402


def show(what: str, value: float, unit: str, note: str = "") -> None:
    print(f"{what:<62} {value:10.1f} {unit:<4} {note}", flush=True)


def timed(run: Callable[[], object]) -> float:
    began = time.monotonic()
    run()
    return time.monotonic() - began


DECIDE = """
import resource, sys, time
from krun.images.decide import Wish, decide
from krun.images.references import parse
from krun.images.stores.model import Image
names = [f"registry.example.com/team{n % 50}/app{n}:1.{n % 7}" for n in range(8000)]
images = [
    Image(f"sha256:{n:064x}", (name,), (name.rpartition(":")[0] + f"@sha256:{n:064x}",), (), 1)
    for n, name in enumerate(names[:5000])
]
texts = [[names[(n * 37 + k * 401) % 8000] for k in range(20)] for n in range(1000)]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
began = time.monotonic()
wishes = [
    Wish(f"c{n}", tuple(map(parse, wanted)), tuple(wanted[:5]), "Succeeded", "ImageCacheCreate",
         n % 3 == 0)
    for n, wanted in enumerate(texts)
]
parsed = time.monotonic()
decision = decide(wishes, images, {images[0].id: ["c"]})
ended = time.monotonic()
print(parsed - began, ended - parsed, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
      len(decision.pulls), len(decision.works))
"""


def deciding() -> None:
    """Decide for 1,000 ImageCaches of 20 images against a store of 5,000 images."""
    rows = []
    for _ in range(5):
        done = subprocess.run(
            [sys.executable, "-c", DECIDE], cwd=ROOT, capture_output=True, text=True, check=True
        )
        rows.append([float(word) for word in done.stdout.split()])
    middle = [statistics.median(column) for column in zip(*rows, strict=True)]
    show("reading 20,000 references", middle[0] * 1000, "ms")
    show("deciding, 1,000 caches of 20 images, store of 5,000", middle[1] * 1000, "ms",
         f"{middle[3]:.0f} pulls for {middle[4]:.0f} objects")  # fmt: skip
    show("greatest resident set", middle[2] / 1024, "MiB")


def write_config(base: Path, store: str, table: dict[str, object], **changes: object) -> Path:
    values = {"store": store, "state_directory": str(base / "state"), "disk_reserve": "0"}
    lines = [f"{key} = {json.dumps(value)}" for key, value in {**values, **changes}.items()]
    lines += [f"[{store}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
    path = base / "images.toml"
    path.write_text("\n".join(lines) + "\n")
    return path


def krun(config: Path, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "krun", "images", *words, f"--config={config}"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)
    return done.stderr


def manifest(base: Path, images: list[str]) -> str:
    path = base / "cache.json"
    path.write_text(
        json.dumps(
            {
                "apiVersion": "kubefledged.io/v1alpha2",
                "kind": "ImageCache",
                "metadata": {"name": "bench"},
                "spec": {"cacheSpec": [{"images": images}]},
            }
        )
    )
    return str(path)


@contextmanager
def stores() -> Iterator[dict[str, dict[str, object]]]:
    with ExitStack() as stack:
        yield {
            "podman": stack.enter_context(parts.podman()),
            "docker": stack.enter_context(parts.dockerd()),
            "containerd": stack.enter_context(parts.containerd()),
        }


def refresh() -> None:
    """Refresh 200 images that are all there: nothing is pulled."""
    with ExitStack() as stack:
        base = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="krun-bench-")))
        served = stack.enter_context(parts.registry(base / "r"))
        shared = parts.layer("base", 100_000)
        for number in range(200):
            served.push(f"many/i{number}", "1", [shared, parts.layer(f"l{number}")])
        names = [f"{served.host}/many/i{number}:1" for number in range(200)]
        for name, table in stack.enter_context(stores()).items():
            place = base / name
            place.mkdir()
            config = write_config(place, name, table)
            began = time.monotonic()
            krun(config, "cache", "apply", "-f", manifest(place, names))
            show(f"{name}: first apply of 200 images", time.monotonic() - began, "s")
            times = []
            for _ in range(5):
                began = time.monotonic()
                said = krun(config, "cache", "refresh", "--all")
                times.append(time.monotonic() - began)
                if said:
                    raise RuntimeError(f"a refresh with nothing to do said: {said}")
            show(f"{name}: refresh of 200 images, nothing to do",
                 statistics.median(times) * 1000, "ms")  # fmt: skip


def pulls() -> None:
    """Pull 20 images of shared layers: podman pull in sequence, krun in sequence and parallel."""
    with ExitStack() as stack:
        base = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="krun-bench-")))
        served = stack.enter_context(parts.registry(base / "r"))
        shared = [parts.layer(f"shared{n}", 2_000_000) for n in range(3)]
        for number in range(20):
            own = parts.layer(f"own{number}", 500_000)
            served.push(f"few/i{number}", "1", [*shared, own])
        names = [f"{served.host}/few/i{number}:1" for number in range(20)]

        def podman(table: dict[str, object]) -> None:
            argv = ["podman", f"--root={table['root']}", f"--runroot={table['runroot']}"]
            for name in names:
                subprocess.run([*argv, "pull", "-q", "--tls-verify=false", name], check=True,
                               stdout=subprocess.DEVNULL)  # fmt: skip

        def ours(table: dict[str, object], parallel: int) -> None:
            with tempfile.TemporaryDirectory(prefix="krun-bench-") as folder:
                place = Path(folder)
                config = write_config(place, "podman", table, parallel_pulls=parallel)
                krun(config, "cache", "apply", "-f", manifest(place, names))

        ways: dict[str, Callable[[dict[str, object]], None]] = {
            "podman pull, one after the other": podman,
            "krun, one at a time": lambda table: ours(table, 1),
            "krun, three at a time": lambda table: ours(table, 3),
        }
        times: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(5):
            for way, run in ways.items():
                with parts.podman() as table:
                    times[way].append(timed(lambda run=run, table=table: run(table)))  # type: ignore[misc]
        first = statistics.median(times["podman pull, one after the other"])
        for way, found in times.items():
            middle = statistics.median(found)
            show(f"20 images of shared layers: {way}", middle, "s", f"ratio {middle / first:.2f}")


def hooks() -> None:
    """Run each hook as a runtime does, against the bare interpreter."""
    with tempfile.TemporaryDirectory(prefix="krun-bench-") as folder:
        state = json.dumps(
            {"ociVersion": "1.0", "id": "c", "pid": os.getpid(), "status": "running",
             "bundle": folder, "annotations": {"kontain.app/image": "nginx:1"}}
        )  # fmt: skip
        index = "\n" + "".join(f"docker.io/library/i{n}:1\tsha\tsha\t\n" for n in range(5000))
        Path(folder, "index.tsv").write_text(index)
        ways = {
            "/bin/true": ["/bin/true"],
            "python3 -I -S -c pass": ["/usr/bin/python3", "-I", "-S", "-c", "pass"],
            "krun-image-record": [str(ROOT / "hooks/krun-image-record"), f"--state={folder}"],
            "krun-image-check": [str(ROOT / "hooks/krun-image-check"), f"--state={folder}"],
            "krun-image-prefetch, nothing to do": [
                str(ROOT / "hooks/krun-image-prefetch"), f"--state={folder}"],
        }  # fmt: skip
        times: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(60):
            for way, argv in ways.items():
                began = time.monotonic()
                subprocess.run(argv, input=state.encode(), stderr=subprocess.DEVNULL)
                times[way].append(time.monotonic() - began)
        for way, found in times.items():
            show(way, statistics.median(found) * 1000, "ms", f"least {min(found) * 1000:.1f}")


ALL = {"deciding": deciding, "refresh": refresh, "pulls": pulls, "hooks": hooks}


def main() -> int:
    wanted = sys.argv[1:] or list(ALL)
    if unknown := set(wanted) - set(ALL):
        print(f"no benchmark {sorted(unknown)[0]}; there are {', '.join(ALL)}", file=sys.stderr)
        return 2
    why_not = needs.why_not(*parts.STORES)
    for name in wanted:
        if why_not and name in ("refresh", "pulls"):
            print(f"{name}: skipped, {why_not}")
            continue
        ALL[name]()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
