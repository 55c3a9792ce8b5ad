"""What a container's network is, as records: what krun.network.reader reads and make makes."""

from __future__ import annotations

from krun.record import Record

ANNOTATION = "app.kontain.network"
DEFAULT_BRIDGE = "krun0"
AUTO = "auto"


class Route(Record):
    """One route in the container: destination is a network; via "" is on the link."""

    destination: str
    via: str = ""
    metric: int = 0


class Bandwidth(Record):
    """Limits in bits per second, 0 for none: ingress is towards the container.

    `burst` is in bytes; 0 lets krun take what 10 ms at the rate need.
    """

    ingress: int = 0
    egress: int = 0
    burst: int = 0
    queue: str = "tbf"


class Interface(Record):
    """One interface of the container, as asked for.

    veth: plugged into `bridge`, or routed when that is empty; macvlan, ipvlan: on `parent`;
    device: the host's device `parent`, moved in; user: pasta or slirp4netns, which need no rights.
    """

    kind: str
    name: str
    bridge: str = ""
    parent: str = ""
    mode: str = ""
    host_name: str = ""
    mac: str = ""
    mtu: int = 0
    addresses: tuple[str, ...] = ()
    ranges: tuple[str, ...] = ()
    gateways: tuple[str, ...] = ()
    routes: tuple[Route, ...] = ()
    bandwidth: Bandwidth = Bandwidth()
    peers: tuple[str, ...] = ()


class Port(Record):
    """One published port: `address` "" is every address of the host."""

    host: int
    container: int
    protocol: str = "tcp"
    address: str = ""


class Dns(Record):
    """What resolv.conf says; without nameservers, the host's that a container can reach."""

    nameservers: tuple[str, ...] = ()
    search: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


class Network(Record):
    """A container's whole network; `dns` None leaves the image's files alone."""

    interfaces: tuple[Interface, ...]
    ports: tuple[Port, ...] = ()
    masquerade: bool = True
    sysctls: tuple[tuple[str, str], ...] = ()
    dns: Dns | None = Dns()
    hosts: tuple[tuple[str, str], ...] = ()
    hostname: str = ""


def pool_key(network: Network) -> str:
    """Return the name of the pool that can serve the network; "" when none can.

    A pool has ready what is the same for every container: one veth with automatic addresses.
    Ports, DNS and sysctls are added when the namespace is claimed.
    """
    if len(network.interfaces) != 1 or not network.masquerade:
        return ""
    one = network.interfaces[0]
    if one.kind != "veth" or not one.bridge or one.addresses != (AUTO,):
        return ""
    if one != Interface("veth", one.name, one.bridge, mtu=one.mtu, addresses=one.addresses):
        return ""
    return f"{one.bridge},{one.name},{one.mtu}" if one.mtu else f"{one.bridge},{one.name}"
