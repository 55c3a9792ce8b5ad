"""What the built-in monitor costs: start to exit, one system call, memory, growth.

Run as a user of /dev/kvm: `python tests/bench/builtin.py [ROUNDS]`; KRUN_TEST_KM=/path/to/km
adds the real km.  Variants alternate in one run; medians, minima and ratios are printed.
"""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

from km import build  # noqa: E402

PYTHON = ["/usr/bin/python3", "-I", "-S"]
MAIN = f"import sys; sys.path.insert(0, {str(TESTS.parent)!r}); from krun.__main__ import main; "
MAIN += "sys.exit(main(sys.argv[1:]))"
MONITOR = [*PYTHON, "-c", MAIN, "monitor"]
CALLS = 4000


def taken(*command: object) -> float:
    """Milliseconds from start to exit."""
    start = time.perf_counter()
    done = subprocess.run([str(word) for word in command], stdout=subprocess.DEVNULL)
    if done.returncode:
        raise RuntimeError(f"{command}: status {done.returncode}")
    return (time.perf_counter() - start) * 1e3


def resident(*command: object) -> int:
    """Resident KiB of a payload that waits."""
    with subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{child.pid}/status").read_text())
        child.kill()
    assert found
    return int(found[1])


def growth(program: Path) -> tuple[int, int]:
    """Resident KiB after some and after a million system calls, from the same process."""
    with subprocess.Popen([*MONITOR, program, "calls", "1000000"]) as child:
        status = Path(f"/proc/{child.pid}/status")
        time.sleep(0.3)
        sizes = []
        while child.poll() is None:
            found = re.search(r"VmRSS:\s+(\d+)", status.read_text())
            if found:
                sizes.append(int(found[1]))
            time.sleep(0.1)
    return sizes[0], sizes[-1]


def main() -> None:
    """Measure and print."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 15
    with tempfile.TemporaryDirectory() as directory:
        program = build.compile_static(
            TESTS / "payloads" / "builtin.c", Path(directory) / "payload", *build.FREESTANDING
        )
        runners: dict[str, list[object]] = {
            "native": [],
            "built-in, ring 3": list(MONITOR),
            "built-in, ring 0": [*MONITOR, "--ring", "0"],
        }
        km = os.environ.get("KRUN_TEST_KM")
        if km:
            runners["km"] = [km]
        starts: dict[str, list[float]] = {"python3 -I -S -c pass": []}
        calls: dict[str, list[float]] = {}
        for _ in range(rounds):
            starts["python3 -I -S -c pass"].append(taken(*PYTHON, "-c", "pass"))
            for name, words in runners.items():
                first = taken(*words, program, "hello")
                starts.setdefault(name, []).append(first)
                many = taken(*words, program, "calls", CALLS)
                none = taken(*words, program, "calls", 0)
                calls.setdefault(name, []).append((many - none) / CALLS * 1e3)
        print(f"start to exit of hello, {rounds} rounds      median    least  (ms)")
        for name, times in starts.items():
            print(f"  {name:<36} {statistics.median(times):>8.1f} {min(times):>8.1f}")
        print("one getpid                              median    least  (µs)")
        for name, times in calls.items():
            print(f"  {name:<36} {statistics.median(times):>8.1f} {min(times):>8.1f}")
        if km:
            base = min(calls["km"])
            for name in ("built-in, ring 3", "built-in, ring 0"):
                print(f"  {name}: {min(calls[name]) / base:.2f} times km's least")
        bare = resident(*PYTHON, "-c", "import time; print(1, flush=True); time.sleep(60)")
        mine = resident(*MONITOR, program, "wait")
        print(f"resident: python alone {bare} KiB, monitor and payload {mine} KiB")
        early, late = growth(program)
        print(f"resident while a million calls are made: {early} KiB early, {late} KiB late")


if __name__ == "__main__":
    main()
