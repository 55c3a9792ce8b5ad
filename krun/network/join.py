"""claim(): put a container into its network; on the path of create, so it imports little."""

from __future__ import annotations

import time

from krun import jsontext, log
from krun.errors import BadSpec, BadState
from krun.network import model, pool, state

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from krun.network.model import Network
    from krun.types import Mount, Spec


def _own(directory: str, path: str, id: str, root: str) -> None:
    """Make the container's record directory; a dead one of the same id makes way."""
    for _ in range(3):
        try:
            state.make_owned(path)
        except FileExistsError:
            from krun.network import removal

            if removal.alive(path, id, root):
                raise BadState(f"container {id} has a network already") from None
            removal.release(id, root)
            continue
        return
    raise BadState(f"container {id} is being created by another process")


def _check(spec: Spec, network: Network) -> None:
    """Refuse what could not be joined, before anything is made."""
    namespaces = (spec.get("linux") or {}).get("namespaces") or []
    for index, namespace in enumerate(namespaces):
        if namespace["type"] == "network" and namespace.get("path"):
            raise BadSpec(
                f"linux.namespaces[{index}].path",
                f"the container has the network {namespace['path']} already",
                "podman and docker: --network none",
            )
    if network.ports:
        from krun.network import rules

        if network.interfaces[:1] and network.interfaces[0].kind != "user":
            rules.program()
        rules.check_free(network.ports)


def addresses(record: dict[str, Any]) -> tuple[str, ...]:
    """Return a member's addresses without their prefix lengths."""
    return tuple(
        text.partition("/")[0] for one in record["interfaces"] for text in one["addresses"]
    )


def _publish(directory: str, network: Network, record: dict[str, Any], place: str) -> None:
    """Publish the ports on a member that was claimed from a pool or made without them."""
    from krun.network import rules

    targets: dict[int, str] = {}
    for one in record["interfaces"]:
        if one["kind"] == "veth":
            for text in one["addresses"]:
                address = text.partition("/")[0]
                targets.setdefault(6 if ":" in address else 4, address)
    elements = rules.publications(network.ports, targets, record["member"])
    state.write(f"{place}/ports.json", jsontext.dumps([port._asdict() for port in network.ports]))
    state.write(f"{place}/{state.RULES}", "")
    if not rules.loaded():
        from krun.network import make

        make.restore_rules(directory)
    rules.publish(elements)


def joined(spec: Spec, network: Network, namespace: str, mounts: list[Mount]) -> Spec:
    """Return spec with the namespace's path ("" for a new one), mounts and sysctls.  Pure."""
    changed: dict[str, Any] = {**spec}
    linux: dict[str, Any] = {**(spec.get("linux") or {})}
    others = [one for one in linux.get("namespaces") or [] if one["type"] != "network"]
    own = {"type": "network", "path": namespace} if namespace else {"type": "network"}
    linux["namespaces"] = [*others, own]
    linux.pop("netDevices", None)
    if network.sysctls:
        linux["sysctl"] = {**(linux.get("sysctl") or {}), **dict(network.sysctls)}
    changed["linux"] = linux
    if mounts:
        ours = {one["destination"] for one in mounts}
        kept = [m for m in spec.get("mounts") or [] if m.get("destination") not in ours]
        changed["mounts"] = kept + mounts
    if network.hostname:
        changed["hostname"] = network.hostname
    result: Spec = changed  # type: ignore[assignment]
    return result


def _request(spec: Spec) -> Network | None:
    """Read in full what spec asks for."""
    from krun.network import reader

    return reader.of(spec)


def _hooked(spec: Spec, place: str) -> Spec:
    """Return spec with krun's own hook behind every other that runs before the container."""
    from krun.network import usermode

    hooks = dict(spec.get("hooks") or {})
    hooks["createRuntime"] = [*(hooks.get("createRuntime") or []), usermode.hook(place)]
    return {**spec, "hooks": hooks}


def _repaired(spec: Spec, record: dict[str, Any], place: str) -> Spec:
    """Return spec with a hook that undoes what docker's own does to the network."""
    from krun.network import repair

    return _hooked(spec, place) if repair.needed(spec, record) else spec


def _user_mode(spec: Spec, network: Network, directory: str, path: str) -> Spec:
    """Join a network that a hook brings up in the namespace that the engine makes."""
    from krun.network import files, usermode

    record = usermode.make(directory, network, path)
    place = f"{path}/{record['member']}"
    if record["nameservers"] and network.dns is not None and not network.dns.nameservers:
        named = network.dns._replace(nameservers=tuple(record["nameservers"]))
        network = network._replace(dns=named)
    mounts = files.write(place, spec, network, addresses(record))
    return joined(_hooked(spec, place), network, "", mounts)


def claim(spec: Spec, id: str, root: str) -> Spec:
    """See krun.network.claim."""
    start = time.monotonic()
    key = pool.plain_key(spec)
    directory = state.directory()
    network: Network | None = model.Network(())
    if not key or not pool.ready(directory, key):
        network = _request(spec)
    if network is None:
        return spec
    _check(spec, network)
    path = state.container(directory, root, id)
    _own(directory, path, id, root)
    try:
        key = key or model.pool_key(network)
        record = pool.claim(directory, key, path) if key else None
        source = "from the pool"
        if record is None and network.interfaces[:1] and network.interfaces[0].kind == "user":
            return _user_mode(spec, network, directory, path)
        if record is None:
            from krun.network import make

            record = make.into(directory, _request(spec) or network, path)
            source = "made, as the pool had none" if key else "made"
        place = f"{path}/{record['member']}"
        if network.ports:
            _publish(directory, network, record, place)
        from krun.network import files

        mounts = files.write(place, spec, network, addresses(record))
        log.timing(f"network {source}", start)
        if spec.get("hooks"):
            spec = _repaired(spec, record, place)
        return joined(spec, network, record["namespace"], mounts)
    except BaseException:
        from krun.network import removal

        removal.release(id, root)
        raise
