"""IPv6 again, where docker has switched it off.

dockerd's hook libnetwork-setkey disables IPv6 in the namespace of a container without an IPv6
network of docker's, --network none as well, and the kernel forgets addresses and routes.  A hook
of krun's, which comes after it, puts them back.
"""

from __future__ import annotations

import os

from krun.errors import KrunError
from krun.network import state
from krun.network.model import Route

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from krun.types import Spec

_HOOK = "libnetwork-setkey"


def needed(spec: Spec, record: dict[str, Any]) -> bool:
    """Whether a container that has IPv6 addresses of krun's gets docker's hook."""
    hooks: Any = spec.get("hooks") or {}
    called = any(
        _HOOK in (hook.get("args") or ())
        for kind in ("prestart", "createRuntime")
        for hook in hooks.get(kind) or ()
    )
    return called and any(":" in text for one in record["interfaces"] for text in one["addresses"])


def restore(record: dict[str, Any]) -> None:
    """Enable IPv6 in a member's namespace, with its addresses and routes.  Raises KrunError."""
    from krun.network import links
    from krun.network.namespace import Inside

    try:
        namespace = os.open(record["namespace"], os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise KrunError(f"{record['namespace']}: {error.strerror}") from error
    try:
        with links.connect_in(namespace) as inside:
            with Inside(namespace):
                links.sysctl("net/ipv6/conf/all/disable_ipv6", "0")
                indices = {one["name"]: links.index_of(one["name"]) for one in record["interfaces"]}
            for one in record["interfaces"]:
                addresses = [text for text in one["addresses"] if ":" in text]
                routes = [Route(*each) for each in one["routes"] if ":" in each[0]]
                links.configure(inside, indices[one["name"]], addresses, routes, one["name"])
    finally:
        os.close(namespace)


def attach(place: str) -> bool:
    """What the hook does for the record in `place`; False for a network of another kind."""
    record = state.read(f"{place}/{state.RECORD}")
    if record is None:
        raise KrunError(f"{place}: the network was released before the container was made")
    if not record["namespace"]:
        return False
    restore(record)
    return True
