"""ps, update and events of the native engine: what looks at or changes a running container."""

from __future__ import annotations

import os
import sys

from krun import jsontext, store
from krun.errors import BadState, KrunError
from krun.linux import cgroupfs, proc
from krun.plan.cgroups import plan_writes
from krun.plan.process import cpu_list

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def pids(state: store.State) -> list[int]:
    """Return the processes of a container."""
    directory = cgroupfs.main_directory(state.cgroup)
    return sorted(set(cgroupfs.processes(directory))) if directory else []


def ps(state: store.State, form: str, options: list[str]) -> int:
    """Print the processes: ids as JSON, or the lines of ps(1) that are the container's."""
    return show(pids(state), form, options)


def show(found: list[int], form: str, options: list[str]) -> int:
    """Print processes, see ps."""
    if form == "json":
        sys.stdout.write(jsontext.dumps(found) + "\n")
        return 0
    from krun import processes

    return processes.columns({str(pid) for pid in found}, options)


# Options of update: where their value goes in linux.resources.
_UPDATE = {
    "blkio_weight": ("blockIO", "weight"),
    "cpu_period": ("cpu", "period"),
    "cpu_quota": ("cpu", "quota"),
    "cpu_burst": ("cpu", "burst"),
    "cpu_share": ("cpu", "shares"),
    "cpu_rt_period": ("cpu", "realtimePeriod"),
    "cpu_rt_runtime": ("cpu", "realtimeRuntime"),
    "cpu_idle": ("cpu", "idle"),
    "cpuset_cpus": ("cpu", "cpus"),
    "cpuset_mems": ("cpu", "mems"),
    "kernel_memory_tcp": ("memory", "kernelTCP"),
    "memory": ("memory", "limit"),
    "memory_reservation": ("memory", "reservation"),
    "memory_swap": ("memory", "swap"),
    "pids_limit": ("pids", "limit"),
}
_TEXT = ("cpuset_cpus", "cpuset_mems")
_RDT = (("l3_cache_schema", "l3CacheSchema"), ("mem_bw_schema", "memBwSchema"))


def changes(options: dict[str, Any], document: dict[str, Any]) -> dict[str, Any]:
    """Return linux.resources with the options of update over the document; raises KrunError."""
    resources: dict[str, Any] = {
        key: dict(value) for key, value in document.items() if isinstance(value, dict)
    }
    resources.update({key: value for key, value in document.items() if isinstance(value, list)})
    for name, (section, key) in _UPDATE.items():
        text = options.get(name)
        if text is None:
            continue
        flag = name.replace("_", "-")
        value: Any = text
        if name not in _TEXT:
            value = _size(text, flag) if section == "memory" else _number(text, flag)
        resources.setdefault(section, {})[key] = value
    return resources


def for_crun(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options of update with plain numbers, which is all that crun reads.

    Raises KrunError.
    """
    asked = changes(options, {})
    plain = {
        name: str(asked[section][key])
        for name, (section, key) in _UPDATE.items()
        if options.get(name) is not None
    }
    if options.get("kernel_memory") is not None:
        plain["kernel_memory"] = str(_size(options["kernel_memory"], "kernel-memory"))
    return {**options, **plain}


def _number(text: str, flag: str) -> int:
    """Return a count; raises KrunError."""
    if not _is_number(text.removeprefix("-")):
        raise KrunError(f"--{flag} {text}: must be a number")
    return int(text)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 20


def _size(text: str, flag: str) -> int:
    """Return bytes of 512, 512k, 1.5g, 100MB or 100MiB, all powers of two, as runc reads them."""
    number = text.lower().removesuffix("b").removesuffix("i")
    unit = "kmgtp".find(number[-1:]) + 1 if number else 0
    if unit:
        number = number[:-1]
    if _is_number(number.removeprefix("-")):
        return int(number) << 10 * unit
    whole, _, part = number.partition(".")
    if not (_is_number(whole) and _is_number(part)):
        raise KrunError(f"--{flag} {text}: must be a number")
    return int(float(number) * (1 << 10 * unit))


def update(root: str, state: store.State, options: dict[str, Any]) -> int:
    """Change the limits of a container, and remember them in its configuration."""
    if store.status(root, state) == "stopped":
        raise BadState("cannot update a stopped container")
    schemata = {key: options[name] for name, key in _RDT if options.get(name)}
    if schemata and not state.rdt:
        text = "update: the container was created without linux.intelRdt"
        raise KrunError(text, "create it with a closID or schemata")
    document: dict[str, Any] = {}
    if options.get("resources"):
        document = _resources(options["resources"])
    version = 1 if any(place.version == 1 for place in state.cgroup) else 2
    # With a document the options do not count, as with runc and crun.
    wanted = changes({} if options.get("resources") else options, document)
    _keep_quota(wanted, root, state)
    writes = tuple(plan_writes(version, wanted))
    if state.unit:
        from krun import systemd
        from krun.plan.units import of_resources

        with systemd.Manager() as manager:
            manager.change(state.unit, of_resources(writes, version))
    cgroupfs.apply(writes, state.cgroup, state.tolerant)
    spec = store.load_config(root, state.id)
    linux = spec.setdefault("linux", {})
    if schemata:
        from krun.linux import resctrl

        resctrl.write_schemata(state.rdt, list(schemata.values()))
        linux["intelRdt"] = {**(linux.get("intelRdt") or {}), **schemata}
    kept = linux.get("resources") or {}
    for section, values in wanted.items():
        if isinstance(values, dict):
            kept[section] = {**(kept.get(section) or {}), **values}
        else:
            kept[section] = values
    linux["resources"] = kept
    store.write_file(f"{store.directory(root, state.id)}/{store.CONFIG}", jsontext.dumps(spec))
    return 0


def _keep_quota(wanted: dict[str, Any], root: str, state: store.State) -> None:
    """Fill in what v2 writes in one file: a quota needs its period, a swap limit its memory."""
    spec = store.load_config(root, state.id)
    now = (spec.get("linux") or {}).get("resources") or {}
    for section, first, second in (("cpu", "quota", "period"), ("memory", "swap", "limit")):
        values = wanted.get(section)
        if not values:
            continue
        if section == "memory" and "swap" not in values:
            continue
        for one, other in ((first, second), (second, first)):
            kept = (now.get(section) or {}).get(other)
            if values.get(one) is not None and values.get(other) is None and kept is not None:
                values[other] = kept


def _resources(path: str) -> dict[str, Any]:
    try:
        text = sys.stdin.read() if path == "-" else proc.read(path)
        document = jsontext.loads(text)
    except OSError as error:
        raise KrunError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise KrunError(f"{path}: {error}") from error
    if not isinstance(document, dict):
        raise KrunError(f"{path}: must be an object like linux.resources")
    from krun import spec

    return {**spec.accept(spec.parse_resources, document)}


def _seconds(text: str) -> float:
    """Return a duration such as 5s, 500ms or 1m in seconds; raises KrunError."""
    for unit, factor in (("ms", 0.001), ("s", 1.0), ("m", 60.0), ("h", 3600.0)):
        digits = text.removesuffix(unit)
        if digits != text:
            try:
                value = float(digits) * factor
            except ValueError:
                break
            if value > 0:
                return value
    raise KrunError(f"--interval {text}: must be a duration such as 5s")


def events(root: str, state: store.State, once: bool, interval: str) -> int:
    """Print statistics, and a line for each out-of-memory kill, until the container ends."""
    import select
    import time

    every = _seconds(interval)
    if once:
        if store.status(root, state) == "stopped":
            raise BadState("container not running")
        _print(state, "stats", statistics(state))
        return 0
    init = store.open_init(root, state)
    poll = select.poll()
    poll.register(init, select.POLLIN)
    killed = cgroupfs.oom_kills(state.cgroup)
    memory = _oom_descriptor(state)
    if memory != -1:
        poll.register(memory, select.POLLIN | select.POLLPRI)
    due = time.monotonic()
    while True:
        ready = poll.poll(max(0.0, due - time.monotonic()) * 1000)
        now = cgroupfs.oom_kills(state.cgroup)
        if memory != -1 and any(fd == memory for fd, _ in ready):
            _drain(memory)
        for _ in range(now - killed):
            _print(state, "oom", None)
        killed = now
        if any(fd == init for fd, _ in ready):
            return 0
        if time.monotonic() >= due:
            _print(state, "stats", statistics(state))
            due = time.monotonic() + every


def _oom_descriptor(state: store.State) -> int:
    """Return what becomes ready at an out-of-memory kill: an eventfd on v1, the file on v2."""
    directory = cgroupfs.place_of("memory", state.cgroup)
    events_file = f"{directory}/memory.events"
    if os.path.exists(events_file):
        fd = os.open(events_file, os.O_RDONLY | os.O_CLOEXEC)
        os.read(fd, 4096)
        return fd
    control = f"{directory}/memory.oom_control"
    if not os.path.exists(control):
        return -1
    event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    fd = os.open(control, os.O_RDONLY | os.O_CLOEXEC)
    cgroupfs.write(f"{directory}/cgroup.event_control", f"{event} {fd}")
    os.close(fd)
    return event


def _drain(fd: int) -> None:
    try:
        os.pread(fd, 4096, 0)
    except OSError:
        os.read(fd, 8)


def _print(state: store.State, kind: str, data: Any) -> None:
    line: dict[str, Any] = {"type": kind, "id": state.id}
    if data is not None:
        line["data"] = data
    sys.stdout.write(jsontext.dumps(line) + "\n")
    sys.stdout.flush()


def _value(path: str) -> int:
    """Return a number of a cgroup file, 0 when it is not there, 2**64 - 1 for max."""
    try:
        text = proc.read(path).strip()
    except OSError:
        return 0
    return (1 << 64) - 1 if text == "max" else int(text)


def _table(path: str) -> dict[str, int]:
    """Return the lines "key number" of a cgroup file."""
    try:
        lines = proc.read(path).splitlines()
    except OSError:
        return {}
    pairs = (line.split() for line in lines)
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}


def statistics(state: store.State) -> dict[str, Any]:
    """Return the statistics in the form of runc's events."""
    memory = cgroupfs.place_of("memory", state.cgroup)
    cpu = cgroupfs.place_of("cpu", state.cgroup)
    tasks = cgroupfs.place_of("pids", state.cgroup)
    unified = not os.path.exists(f"{memory}/memory.usage_in_bytes")
    return {
        "cpu": _cpu_v2(cpu) if os.path.exists(f"{cpu}/cgroup.controllers") else _cpu_v1(state, cpu),
        "cpuset": _cpuset(cgroupfs.place_of("cpuset", state.cgroup)),
        "memory": _memory_v2(memory) if unified else _memory_v1(memory),
        "pids": {
            "current": _value(f"{tasks}/pids.current"),
            "limit": _limit(_value(f"{tasks}/pids.max")),
        },
        "blkio": _blkio(state),
        "hugetlb": _hugetlb(state),
        "intel_rdt": _rdt(state),
        "network_interfaces": None,
    }


def _rdt(state: store.State) -> dict[str, str]:
    if not state.rdt:
        return {}
    from krun.linux import resctrl

    return resctrl.statistics(state.rdt)


def _limit(value: int) -> int:
    return 0 if value == (1 << 64) - 1 else value


def _cpu_v1(state: store.State, cpu: str) -> dict[str, Any]:
    account = cgroupfs.place_of("cpuacct", state.cgroup)
    ticks = _table(f"{account}/cpuacct.stat")
    stat = _table(f"{cpu}/cpu.stat")
    nanoseconds = 1_000_000_000 // os.sysconf("SC_CLK_TCK")
    try:
        each = [int(one) for one in proc.read(f"{account}/cpuacct.usage_percpu").split()]
    except OSError:
        each = []
    try:
        # A heading, then number, user and system of each CPU.
        all_ = [line.split() for line in proc.read(f"{account}/cpuacct.usage_all").splitlines()[1:]]
    except OSError:
        all_ = []
    return {
        "usage": {
            "total": _value(f"{account}/cpuacct.usage"),
            "percpu": each,
            "percpu_kernel": [int(one[2]) for one in all_],
            "percpu_user": [int(one[1]) for one in all_],
            "kernel": ticks.get("system", 0) * nanoseconds,
            "user": ticks.get("user", 0) * nanoseconds,
        },
        "throttling": {
            "periods": stat.get("nr_periods", 0),
            "throttledPeriods": stat.get("nr_throttled", 0),
            "throttledTime": stat.get("throttled_time", 0),
        },
    }


def _cpuset(directory: str) -> dict[str, Any]:
    """Return the values of a v1 cpuset; v2 has no such files."""
    answer: dict[str, Any] = {}
    for name in ("cpus", "mems"):
        try:
            text = proc.read(f"{directory}/cpuset.{name}").strip()
        except OSError:
            return {}
        answer[name] = list(cpu_list(text, name))
    for name in _CPUSET_FLAGS:
        answer[name] = _value(f"{directory}/cpuset.{name}")
    return answer


_CPUSET_FLAGS = (
    "cpu_exclusive",
    "mem_hardwall",
    "mem_exclusive",
    "memory_migrate",
    "memory_spread_page",
    "memory_spread_slab",
    "memory_pressure",
    "sched_load_balance",
    "sched_relax_domain_level",
)


def _cpu_v2(cpu: str) -> dict[str, Any]:
    stat = _table(f"{cpu}/cpu.stat")
    return {
        "usage": {
            "total": stat.get("usage_usec", 0) * 1000,
            "kernel": stat.get("system_usec", 0) * 1000,
            "user": stat.get("user_usec", 0) * 1000,
        },
        "throttling": {
            "periods": stat.get("nr_periods", 0),
            "throttledPeriods": stat.get("nr_throttled", 0),
            "throttledTime": stat.get("throttled_usec", 0) * 1000,
        },
    }


def _entry(directory: str, prefix: str) -> dict[str, int]:
    return {
        "limit": _value(f"{directory}/{prefix}.limit_in_bytes"),
        "usage": _value(f"{directory}/{prefix}.usage_in_bytes"),
        "max": _value(f"{directory}/{prefix}.max_usage_in_bytes"),
        "failcnt": _value(f"{directory}/{prefix}.failcnt"),
    }


def _memory_v1(directory: str) -> dict[str, Any]:
    stat = _table(f"{directory}/memory.stat")
    return {
        "cache": stat.get("cache", 0),
        "usage": _entry(directory, "memory"),
        "swap": _entry(directory, "memory.memsw"),
        "kernel": _entry(directory, "memory.kmem"),
        "kernelTCP": _entry(directory, "memory.kmem.tcp"),
        "raw": stat,
    }


def _memory_v2(directory: str) -> dict[str, Any]:
    stat = _table(f"{directory}/memory.stat")

    def entry(prefix: str) -> dict[str, int]:
        return {
            "limit": _value(f"{directory}/{prefix}.max"),
            "usage": _value(f"{directory}/{prefix}.current"),
            "max": _value(f"{directory}/{prefix}.peak"),
            "failcnt": 0,
        }

    return {
        "cache": stat.get("file", 0),
        "usage": entry("memory"),
        "swap": entry("memory.swap"),
        "raw": stat,
    }


def _blkio(state: store.State) -> dict[str, Any]:
    directory = cgroupfs.place_of("blkio", state.cgroup)
    answer: dict[str, Any] = {}
    for key, file in (
        ("ioServiceBytesRecursive", "blkio.throttle.io_service_bytes_recursive"),
        ("ioServicedRecursive", "blkio.throttle.io_serviced_recursive"),
    ):
        try:
            lines = proc.read(f"{directory}/{file}").splitlines()
        except OSError:
            continue
        entries = []
        for line in lines:
            fields = line.split()
            if len(fields) == 3:
                major, minor = fields[0].split(":")
                entries.append(
                    {
                        "major": int(major),
                        "minor": int(minor),
                        "op": fields[1],
                        "value": int(fields[2]),
                    }
                )
        answer[key] = entries
    return answer


def _hugetlb(state: store.State) -> dict[str, Any]:
    answer: dict[str, Any] = {}
    for place in state.cgroup:
        try:
            names = os.listdir(place.path)
        except OSError:
            continue
        for name in names:
            if not name.startswith("hugetlb."):
                continue
            size = name.split(".")[1]
            if name.endswith(".usage_in_bytes"):
                base = f"{place.path}/hugetlb.{size}"
                answer[size] = {
                    "usage": _value(f"{base}.usage_in_bytes"),
                    "max": _value(f"{base}.max_usage_in_bytes"),
                    "failcnt": _value(f"{base}.failcnt"),
                }
            elif name.endswith(".current") and ".rsvd." not in name:
                base = f"{place.path}/hugetlb.{size}"
                answer[size] = {"usage": _value(f"{base}.current"), "max": 0, "failcnt": 0}
    return answer
