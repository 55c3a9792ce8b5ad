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
            _write_limit(directory, one)
        except FileNotFoundError as error:
            if one.file in ("blkio.weight", "blkio.weight_device") or one.file.startswith(
                "io.bfq.weight"
            ):
                _write_weight(directory, one)
                continue
            if tolerant or one.value in ("max", "0"):
                continue
            text = f"cgroup: cannot set {one.file} to {one.value}"
            hint = f"the {one.controller} controller is not available"
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
        _write_limit(place_of(one.controller, places), one)


def _write_limit(directory: str, one: Write) -> None:
    try:
        write(f"{directory}/{one.file}", one.value)
    except OSError as error:
        # v1 refuses a memory limit above the swap limit; -1 lifts the latter first (update).
        swap = f"{directory}/memory.memsw.limit_in_bytes"
        if (
            one.file != "memory.limit_in_bytes"
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
