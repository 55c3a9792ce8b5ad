"""Ready namespaces: claimed by one rename, refilled by a process of its own.

Nothing heavy is imported here, as claiming is on the path of create.
"""

from __future__ import annotations

import os

from krun import log
from krun.network import state
from krun.network.model import DEFAULT_BRIDGE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from krun.types import Spec

SIZE = "size"


def plain_key(spec: Spec) -> str:
    """Return the pool's key of a request that names a bridge and nothing else; "" for another.

    The request is right when the pool is there, so nothing needs to read it in full.
    """
    request: Any = (spec.get("annotations") or {}).get("app.kontain.network")
    if request is None:
        request = (spec.get("kontain") or {}).get("network")
    if type(request) is not str or (spec.get("linux") or {}).get("netDevices"):
        return ""
    text = request.removesuffix("ip=auto").rstrip(" ,") if "=" in request else request
    if text == "bridge":
        return f"{DEFAULT_BRIDGE},eth0"
    kind, _, bridge = text.partition(":")
    return (
        f"{bridge},eth0"
        if kind == "bridge" and bridge and not set(bridge) & set(",;/ \t\n")
        else ""
    )


def directory_of(directory: str, key: str) -> str:
    """Return the directory of the pool of a kind of network (model.pool_key)."""
    return f"{directory}/pool/{key}"


def filler_lock(directory: str, key: str) -> state.Lock:
    """Return the lock that a filler holds: one at a time works on a pool."""
    return state.Lock(f"{directory_of(directory, key)}/filler.lock")


def size(directory: str, key: str) -> int:
    """Return how many members the pool is meant to have ready, 0 for no pool."""
    try:
        with open(f"{directory_of(directory, key)}/{SIZE}") as file:
            text = file.read()
    except FileNotFoundError:
        return 0
    return int(text) if text.isascii() and text.isdigit() else 0


def ready(directory: str, key: str) -> list[str]:
    """Return the members that wait for a container."""
    return [m for m in state.entries(directory_of(directory, key)) if state.is_member(m)]


def _usable(record: dict[str, Any] | None) -> bool:
    """Whether a member's namespace is mounted here and its host end is plugged.

    The mount may be missing in another mount namespace than the filler's.
    """
    if record is None or state.inode(record["namespace"]) != record["inode"]:
        return False
    # /proc/sys/net is that of the caller's network namespace, unlike /sys/class/net.
    return os.path.isdir(f"/proc/sys/net/ipv4/conf/{record['interfaces'][0]['hostName']}")


def claim(directory: str, key: str, path: str) -> dict[str, Any] | None:
    """Move one member of the pool into a container's directory; None when there is none."""
    pool = directory_of(directory, key)
    members = ready(directory, key)
    for position, member in enumerate(members):
        target = f"{path}/{member}"
        try:
            os.rename(f"{pool}/{member}", target)
        except FileNotFoundError:
            # Another create was first.
            continue
        record = state.read(f"{target}/{state.RECORD}")
        if _usable(record):
            refill(directory, key, len(members) - position - 1)
            claimed: dict[str, Any] = record
            return claimed
        if record is not None and state.inode(record["namespace"]) != record["inode"]:
            # Fine for a create in the filler's mount namespace.
            os.rename(target, f"{pool}/{member}")
            return None
        log.debug(f"network: pooled member {member} lost its interface")
        state.move(target, f"{directory}/dying/{member}")
    # Nothing but a claim starts a filler: one that found the pool empty does, too.
    refill(directory, key, 0)
    return None


def refill(directory: str, key: str, left: int) -> None:
    """Start a filler when less than half of the pool is left; it ends when the pool is full."""
    wanted = size(directory, key)
    # A pool that was never asked for has the size 0.
    if left * 2 >= wanted:
        return
    lock = filler_lock(directory, key)
    if not lock.taken():
        return
    lock.release()
    from krun.network import detached

    detached.spawn(state.own_command(["network", "pool", "--refill", key]))
