"""make bench: what krun costs over crun and runc, in one alternating run with hyperfine.

Everything happens in a mount namespace of its own, under a temporary directory; nothing is
written but the table, with --json FILE the raw times, and with --picture FILE bars.  km is the
one that KRUN_TEST_KM names, or the stand-in of tests/km, which opens /dev/kvm and then runs the
payload natively: with it, the numbers are those of everything but the monitor.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from bench import picture  # noqa: E402
from km import build  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import Progress  # noqa: E402
from rich.table import Table  # noqa: E402

NAMESPACE = "KRUN_BENCH_NAMESPACE"
EXIT = ["/payload", "exit", "0"]
WAIT = ["/payload", "wait"]
CAPABILITIES = ["CAP_AUDIT_WRITE", "CAP_KILL", "CAP_NET_BIND_SERVICE"]
IMAGE = "localhost/krun-bench:1"
# What is asked of each column: operation, "+" (milliseconds more than), "×" (times) or "" (as it
# is, in milliseconds), the column compared with, the limit.
TARGETS = {
    "krun": [
        ("create", "+", "crun", 9.0),
        ("run", "+", "crun", 9.0),
        *((verb, "+", "crun", 7.0) for verb in ("start", "state", "kill", "delete", "exec")),
        ("run", "×", "runc", 1.0),
        ("life", "×", "runc", 1.3),
        ("podman run", "×", "crun", 1.15),
    ],
    "krun native, km": [
        ("run", "×", "runc", 0.9),
        ("life", "×", "runc", 1.1),
        ("exec", "×", "runc", 1.0),
        *((verb, "", "", 9.0) for verb in ("start", "state", "kill")),
    ],
}
MOUNTS = [
    {"destination": "/proc", "type": "proc", "source": "proc"},
    {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
    {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs"},
]


class Runtime:
    """A runtime under test: its column's name, its command up to the verb, its bundles."""

    def __init__(self, name: str, command: list[str], bundles: dict[str, Path]) -> None:
        self.name = name
        self.command = command
        self.bundles = bundles
        self.id = f"bench-{name.replace(' ', '-').replace(',', '')}-{os.getpid()}"


def in_namespace() -> None:
    """Go on in a mount namespace without the v2 half of a hybrid layout, which crun refuses."""
    if os.environ.get(NAMESPACE):
        return
    hybrid = os.path.ismount("/sys/fs/cgroup/unified")
    script = "umount /sys/fs/cgroup/unified && " if hybrid else ""
    words = ["unshare", "-m", "--propagation", "private", "sh", "-c", f'{script}exec "$@"', "sh"]
    words += [sys.executable, __file__, *sys.argv[1:]]
    os.execvpe(words[0], words, {**os.environ, NAMESPACE: "yes"})


def bundle(directory: Path, payload: Path, args: list[str]) -> Path:
    """Make a bundle with the payload in it; return its directory."""
    rootfs = directory / "rootfs"
    for name in ("proc", "dev", "tmp", "sys", "etc"):
        (rootfs / name).mkdir(parents=True)
    shutil.copy(payload, rootfs / "payload")
    names = ("pid", "network", "ipc", "uts", "mount")
    sets = dict.fromkeys(("bounding", "effective", "permitted"), CAPABILITIES)
    config = {
        "ociVersion": "1.0.2",
        "process": {
            "user": {"uid": 0, "gid": 0},
            "args": args,
            "env": ["PATH=/"],
            "cwd": "/",
            "capabilities": sets,
            "noNewPrivileges": True,
        },
        "root": {"path": "rootfs", "readonly": False},
        "hostname": "bench",
        "mounts": MOUNTS,
        "linux": {
            "namespaces": [{"type": name} for name in names],
            "resources": {"devices": [{"allow": False, "access": "rwm"}]},
            "maskedPaths": ["/proc/kcore", "/proc/keys"],
            "readonlyPaths": ["/proc/sys", "/proc/sysrq-trigger"],
        },
    }
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def install(directory: Path) -> Path:
    """Install krun below the directory; return the launcher."""
    prefix = directory / "usr"
    words = [sys.executable, "-m", "krun", "install", "--prefix", str(prefix)]
    subprocess.run(words, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return prefix / "bin" / "krun"


def put_km(directory: Path) -> None:
    """Make km appear where krun looks for it, in this mount namespace only."""
    real = os.environ.get("KRUN_TEST_KM")
    km = Path(real).resolve() if real else build.km(directory)
    copy = directory / "km.copy"
    shutil.copy(km, copy)
    os.makedirs("/opt", exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=755", "krun-bench", "/opt"], check=True)
    os.makedirs("/opt/kontain/bin")
    shutil.move(copy, "/opt/kontain/bin/km")


def runtimes(directory: Path, payload: Path) -> list[Runtime]:
    """Return those that work here, crun first; say why one is left out."""
    bundles = {
        "exit": bundle(directory / "exit", payload, EXIT),
        "wait": bundle(directory / "wait", payload, WAIT),
    }
    launcher = install(directory)
    root = str(directory / "state")

    def krun(*words: str) -> list[str]:
        return [str(launcher), "--root", f"{root}-krun", *words]

    wanted = [
        Runtime("crun", [shutil.which("crun") or "crun", "--root", f"{root}-crun"], bundles),
        Runtime("runc", [shutil.which("runc") or "runc", "--root", f"{root}-runc"], bundles),
        Runtime("krun", krun(), bundles),
        Runtime("krun native, km", krun("--engine=native", "--monitor=km"), bundles),
        Runtime("krun native, builtin", krun("--engine=native", "--monitor=builtin"), bundles),
    ]
    found = []
    for runtime in wanted:
        words = [*runtime.command, "run", "--bundle", str(bundles["exit"]), runtime.id]
        done = subprocess.run(words, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if done.returncode:
            why = (done.stderr.strip() or f"status {done.returncode}").splitlines()[-1]
            print(f"{runtime.name} is left out: {why}", file=sys.stderr)
            subprocess.run([*runtime.command, "delete", "--force", runtime.id], capture_output=True)
        else:
            found.append(runtime)
    return found


# A killed init is a zombie until its reaper looks; the runtimes take it for stopped.
GONE = """
read -r pid <"$pidfile"
while read -r _ _ state _ 2>/dev/null </proc/$pid/stat && [ "$state" != Z ]; do :; done
"""


class Operation:
    """What is timed: `command` words, and a script that puts things right before each time."""

    def __init__(self, name: str, script: str, prepare: str = "", cleanup: str = "") -> None:
        self.name = name
        self.script = script
        self.prepare = prepare
        self.cleanup = cleanup


# $r is the runtime with its global options, $id the container, $exit and $wait the bundles.
DELETE = "$r delete --force $id"
CREATE = "$r create --bundle $wait --pid-file $pidfile $id"
START = "$r start $id"
OPERATIONS = [
    Operation("run", "$r run --bundle $exit $id"),
    Operation("life", ""),
    Operation("create", CREATE, DELETE, DELETE),
    Operation("start", START, f"{DELETE}\n{CREATE}", DELETE),
    Operation("state", "$r state $id", f"{DELETE}\n{CREATE}\n{START}", DELETE),
    Operation("kill", "$r kill $id CONT", f"{DELETE}\n{CREATE}\n{START}", DELETE),
    Operation("exec", "$r exec $id /payload exit 0", f"{DELETE}\n{CREATE}\n{START}", DELETE),
    Operation("delete", "$r delete $id", f"{DELETE}\n{CREATE}\n$r kill $id KILL\n{GONE}", DELETE),
]
LIFE = f"{CREATE}\n{START}\n$r state $id\n$r kill $id KILL\n{GONE}\n$r delete $id"
# These leave the container as it was: it is made once, before all times.
ONCE = ("state", "kill", "exec")


def values(runtime: Runtime, directory: Path) -> dict[str, str]:
    """Return what the scripts' variables stand for."""
    return {
        "r": shlex.join(runtime.command),
        "id": runtime.id,
        "exit": str(runtime.bundles["exit"]),
        "wait": str(runtime.bundles["wait"]),
        "pidfile": str(directory / f"{runtime.id}.pid"),
    }


def filled(script: str, table: dict[str, str]) -> str:
    """Return a script with the variables' values in it."""
    for name in sorted(table, key=len, reverse=True):
        script = script.replace(f"${name}", table[name])
    return script


def write_script(path: Path, text: str) -> str:
    """Write an executable script of sh; its output goes nowhere."""
    path.write_text(f"#!/bin/sh\nexec >/dev/null 2>&1\n{text}\n")
    path.chmod(0o755)
    return str(path)


def hyperfine(command: str, runs: int, directory: Path, prepare: str = "") -> list[float]:
    """Return the times of one command in seconds; raises CalledProcessError when it fails."""
    output = directory / "hyperfine.json"
    words = ["hyperfine", "-N", "--runs", str(runs), "--export-json", str(output)]
    if prepare:
        words += ["--prepare", prepare]
    done = subprocess.run([*words, command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command}: {done.stderr.strip()}")
    times: list[float] = json.loads(output.read_text())["results"][0]["times"]
    return times


def commands(operation: Operation, runtime: Runtime, directory: Path) -> tuple[str, str]:
    """Return the timed command and the preparing one for hyperfine."""
    table = values(runtime, directory)
    base = f"{runtime.id}-{operation.name}"
    prepare = ""
    if operation.prepare:
        text = filled(operation.prepare, table)
        prepare = write_script(directory / f"{base}.prepare", text)
    if operation.name == "life":
        return write_script(directory / f"{base}.life", filled(LIFE, table)), prepare
    return filled(operation.script, table), prepare


def time_all(
    found: list[Runtime], directory: Path, rounds: int, runs: int, idle: float
) -> dict[str, dict[str, list[float]]]:
    """Time every operation of every runtime, `rounds` times in turn, `runs` times each.

    `idle` seconds pass before each time: what comes right behind another of its kind may find the
    kernel's waits over (decision 26).
    """
    times: dict[str, dict[str, list[float]]] = {}
    console = Console(stderr=True)
    with Progress(console=console, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("timing", total=len(OPERATIONS) * len(found) * rounds)
        for operation in OPERATIONS:
            row = times.setdefault(operation.name, {})
            failed = set()
            for _ in range(rounds):
                for runtime in found:
                    progress.advance(task)
                    if runtime.name in failed:
                        continue
                    command, prepare = commands(operation, runtime, directory)
                    if operation.name in ONCE:
                        subprocess.run([prepare], check=False)
                        prepare = ""
                    if idle:
                        path = directory / "idle"
                        prepare = write_script(path, f"{prepare}\nsleep {idle:.3f}")
                    try:
                        row.setdefault(runtime.name, [])
                        row[runtime.name] += hyperfine(command, runs, directory, prepare)
                    except RuntimeError as error:
                        failed.add(runtime.name)
                        del row[runtime.name]
                        print(f"{runtime.name}: {operation.name}: {error}", file=sys.stderr)
                    if operation.cleanup:
                        text = filled(operation.cleanup, values(runtime, directory))
                        subprocess.run(shlex.split(text), capture_output=True)
    return times


def time_podman(
    found: list[Runtime], directory: Path, rounds: int, runs: int
) -> dict[str, list[float]]:
    """Time `podman run --rm --network none` with the runtimes that are one program."""
    if not shutil.which("podman"):
        print("podman is not installed: left out", file=sys.stderr)
        return {}
    run = Path(tempfile.mkdtemp(prefix="krb-", dir="/run"))
    base = ["podman", "--root", str(directory / "podman"), "--runroot", str(run)]
    base += ["--cgroup-manager", "cgroupfs"]
    times: dict[str, list[float]] = {}
    try:
        tar = directory / "image.tar"
        rootfs = found[0].bundles["exit"] / "rootfs"
        subprocess.run(["tar", "-C", str(rootfs), "-cf", str(tar), "."], check=True)
        subprocess.run([*base, "import", "-q", str(tar), IMAGE], check=True, capture_output=True)
        limits = ["--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024"]
        for _ in range(rounds):
            for runtime in found:
                if "," in runtime.name:
                    continue
                words = [*base, "--runtime", runtime.command[0], "run", "--rm", *limits]
                words += ["--network", "none", IMAGE, *EXIT]
                try:
                    more = hyperfine(shlex.join(words), runs, directory)
                except RuntimeError as error:
                    print(f"{runtime.name}: podman: {error}", file=sys.stderr)
                    break
                times.setdefault(runtime.name, []).extend(more)
    finally:
        subprocess.run([*base, "rm", "--force", "--all"], capture_output=True)
        subprocess.run([*base, "rmi", "--force", "--all"], capture_output=True)
        subprocess.run([*base, "unmount", "--all"], capture_output=True)
        for place in (directory / "podman" / "overlay", run):
            subprocess.run(["umount", "-l", str(place)], capture_output=True)
        shutil.rmtree(run, ignore_errors=True)
    return times


def peak_memory(found: list[Runtime], directory: Path) -> dict[str, int]:
    """Return the peak memory of `run` in kB, the least of five."""
    helper = build.compile_static(ROOT / "tests" / "bench" / "peak.c", directory / "peak")
    peaks = {}
    for runtime in found:
        words = [str(helper), *runtime.command, "run", "--bundle", str(runtime.bundles["exit"])]
        seen = []
        for _ in range(5):
            done = subprocess.run([*words, runtime.id], capture_output=True, text=True)
            if done.returncode == 0:
                seen.append(int(done.stdout))
        if seen:
            peaks[runtime.name] = min(seen)
    return peaks


def verdicts(column: str, operation: str, medians: dict[str, float]) -> list[str]:
    """Return how a column stands to what is asked of it; medians are in seconds."""
    said = []
    ours = medians.get(column)
    for name, how, base, limit in TARGETS.get(column, []):
        if name != operation or ours is None or (base and base not in medians):
            continue
        if how == "×":
            value, text = ours / medians[base], f"of {limit:g} × {base}"
        else:
            value = (ours - (medians[base] if base else 0)) * 1000
            text = f"of {limit:g} ms" + (f" over {base}" if base else "")
        shown = f"{value:+.2f}" if how == "+" else f"{value:.2f}"
        said.append(f"{shown} {text}{' MISSED' * (value > limit)}")
    return said


def show(names: list[str], times: dict[str, dict[str, list[float]]], peaks: dict[str, int]) -> None:
    """Print medians in ms with their ratios to crun and runc, peak memory, and the verdicts."""
    table = Table(title="medians in ms (× crun, × runc)", title_justify="left")
    table.add_column("operation")
    for name in names:
        table.add_column(name, justify="right")
    judged = [name for name in names if name in TARGETS]
    for name in judged:
        table.add_column(f"{name}: target")
    for operation, row in times.items():
        medians = {name: statistics.median(seen) for name, seen in row.items() if seen}
        cells = []
        for name in names:
            if name not in medians:
                cells.append("–")
                continue
            text = f"{medians[name] * 1000:.1f}"
            bases = [medians.get(base) for base in ("crun", "runc")]
            if name != "crun" and all(bases):
                text += " (" + ", ".join(f"{medians[name] / base:.2f}" for base in bases) + ")"
            cells.append(text)
        cells += ["\n".join(verdicts(name, operation, medians)) for name in judged]
        table.add_row(operation, *cells)
    if peaks:
        cells = [f"{peaks[name] / 1024:.1f} MB" if name in peaks else "–" for name in names]
        table.add_row("peak memory of run", *cells)
    Console(width=None if sys.stdout.isatty() else 240).print(table)


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, prog="make bench")
    parser.add_argument("--rounds", type=int, default=5, help="alternations (default 5)")
    parser.add_argument("--runs", type=int, default=8, help="times a round (default 8)")
    parser.add_argument(
        "--idle", type=float, default=0.0, help="seconds of rest before each time (default 0)"
    )
    parser.add_argument("--picture", metavar="FILE", help="draw the medians (SVG)")
    parser.add_argument("--json", metavar="FILE", help="write every time, in seconds")
    parser.add_argument("--only", metavar="OPERATION", nargs="*", help="these operations alone")
    parser.add_argument("--runtimes", metavar="NAME", nargs="*", help="these runtimes alone")
    options = parser.parse_args()
    if os.geteuid() != 0:
        print("make bench: needs root, as runc and crun are compared as root", file=sys.stderr)
        return 1
    in_namespace()
    if options.only:
        OPERATIONS[:] = [one for one in OPERATIONS if one.name in options.only]
    with tempfile.TemporaryDirectory(prefix="krun-bench-") as name:
        directory = Path(name)
        put_km(directory)
        found = runtimes(directory, build.payload(directory))
        if options.runtimes:
            found = [one for one in found if one.name in options.runtimes]
        times = time_all(found, directory, options.rounds, options.runs, options.idle)
        if not options.only or "podman" in options.only:
            podman = time_podman(found, directory, options.rounds, max(2, options.runs // 3))
            if podman:
                times["podman run"] = podman
        peaks = peak_memory(found, directory)
    show([runtime.name for runtime in found], times, peaks)
    if options.picture:
        medians = {
            operation: {name: statistics.median(seen) * 1000 for name, seen in row.items() if seen}
            for operation, row in times.items()
        }
        Path(options.picture).write_text(picture.bars(medians, "ms"))
    if options.json:
        Path(options.json).write_text(json.dumps({"seconds": times, "peak_kB": peaks}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
