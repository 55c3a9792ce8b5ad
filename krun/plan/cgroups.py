"""linux.resources -> the values for the files of cgroup v1 or v2 controllers."""

from __future__ import annotations

from krun.errors import BadSpec
from krun.plan.model import Cgroup, Write

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from krun.plan.model import Rule

_THROTTLE = (
    ("throttleReadBpsDevice", "blkio.throttle.read_bps_device", "rbps"),
    ("throttleWriteBpsDevice", "blkio.throttle.write_bps_device", "wbps"),
    ("throttleReadIOPSDevice", "blkio.throttle.read_iops_device", "riops"),
    ("throttleWriteIOPSDevice", "blkio.throttle.write_iops_device", "wiops"),
)


def plan_cgroup(
    identifier: str,
    path: str,
    version: int,
    resources: dict[str, Any],
    rules: tuple[Rule, ...],
    *,
    systemd: dict[str, str] | None = None,
    realtime: bool = False,
) -> Cgroup:
    """Return the cgroup of a container: its path, its values for that version, its devices.

    systemd, when it is to make the cgroup, are the container's annotations.
    """
    writes = tuple(plan_writes(version, resources))
    unit = None
    if systemd is not None:
        from krun.plan.units import plan_unit

        unit = plan_unit(
            path, identifier, version=version, writes=writes, rules=rules, annotations=systemd
        )
    unlimited = not (resources.get("cpu") or {}).get("realtimeRuntime")
    return Cgroup(path or identifier, version, writes, rules, unit, realtime and unlimited)


def plan_writes(version: int, resources: dict[str, Any]) -> list[Write]:
    """Return the values of linux.resources; raises BadSpec for what the version cannot do."""
    writes: list[Write] = []
    table = _V2 if version == 2 else _V1
    for name, plan in table:
        section = resources.get(name)
        if section:
            plan(section, writes)
    unified = resources.get("unified")
    if unified:
        if version != 2:
            raise BadSpec(
                "linux.resources.unified", "invalid configuration: cannot use unified on cgroup v1"
            )
        for file, value in unified.items():
            if "/" in file or "." not in file:
                # crun's words, which its callers look for.
                text = f"the specified key has not the form CONTROLLER.VALUE `{file}`"
                raise BadSpec("linux.resources.unified", text)
            writes.append(Write(file.partition(".")[0], file, value))
    return writes


def _limit(value: int) -> str:
    return "max" if value < 0 else str(value)


def _memory_v1(memory: dict[str, Any], writes: list[Write]) -> None:
    limit, swap = memory.get("limit"), memory.get("swap")
    if limit:
        writes.append(Write("memory", "memory.limit_in_bytes", str(limit)))
    if swap:
        writes.append(Write("memory", "memory.memsw.limit_in_bytes", str(swap)))
    for key, file in (
        ("reservation", "memory.soft_limit_in_bytes"),
        ("kernelTCP", "memory.kmem.tcp.limit_in_bytes"),
    ):
        if memory.get(key):
            writes.append(Write("memory", file, str(memory[key])))
    if memory.get("swappiness") is not None:
        writes.append(Write("memory", "memory.swappiness", str(memory["swappiness"])))
    if memory.get("disableOOMKiller"):
        writes.append(Write("memory", "memory.oom_control", "1"))


def _memory_v2(memory: dict[str, Any], writes: list[Write]) -> None:
    limit, swap = memory.get("limit"), memory.get("swap")
    if limit:
        writes.append(Write("memory", "memory.max", _limit(limit)))
    if swap:
        # v2 counts swap alone, the specification memory and swap together.
        if swap > 0 and not limit:
            raise BadSpec("linux.resources.memory.swap", "needs memory.limit")
        if limit and swap > 0 and limit > 0:
            if swap < limit:
                where = "linux.resources.memory.swap"
                raise BadSpec(where, "must not be less than memory.limit")
            swap -= limit
        writes.append(Write("memory", "memory.swap.max", _limit(swap)))
    if memory.get("reservation"):
        writes.append(Write("memory", "memory.low", _limit(memory["reservation"])))


def _cpu_v1(cpu: dict[str, Any], writes: list[Write]) -> None:
    for controller, key, file in (
        ("cpu", "shares", "cpu.shares"),
        ("cpu", "period", "cpu.cfs_period_us"),
        ("cpu", "quota", "cpu.cfs_quota_us"),
        ("cpu", "burst", "cpu.cfs_burst_us"),
        ("cpu", "realtimePeriod", "cpu.rt_period_us"),
        ("cpu", "realtimeRuntime", "cpu.rt_runtime_us"),
        ("cpu", "idle", "cpu.idle"),
        ("cpuset", "cpus", "cpuset.cpus"),
        ("cpuset", "mems", "cpuset.mems"),
    ):
        value = cpu.get(key)
        if value or (key == "idle" and value is not None):
            writes.append(Write(controller, file, str(value)))


def weight_of_shares(shares: int) -> int:
    """Return cpu.weight (1 to 10000) for cpu.shares (2 to 262144), as runc and crun map them."""
    return 1 + (min(max(shares, 2), 262144) - 2) * 9999 // 262142


def _cpu_v2(cpu: dict[str, Any], writes: list[Write]) -> None:
    idle = cpu.get("idle")
    if idle is not None:
        writes.append(Write("cpu", "cpu.idle", str(idle)))
    if cpu.get("shares") and not idle:
        writes.append(Write("cpu", "cpu.weight", str(weight_of_shares(cpu["shares"]))))
    quota, period = cpu.get("quota"), cpu.get("period")
    if quota or period:
        text = str(quota) if quota and quota > 0 else "max"
        writes.append(Write("cpu", "cpu.max", f"{text} {period}" if period else text))
    if cpu.get("burst") is not None:
        writes.append(Write("cpu", "cpu.max.burst", str(cpu["burst"])))
    if cpu.get("realtimePeriod") or cpu.get("realtimeRuntime"):
        raise BadSpec("linux.resources.cpu.realtimeRuntime", "does not exist in cgroup v2")
    for key in ("cpus", "mems"):
        if cpu.get(key):
            writes.append(Write("cpuset", f"cpuset.{key}", cpu[key]))


def _pids(pids: dict[str, Any], writes: list[Write]) -> None:
    limit = pids.get("limit", 0)
    if limit is not None:
        writes.append(Write("pids", "pids.max", "max" if limit <= 0 else str(limit)))


def _block_io_v1(io: dict[str, Any], writes: list[Write]) -> None:
    for key, file in (("weight", "blkio.weight"), ("leafWeight", "blkio.leaf_weight")):
        if io.get(key):
            writes.append(Write("blkio", file, str(io[key])))
    for device in io.get("weightDevice") or ():
        name = f"{device['major']}:{device['minor']}"
        for key, file in (
            ("weight", "blkio.weight_device"),
            ("leafWeight", "blkio.leaf_weight_device"),
        ):
            if device.get(key):
                writes.append(Write("blkio", file, f"{name} {device[key]}"))
    for key, file, _ in _THROTTLE:
        for device in io.get(key) or ():
            value = f"{device['major']}:{device['minor']} {device['rate']}"
            writes.append(Write("blkio", file, value))


def _block_io_v2(io: dict[str, Any], writes: list[Write]) -> None:
    if io.get("weight"):
        writes.append(Write("io", "io.bfq.weight", str(io["weight"])))
    for device in io.get("weightDevice") or ():
        if device.get("weight"):
            value = f"{device['major']}:{device['minor']} {device['weight']}"
            writes.append(Write("io", "io.bfq.weight", value))
    for key, _, name in _THROTTLE:
        for device in io.get(key) or ():
            value = f"{device['major']}:{device['minor']} {name}={device['rate']}"
            writes.append(Write("io", "io.max", value))


def _hugepages_v1(limits: list[dict[str, Any]], writes: list[Write]) -> None:
    for limit in limits:
        file = f"hugetlb.{limit['pageSize']}.limit_in_bytes"
        writes.append(Write("hugetlb", file, str(limit["limit"])))


def _hugepages_v2(limits: list[dict[str, Any]], writes: list[Write]) -> None:
    for limit in limits:
        writes.append(Write("hugetlb", f"hugetlb.{limit['pageSize']}.max", str(limit["limit"])))


def _network(network: dict[str, Any], writes: list[Write]) -> None:
    if network.get("classID"):
        writes.append(Write("net_cls", "net_cls.classid", str(network["classID"])))
    for priority in network.get("priorities") or ():
        value = f"{priority['name']} {priority['priority']}"
        writes.append(Write("net_prio", "net_prio.ifpriomap", value))


def _rdma(rdma: dict[str, Any], writes: list[Write]) -> None:
    for device, limits in rdma.items():
        parts = [
            f"{name}={limits[key]}"
            for key, name in (("hcaHandles", "hca_handle"), ("hcaObjects", "hca_object"))
            if limits.get(key) is not None
        ]
        if parts:
            writes.append(Write("rdma", "rdma.max", f"{device} {' '.join(parts)}"))


def _no_network(network: dict[str, Any], writes: list[Write]) -> None:
    if network.get("classID") or network.get("priorities"):
        raise BadSpec("linux.resources.network", "does not exist in cgroup v2")


if TYPE_CHECKING:
    _Table = tuple[tuple[str, Callable[[Any, list[Write]], None]], ...]

_V1: _Table = (
    ("memory", _memory_v1),
    ("cpu", _cpu_v1),
    ("pids", _pids),
    ("blockIO", _block_io_v1),
    ("hugepageLimits", _hugepages_v1),
    ("network", _network),
    ("rdma", _rdma),
)
_V2: _Table = (
    ("memory", _memory_v2),
    ("cpu", _cpu_v2),
    ("pids", _pids),
    ("blockIO", _block_io_v2),
    ("hugepageLimits", _hugepages_v2),
    ("network", _no_network),
    ("rdma", _rdma),
)
