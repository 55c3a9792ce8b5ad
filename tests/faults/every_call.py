"""Kill and fail krun at its system calls, one after the other, and look for what is left.

    python tests/faults/every_call.py [--every N] [--verb create] [--fault KILL]

Each point is one run of a verb under strace's fault injection; afterwards `delete --force` must
succeed, and no process, cgroup, mount or file of the container may be left.  The calls that load
Python's modules change nothing and are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import installed
from native_parts import Native, configuration

VERBS = ("create", "start", "exec", "delete")
FAULTS = ("KILL", "ENOSPC", "EMFILE", "EPERM", "EINTR")
# Calls whose first use marks the end of loading modules.
FIRST = {"create": "mkdir", "start": "flock", "exec": "pidfd_open", "delete": "pidfd_open"}
# Only calls that can fail so are made to: an EPERM from exit_group says nothing.
FAILING = {
    "ENOSPC": ("write", "mkdir", "openat", "fsync", "mknod", "mknodat", "rename", "pwrite64"),
    "EMFILE": ("openat", "pipe2", "dup", "socket", "memfd_create", "pidfd_open"),
    "EPERM": ("openat", "write", "mkdir", "mount", "clone", "clone3", "unlink", "rmdir", "rename"),
    "EINTR": ("openat", "write", "read", "wait4", "poll"),
}


class Failure(Exception):
    """What a fault left behind."""


def prepare(native: Native, verb: str) -> tuple[str, list[str]]:
    """Bring a container to where the verb begins; returns its id and the verb's words."""
    native.write(configuration("sleep", "1000"))
    name = native.name()
    if verb == "create":
        return name, ["create", "--bundle", str(native.bundle), name]
    native("create", "--bundle", native.bundle, name, stdout=subprocess.DEVNULL)
    if verb == "start":
        return name, ["start", name]
    native("start", name)
    if verb == "exec":
        return name, ["exec", name, "true"]
    return name, ["delete", "--force", name]


def under_strace(
    native: Native, words: list[str], *options: str, output: str = "/dev/null"
) -> subprocess.CompletedProcess[bytes]:
    command = ["strace", "-qq", "-o", output, *options, *native.words, *words]
    # Not pipes: a waiting init would hold them open.
    log = native.directory / "output"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, start_new_session=True
        )
        try:
            status = process.wait(40)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise Failure(f"hangs: {' '.join(options)}") from None
    return subprocess.CompletedProcess(command, status, log.read_bytes(), b"")


def calls_of(native: Native, verb: str) -> list[str]:
    """Return the names of the system calls of a verb's main process, in order.

    Loading a module, and the one-byte write of a signal's number to the interpreter's own pipe
    (which cannot fail so), are marked with "!" and only killed at.
    """
    name, words = prepare(native, verb)
    trace = native.directory / "trace"
    under_strace(native, words, output=str(trace))
    native("delete", "--force", name)
    calls = []
    for line in trace.read_text().splitlines():
        found = re.match(r"(\w+)\(", line)
        if found:
            harmless = (
                "python3" in line
                or str(installed.prefix()) in line
                or bool(re.search(r", 1\)\s+= 1$", line))
            )
            calls.append(found[1] if not harmless else f"{found[1]}!")
    return calls


def check(native: Native, name: str, said: bytes) -> None:
    """Delete the container by force and look for remains."""
    if b"traceback" in said.lower():
        raise Failure(f"a traceback: {said.decode(errors='replace')[-600:]}")
    directory = native.root / name
    for path in directory.glob("*.json") if directory.exists() else ():
        json.loads(path.read_text())
    done = native("delete", "--force", name, status=None)
    if done.returncode:
        raise Failure(f"delete --force ends with {done.returncode}: {done.stderr}")
    end = time.monotonic() + 20
    while left := native.left() + processes(name, native):
        if time.monotonic() > end:
            raise Failure(f"left behind: {left}")
        time.sleep(0.02)


def processes(name: str, native: Native) -> list[str]:
    """Return processes in the container's cgroup or with its root."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            stat = (entry / "stat").read_text(errors="replace")
            if stat[stat.rindex(")") + 2] == "Z":
                continue
            if name in (entry / "cgroup").read_text(errors="replace") or name in (
                entry / "cmdline"
            ).read_bytes().decode(errors="replace"):
                found.append(f"{entry} {(entry / 'cmdline').read_bytes()!r}")
        except OSError:
            continue
    return found


def points(calls: list[str], verb: str, fault: str) -> list[tuple[str, int]]:
    """Return what strace is to inject at: a set of calls, and which of them."""
    start = calls.index(FIRST[verb]) if FIRST[verb] in calls else 0
    answer = []
    seen: dict[str, int] = {}
    for position, marked in enumerate(calls):
        name = marked.rstrip("!")
        if marked != name and fault != "KILL":
            seen[name] = seen.get(name, 0) + 1
            continue
        seen[name] = seen.get(name, 0) + 1
        if position < start:
            continue
        if fault == "KILL" or name in FAILING[fault]:
            answer.append((name, seen[name]))
    return answer


def one_point(native: Native, verb: str, fault: str, point: tuple[str, int]) -> None:
    """Inject one fault; raises Failure with what it left."""
    call, number = point
    name, words = prepare(native, verb)
    effect = "signal=KILL" if fault == "KILL" else f"error={fault}"
    try:
        done = under_strace(
            native, words, "-e", f"trace={call}", "-e", f"inject={call}:{effect}:when={number}"
        )
        check(native, name, done.stdout)
    except Failure as failure:
        raise Failure(f"{verb}, {fault} at {call} #{number}: {failure}") from None
    finally:
        native.names.remove(name)


def run(directory: Path, verb: str, fault: str, every: int) -> tuple[int, list[str]]:
    """Go through every n-th point of a verb; returns how many, and the failures."""
    native = Native(directory)
    failures = []
    count = 0
    try:
        for point in points(calls_of(native, verb), verb, fault)[::every]:
            count += 1
            try:
                one_point(native, verb, fault, point)
            except Failure as failure:
                failures.append(str(failure))
    finally:
        for name in native.names:
            native("delete", "--force", name, status=None)
        shutil.rmtree(directory, ignore_errors=True)
    return count, failures


def main() -> int:
    """Run the harness and print the counts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--every", type=int, default=1, help="only every n-th point")
    parser.add_argument("--verb", choices=VERBS, action="append")
    parser.add_argument("--fault", choices=FAULTS, action="append")
    given = parser.parse_args()
    total = failed = 0
    for verb in given.verb or VERBS:
        for fault in given.fault or FAULTS:
            with tempfile.TemporaryDirectory(prefix="krun-faults-") as place:
                Path(place).chmod(0o755)
                count, failures = run(Path(place) / "native", verb, fault, given.every)
            total += count
            failed += len(failures)
            print(f"{verb:8}{fault:8}{count:5} points {len(failures):4} failures", flush=True)
            for failure in failures:
                print(f"    {failure}", flush=True)
    print(f"{total} points, {failed} failures")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
