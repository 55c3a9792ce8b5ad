"""make endure: ten thousand starts right after create, and the cost beside 500 containers.

The handshake is what a client does with two processes, without their interpreters: create and
start of the library, in one process, so that nothing lies between the two.  A race shows as a
start that fails, that hangs, or whose payload does not end with 0.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
ROOT = TESTS.parent
sys.path[:0] = [str(ROOT), str(TESTS)]

from native_parts import Native, configuration  # noqa: E402

from krun import launch, native, removal  # noqa: E402
from krun.jsontext import loads  # noqa: E402
from krun.linux import cgroupfs  # noqa: E402
from krun.plan.build import build  # noqa: E402

LIVE = (1, 10, 50, 100, 200, 300, 400, 500)
VERBS = ("run --detach", "state", "exec", "kill", "delete")


def handshakes(engine: Native, count: int) -> None:
    """Create, start, wait and delete, so many times; ends at the first that goes wrong."""
    engine.write(configuration("/bin/true"))
    spec = loads((engine.bundle / "config.json").read_text())
    root, times = str(engine.root), []
    begun = time.monotonic()
    for number in range(count):
        name = f"endure-{os.getpid()}-{number}"
        plan = build(spec, name, str(engine.bundle), cgroupfs.version())
        before = time.monotonic()
        born = launch.create(root, plan, spec, launch.Options())
        native.start(root, name)
        times.append(time.monotonic() - before)
        _, status = os.waitpid(born.state.pid, 0)
        if status:
            raise SystemExit(f"handshake {number}: the payload ended with {status}")
        removal.delete(root, name, False)
        if (number + 1) % 1000 == 0:
            print(f"  {number + 1} of {count}", file=sys.stderr, flush=True)
    whole = time.monotonic() - begun
    times.sort()
    print(f"{count} handshakes in {whole:.0f} s, none failed")
    middle, late = statistics.median(times), times[len(times) * 99 // 100]
    print(
        f"create and start: {middle * 1000:.1f} ms in the median, {late * 1000:.1f} in 99 of 100, "
        f"{times[-1] * 1000:.1f} at most"
    )


def measure(engine: Native, samples: int) -> dict[str, float]:
    """Return the median milliseconds of each verb for one container more."""
    times: dict[str, list[float]] = {verb: [] for verb in VERBS}
    for _ in range(samples):
        name = engine.name()
        for verb, words in (
            ("run --detach", ("run", "--detach", "--bundle", engine.bundle, name)),
            ("state", ("state", name)),
            ("exec", ("exec", name, "true")),
            ("kill", ("kill", name, "KILL")),
            ("delete", ("delete", "--force", name)),
        ):
            before = time.monotonic()
            engine(*words, stdout=subprocess.DEVNULL)
            times[verb].append((time.monotonic() - before) * 1000)
    return {verb: statistics.median(found) for verb, found in times.items()}


def live(engine: Native, samples: int) -> None:
    """Print what verbs cost beside more and more running containers."""
    engine.write(configuration("sleep", "100000"))
    measure(engine, 2)
    print("| live | " + " | ".join(VERBS) + " |")
    print("|---" * (len(VERBS) + 1) + "|")
    names: list[str] = []
    for count in LIVE:
        while len(names) < count:
            names.append(engine.name())
            words = ("run", "--detach", "--bundle", engine.bundle, names[-1])
            engine(*words, stdout=subprocess.DEVNULL)
        medians = measure(engine, samples)
        print(
            f"| {count} | " + " | ".join(f"{medians[verb]:.1f}" for verb in VERBS) + " |",
            flush=True,
        )
    before = time.monotonic()
    for name in names:
        engine("delete", "--force", name)
    print(f"{len(names)} deleted in {time.monotonic() - before:.1f} s")


def main() -> int:
    """Run both; nothing may be left."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--handshakes", type=int, default=10_000)
    parser.add_argument("--samples", type=int, default=15, help="of each verb (default 15)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="krun-endure-") as directory:
        engine = Native(Path(directory) / "native")
        try:
            if options.handshakes:
                handshakes(engine, options.handshakes)
            if options.samples:
                live(engine, options.samples)
        finally:
            engine.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
