"""A cgroup's limits: the values a plan writes, and what the kernel killed because of them."""

from __future__ import annotations

import errno
import os

from krun.errors import KrunError
from krun.linux.cgroupfs import DENIED, Directory, place_of, read, write

TYPE_CHECKING = False
if TYPE_CHECKING:
    from krun.plan.model import Write

_PERIOD = "cpu.cfs_period_us"
_SWAP = "memory.memsw.limit_in_bytes"
_RT_RUNTIME, _RT_PERIOD = "cpu.rt_runtime_us", "cpu.rt_period_us"
# Microseconds of a period below which a share is as good as none.
_RT_LEAST = 1000


def apply(writes: tuple[Write, ...], places: tuple[Directory, ...], tolerant: bool = False) -> None:
    """Write the values of a plan; raises KrunError for a controller that is not there."""
    late: list[Write] = []
    for wanted in writes:
        one = wanted
        directory = place_of(one.controller, places)
        if one.controller == "hugetlb" and os.path.exists(f"{directory}/cgroup.controllers"):
            # On a hybrid machine this controller may be left to v2, which names the file so.
            one = one._replace(file=one.file.replace(".limit_in_bytes", ".max"))
        path = f"{directory}/{one.file}"
        try:
            if not directory:
                raise FileNotFoundError(errno.ENOENT, "no such controller", path)
            _write_limit(directory, one, lift=any(other.file == _SWAP for other in writes))
        except FileNotFoundError as error:
            if one.file in ("blkio.weight", "blkio.weight_device") or one.file.startswith(
                "io.bfq.weight"
            ):
                _write_weight(directory, one)
                continue
            # No limit needs no controller; 0 of a cpuset is the first CPU.
            if tolerant or one.value == "max" or (one.value == "0" and one.controller != "cpuset"):
                continue
            text = f"cgroup: cannot set {one.file} to {one.value}"
            # crun's words, which podman's users know.
            hint = f"the requested cgroup controller `{one.controller}` is not available"
            raise KrunError(text, hint) from error
        except OSError as error:
            if tolerant and error.errno in DENIED:
                continue
            if one.file == _PERIOD and error.errno == errno.EINVAL and one is not writes[-1]:
                # With the old quota it is more than the cgroup above has: the new quota first.
                late.append(one)
                continue
            raise
    for one in late:
        _write_limit(place_of(one.controller, places), one, lift=False)


def give_realtime(places: tuple[Directory, ...]) -> None:
    """Give the cpu cgroup half of the real-time share that the one above it has left, or less.

    Without a share v1 takes no task of a real-time policy (sched-rt-group.rst), where the kernel
    is built for shares; v2 has none.
    """
    directory = place_of("cpu", places)
    path = f"{directory}/{_RT_RUNTIME}"
    if not os.path.exists(path) or _realtime_share(directory):
        return
    above = os.path.dirname(directory)
    others = [entry.path for entry in os.scandir(above) if entry.is_dir(follow_symlinks=False)]
    share = _realtime_share(above) - sum(_realtime_share(other) for other in others)
    period = int(read(f"{directory}/{_RT_PERIOD}"))
    while (runtime := int(share / 2 * period)) >= _RT_LEAST:
        try:
            write(path, str(runtime))
            return
        except OSError as error:
            if error.errno in DENIED:
                # Not this user's to give: the scheduling policy fails with its own error.
                return
            if error.errno != errno.EINVAL:
                raise
        # Others took theirs meanwhile, or one that was removed has still its own.
        share /= 2


def _realtime_share(directory: str) -> float:
    """Return the part of a CPU's time that real-time tasks of a cgroup may take; 0 for none."""
    try:
        runtime, period = (int(read(f"{directory}/{name}")) for name in (_RT_RUNTIME, _RT_PERIOD))
    except OSError:
        return 0
    return 1 if runtime < 0 else runtime / period


def _write_limit(directory: str, one: Write, lift: bool) -> None:
    """Write a limit; lift tells that another swap limit follows."""
    try:
        write(f"{directory}/{one.file}", one.value)
    except OSError as error:
        # v1 refuses a memory limit above the swap limit; -1 lifts the latter first (update).
        swap = f"{directory}/{_SWAP}"
        if (
            not (lift or one.value == "-1")
            or one.file != "memory.limit_in_bytes"
            or error.errno != errno.EINVAL
            or not os.path.exists(swap)
        ):
            raise
        write(swap, "-1")
        write(f"{directory}/{one.file}", one.value)


def _write_weight(directory: str, one: Write) -> None:
    """Write a block I/O weight where the scheduler in use has its file."""
    if one.controller == "blkio":
        names = (one.file.replace("blkio.weight", "blkio.bfq.weight"),)
        value = one.value
    else:
        names = ("io.weight",)
        # io.weight is 1 to 10000, the specification's weight 10 to 1000.
        device, _, weight = one.value.rpartition(" ")
        scaled = 1 + (int(weight) - 10) * 9999 // 990
        value = f"{device} {scaled}" if device else f"default {scaled}"
    for name in names:
        if directory and os.path.exists(f"{directory}/{name}"):
            write(f"{directory}/{name}", value)
            return


def oom_kills(places: tuple[Directory, ...]) -> int:
    """Return how many processes the kernel killed for lack of memory."""
    directory = place_of("memory", places)
    for name in ("memory.oom_control", "memory.events"):
        try:
            for line in read(f"{directory}/{name}").splitlines():
                key, _, value = line.partition(" ")
                if key == "oom_kill":
                    return int(value)
        except OSError:
            continue
    return 0
