"""What may be mounted over procfs: next to nothing."""

from __future__ import annotations

from krun.errors import KrunError
from krun.linux import flags as k
from krun.linux.mount import filesystem_type

TYPE_CHECKING = False
if TYPE_CHECKING:
    from krun.plan.model import Mount

# Files of /proc that may be replaced one by one (lxcfs and the like do); anything else below
# /proc would let a volume stand for what the kernel says (CVE-2019-16884, CVE-2019-19921).
PROC_REPLACEABLE = (
    "/proc/cpuinfo",
    "/proc/diskstats",
    "/proc/meminfo",
    "/proc/stat",
    "/proc/swaps",
    "/proc/uptime",
    "/proc/loadavg",
    "/proc/slabinfo",
    "/proc/net/dev",
    "/proc/sys/kernel/ns_last_pid",
    "/proc/sys/crypto/fips_enabled",
)


def refuse_over_proc(one: Mount, target: int, tree: int) -> None:
    """Refuse a mount that would stand for what procfs says, however its path was spelt."""
    if filesystem_type(target) == k.PROC_SUPER_MAGIC:
        if one.destination in PROC_REPLACEABLE:
            return
        if filesystem_type(tree) == k.PROC_SUPER_MAGIC:
            return
        raise KrunError(f"mount {one.source} on {one.destination}: it is inside /proc")
    if one.destination == "/proc" and filesystem_type(tree) != k.PROC_SUPER_MAGIC:
        raise KrunError(f"mount {one.source} on /proc: only procfs may be there")


def refuse_inside_proc(one: Mount, target: int) -> None:
    """Refuse a new file system where a link of the image leads into procfs (CVE-2019-19921)."""
    if one.fstype != "proc" and filesystem_type(target) == k.PROC_SUPER_MAGIC:
        raise KrunError(f"mount {one.fstype} on {one.destination}: it is inside /proc")
