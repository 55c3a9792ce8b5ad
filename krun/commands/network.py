"""krun network: see, define and remove networks, keep a pool, collect what kills left behind."""

from __future__ import annotations

import os
import sys

from krun import jsontext
from krun.errors import BadSpec, KrunError, NotFound, UsageError
from krun.network import definition, leases, model, pool, reader, removal, state
from krun.network.address import contains, parse_address, parse_network, usable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from krun.grammar import Call
    from krun.network.definition import Definition

_PADDING = 3


def _print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    lines = [head, *rows]
    widths = [max(len(line[column]) for line in lines) + _PADDING for column in range(len(head))]
    for line in lines:
        cells = [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
        sys.stdout.write("".join(cells).rstrip() + "\n")


def _print_json(value: Any) -> None:
    sys.stdout.write(jsontext.dumps(value, indent="  ") + "\n")


def _devices() -> dict[str, Any]:
    from krun.network import links, netlink

    with netlink.Route() as host:
        return links.describe(host)


def _bridges(record: dict[str, Any]) -> set[str]:
    return {one["bridge"] for one in record["interfaces"] if one["bridge"]}


def _attached(directory: str) -> list[dict[str, Any]]:
    """Return the record of every container's member, with the container's id and root."""
    found = []
    for root, id in state.containers(directory):
        path = state.container(directory, root, id)
        for member in state.entries(path):
            if not state.is_member(member):
                continue
            record = state.read(f"{path}/{member}/{state.RECORD}")
            if record is not None:
                ports = state.read(f"{path}/{member}/ports.json") or []
                found.append({"id": id, "root": root, **record, "ports": ports})
    return sorted(found, key=lambda one: (one["id"], one["root"]))


def _counters(record: dict[str, Any], devices: dict[str, Any]) -> dict[str, int]:
    """Return a member's counters as the container sees them: the host's end has them swapped."""
    total: dict[str, int] = {}
    for one in record["interfaces"]:
        counters = devices.get(one["hostName"], {}).get("counters", {})
        for key, value in counters.items():
            swapped = {"rx": "tx", "tx": "rx"}[key[:2]] + key[2:]
            total[swapped] = total.get(swapped, 0) + value
    return total


def _pools(directory: str) -> list[dict[str, Any]]:
    return [
        {
            "key": key,
            "network": key.partition(",")[0],
            "size": pool.size(directory, key),
            "ready": len(pool.ready(directory, key)),
        }
        for key in sorted(state.entries(f"{directory}/pool"))
    ]


def _capacity(one: Definition) -> dict[str, int]:
    """Return how many containers each range has room for."""
    room = {}
    for text, gateway in zip(one.ranges, one.gateways, strict=True):
        network = parse_network(text)
        first, last = usable(network)
        inside = first <= parse_address(gateway).value <= last
        room[text] = last - first + 1 - inside
    return room


def _describe(
    directory: str, one: Definition, devices: dict[str, Any], attached: list[dict[str, Any]]
) -> dict[str, Any]:
    held = leases.read(directory).held
    ranges = [
        {
            "range": text,
            "gateway": gateway,
            "capacity": _capacity(one)[text],
            "leased": sum(contains(parse_network(text), parse_address(a)) for a in held),
        }
        for text, gateway in zip(one.ranges, one.gateways, strict=True)
    ]
    device = devices.get(one.name, {})
    return {
        "name": one.name,
        "state": device.get("state", "not made"),
        "defined": "in " + state.DEFINITIONS if one.permanent else "on first use",
        "ranges": ranges,
        "mtu": device.get("mtu", one.mtu),
        "masquerade": one.masquerade,
        "counters": device.get("counters", {}),
        "pools": [p for p in _pools(directory) if p["network"] == one.name],
        "containers": [
            {**record, "counters": _counters(record, devices)}
            for record in attached
            if one.name in _bridges(record)
        ],
    }


def _addresses(record: dict[str, Any]) -> str:
    return ", ".join(text for one in record["interfaces"] for text in one["addresses"]) or "-"


def _ports(record: dict[str, Any]) -> str:
    shown = []
    for port in record["ports"]:
        at = port["address"]
        at = f"[{at}]:" if ":" in at else f"{at}:" if at else ""
        shown.append(f"{at}{port['host']}->{port['container']}/{port['protocol']}")
    return ", ".join(shown) or "-"


def _table_of_containers(records: list[dict[str, Any]]) -> None:
    rows = [
        (
            record["id"],
            ", ".join(one["name"] for one in record["interfaces"]),
            _addresses(record),
            _ports(record),
            str(record["counters"].get("rx_bytes", 0)),
            str(record["counters"].get("tx_bytes", 0)),
        )
        for record in records
    ]
    _print_table(("CONTAINER", "INTERFACES", "ADDRESSES", "PORTS", "RX BYTES", "TX BYTES"), rows)


def _defined(directory: str, name: str) -> Definition:
    one = definition.read(directory, name)
    if one is None:
        raise NotFound(f"there is no network {name}", "krun network ls lists them")
    return one


def _list(call: Call, directory: str) -> int:
    devices = _devices()
    attached = _attached(directory)
    if call.arguments:
        one = _describe(directory, _defined(directory, call.arguments[0]), devices, attached)
        if call.options["format"] == "json":
            _print_json(one["containers"])
        else:
            _table_of_containers(one["containers"])
        return 0
    found = [_describe(directory, one, devices, attached) for one in definition.all_of(directory)]
    if call.options["format"] == "json":
        _print_json(found)
        return 0
    rows = [
        (
            one["name"],
            one["state"],
            ", ".join(r["range"] for r in one["ranges"]),
            ", ".join(str(r["leased"]) for r in one["ranges"]),
            str(len(one["containers"])),
            ", ".join(f"{p['ready']}/{p['size']}" for p in one["pools"]) or "-",
            "yes" if one["masquerade"] else "no",
        )
        for one in found
    ]
    head = ("NETWORK", "STATE", "RANGES", "LEASED", "CONTAINERS", "POOL", "MASQUERADE")
    _print_table(head, rows)
    return 0


def _inspect(call: Call, directory: str) -> int:
    name = call.arguments[0]
    attached = _attached(directory)
    one = definition.read(directory, name)
    devices = _devices()
    if one is not None:
        _print_json(_describe(directory, one, devices, attached))
        return 0
    found = [
        {**record, "counters": _counters(record, devices)}
        for record in attached
        if record["id"] == name
    ]
    if not found:
        raise NotFound(f"there is no network, and no container with a network, named {name}")
    _print_json(found[0] if len(found) == 1 else found)
    return 0


def _create(call: Call, directory: str) -> int:
    from krun.network import links, make, netlink
    from krun.network.address import parse_prefix

    options = call.options
    try:
        name = reader.device_name(call.arguments[0], "NETWORK")
    except BadSpec as error:
        raise UsageError(error.text) from None
    with state.Lock(f"{directory}/bridge.lock"), netlink.Route() as host:
        if definition.read(directory, name) is not None:
            raise KrunError(f"network {name} is there already", f"krun network inspect {name}")
        make.check_bridge_name(host, name)
        others = definition.all_of(directory)
        taken = [parse_network(text) for other in others for text in other.ranges]
        in_use = [parse_prefix(text) for text in links.networks_in_use(host)]
        ranges = options["range"] or definition.first_free(taken + in_use, links.have_ipv6())
        one = definition.define(
            name,
            ranges,
            options["gateway"],
            mtu=options["mtu"] or 0,
            masquerade=not options["no_masquerade"],
            permanent=os.geteuid() == 0,
        )
        conflict = definition.conflicts(one, others)
        if conflict:
            raise KrunError(f"network {name}: {conflict}")
        definition.write(directory, one)
    sys.stdout.write(f"{name}: {', '.join(one.ranges)}\n")
    return 0


def _remove(call: Call, directory: str) -> int:
    from krun.network import links, netlink, rules

    name = call.arguments[0]
    one = _defined(directory, name)
    users = [record for record in _attached(directory) if name in _bridges(record)]
    if users and not call.options["force"]:
        ids = ", ".join(record["id"] for record in users)
        raise KrunError(
            f"network {name} is in use by {len(users)} containers: {ids}",
            "delete them, or use --force",
        )
    removal.gc(directory)
    for entry in _pools(directory):
        if entry["network"] == name:
            _drain(directory, entry["key"])
    for record in users:
        removal.release_of(directory, record["id"], record["root"])
    with state.Lock(f"{directory}/bridge.lock"), netlink.Route() as host:
        index = links.index_of(name)
        if index and links.kind_of(host.link(index)) == "bridge":
            links.delete(host, name)
        definition.forget(directory, name)
        if one.masquerade:
            rules.stop_masquerade(one.ranges)
        if not definition.all_of(directory) and not rules.members():
            rules.unload()
    return 0


def _drain(directory: str, key: str) -> None:
    """End a pool: no filler works on it any more, and every member is taken down."""
    path = pool.directory_of(directory, key)
    try:
        os.unlink(f"{path}/{pool.SIZE}")
    except FileNotFoundError:
        pass
    with pool.filler_lock(directory, key):
        members = [
            member
            for member in pool.ready(directory, key)
            if state.bury(directory, f"{path}/{member}", member)
        ]
        removal.take_down(directory, members)
        state.remove_tree(path)


REFILL_ATTEMPTS = 5


def _key_of(call: Call) -> str:
    text = call.arguments[0] if call.arguments else "bridge"
    try:
        network = reader.parse(text, "INTERFACE")
    except BadSpec as error:
        raise UsageError(f"{text}: {error.text}", error.hint) from None
    key = model.pool_key(network)
    if not key or network.ports:
        raise UsageError(
            f"no pool can have {text} ready",
            "a pool has one veth on a bridge with automatic addresses: bridge:NAME[,mtu=N]",
        )
    return key


def _pool(call: Call, directory: str) -> int:
    from krun.network import make

    options = call.options
    if options["refill"]:
        os.nice(10)
        key = options["refill"]
        _refill(directory, key)
        return 0
    if options["size"] is None and not options["keep"]:
        rows = _pools(directory)
        if options["format"] == "json":
            _print_json(rows)
        else:
            _print_table(
                ("POOL", "READY", "SIZE"),
                [(row["key"], str(row["ready"]), str(row["size"])) for row in rows],
            )
        return 0
    key = _key_of(call)
    size = pool.size(directory, key) if options["size"] is None else options["size"]
    if not size:
        _drain(directory, key)
        return 0
    os.makedirs(pool.directory_of(directory, key), 0o755, exist_ok=True)
    removal.gc(directory)
    with pool.filler_lock(directory, key):
        state.write(f"{pool.directory_of(directory, key)}/{pool.SIZE}", str(size))
        _shrink(directory, key, size)
        if options["keep"]:
            return _keep(directory, key)
        make.fill(directory, key, make.network_of(key), size)
    return 0


def _refill(directory: str, key: str) -> None:
    """Fill a pool on demand, once more after a failure: claims work on the same bridge meanwhile.

    Its lock is probed by claims, too; what is held for that long is another filler's.
    """
    import time

    from krun.network import make

    for attempt in range(REFILL_ATTEMPTS):
        wanted = pool.size(directory, key)
        if not wanted:
            return
        lock = pool.filler_lock(directory, key)
        if lock.taken():
            try:
                make.fill(directory, key, make.network_of(key), wanted)
                return
            except (KrunError, OSError):
                if attempt == REFILL_ATTEMPTS - 1:
                    raise
            finally:
                lock.release()
        time.sleep(0.1 * (attempt + 1))


def _shrink(directory: str, key: str, size: int) -> None:
    path = pool.directory_of(directory, key)
    excess = pool.ready(directory, key)[size:]
    members = [m for m in excess if state.bury(directory, f"{path}/{m}", m)]
    removal.take_down(directory, members)


def _keep(directory: str, key: str) -> int:
    """Refill the pool whenever a member leaves it (F_NOTIFY tells), until SIGTERM."""
    import fcntl
    import signal

    from krun.network import make

    network = make.network_of(key)
    awaited = {signal.SIGIO, signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, awaited)
    fd = os.open(pool.directory_of(directory, key), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.fcntl(fd, fcntl.F_NOTIFY, fcntl.DN_DELETE | fcntl.DN_MULTISHOT)
        while size := pool.size(directory, key):
            make.fill(directory, key, network, size)
            if signal.sigwait(awaited) != signal.SIGIO:
                break
    finally:
        os.close(fd)
    return 0


def _collect(call: Call, directory: str) -> int:
    removed = removal.gc(directory, thorough=True)
    if call.options["format"] == "json":
        _print_json(removed)
        return 0
    for what, names in removed.items():
        for name in names:
            done = "leased again:" if what == "rebuilt" else f"removed {what.removesuffix('s')}"
            sys.stdout.write(f"{done} {name}\n")
    return 0


def _attach(call: Call, directory: str) -> int:
    from krun.network import repair, usermode

    if repair.attach(call.arguments[0]):
        return 0
    try:
        pid = jsontext.loads(sys.stdin.buffer.read())["pid"]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"stdin: not a container's state: {error}") from None
    usermode.call(directory, call.arguments[0], pid)
    return 0


_VERBS = {
    "attach": _attach,
    "ls": _list,
    "inspect": _inspect,
    "create": _create,
    "rm": _remove,
    "pool": _pool,
    "gc": _collect,
}


def run(call: Call) -> int:
    """Run one verb of the group; raises KrunError."""
    return _VERBS[call.verb.rpartition(" ")[2]](call, state.directory())
