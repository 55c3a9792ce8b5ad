"""What a container's network is: the extension `kontain.network`, and its short form; pure.

A bundle writes the object, podman and docker the annotation `app.kontain.network`: the same
object as JSON, or the short form, interfaces separated by ";":

    bridge:kbr0,ip=auto,port=8080:80/tcp
    bridge:kbr0 port=8080:80; macvlan:eth1 name=lan0 ip=192.0.2.9/24

The schema is spec-schema/network.schema.json; a test holds both readers together.
"""

from __future__ import annotations

from krun import jsontext
from krun.errors import BadSpec
from krun.network.address import (
    contains,
    parse_address,
    parse_network,
    parse_prefix,
    usable,
)
from krun.network.model import (
    ANNOTATION,
    AUTO,
    DEFAULT_BRIDGE,
    Bandwidth,
    Dns,
    Interface,
    Network,
    Port,
    Route,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

# The kernel's IFNAMSIZ is 16 with the closing NUL.
NAME_BYTES = 15
KINDS = ("veth", "macvlan", "ipvlan", "device", "user")
MODES = {
    "macvlan": ("bridge", "private", "vepa", "passthru"),
    "ipvlan": ("l2", "l3", "l3s"),
}
PROTOCOLS = ("tcp", "udp", "sctp")


def _member(path: str, key: str) -> str:
    """Return the JSON path of a member."""
    return f"{path}.{key}" if key.isidentifier() else f'{path}["{key}"]'


def _check_type(value: Any, kind: type, path: str) -> None:
    names = {str: "a string", bool: "a boolean", list: "an array", dict: "an object"}
    if type(value) is not kind:
        raise BadSpec(path, f"must be {names.get(kind, 'an integer')}")


def _members(value: Any, known: str, path: str) -> dict[str, Any]:
    _check_type(value, dict, path)
    for key in value:
        if key not in known.split():
            raise BadSpec(_member(path, key), "no such property", f"known here: {known}")
    members: dict[str, Any] = value
    return members


def _string(value: Any, path: str) -> str:
    _check_type(value, str, path)
    text: str = value
    if not text or not text.isprintable():
        raise BadSpec(path, "must be printable text, not empty")
    return text


def _integer(value: Any, least: int, most: int, path: str) -> int:
    if type(value) is not int or not least <= value <= most:
        raise BadSpec(path, f"must be an integer from {least} to {most}, is {value!r}")
    return value


def _array(value: Any, path: str, item: Callable[[Any, str], Any]) -> tuple[Any, ...]:
    _check_type(value, list, path)
    return tuple(item(one, f"{path}[{index}]") for index, one in enumerate(value))


def device_name(value: Any, path: str) -> str:
    """Check the name of a network device (dev_valid_name() of the kernel)."""
    text = _string(value, path)
    size = len(text.encode("utf-8"))
    if size > NAME_BYTES:
        raise BadSpec(
            path,
            f"{text!r} has {size} bytes, a network device's name has at most {NAME_BYTES}",
        )
    if text in (".", "..") or any(c in "/: \"'\\{}" or c.isspace() for c in text):
        raise BadSpec(path, f"{text!r} cannot be the name of a network device")
    return text


def _choice(value: Any, choices: tuple[str, ...], path: str) -> str:
    text = _string(value, path)
    if text not in choices:
        raise BadSpec(path, f"{text!r} is none of {', '.join(choices)}")
    return text


def _parsed(read: Callable[[str], Any], value: Any, path: str) -> Any:
    text = _string(value, path)
    try:
        return read(text)
    except ValueError as error:
        raise BadSpec(path, str(error)) from None


def _address_text(value: Any, path: str) -> str:
    return str(_parsed(parse_address, value, path))


def _network_text(value: Any, path: str) -> str:
    return str(_parsed(parse_network, value, path))


def _interface_address(value: Any, path: str) -> str:
    if value == AUTO:
        return AUTO
    prefix = _parsed(parse_prefix, value, path)
    least, most = usable(prefix)
    if not least <= prefix.value <= most:
        raise BadSpec(path, f"{prefix} is the network's own or its broadcast address")
    return str(prefix)


def _mac(value: Any, path: str) -> str:
    text = _string(value, path).lower()
    parts = text.split(":")
    if len(parts) != 6 or not all(
        len(p) == 2 and all(c in "0123456789abcdef" for c in p) for p in parts
    ):
        raise BadSpec(path, f"{text!r} is not a MAC address (02:00:00:00:00:01)")
    if int(parts[0], 16) & 1 or not any(int(p, 16) for p in parts):
        raise BadSpec(path, f"{text} is a multicast or zero address, which no interface can have")
    return text


_RATE_UNITS = {"gbit": 10**9, "mbit": 10**6, "kbit": 10**3, "bit": 1}


def _rate(value: Any, path: str) -> int:
    """Return bits per second of an integer, or of text such as 10mbit."""
    if type(value) is str:
        for unit, factor in _RATE_UNITS.items():
            digits = value[: -len(unit)]
            if value.endswith(unit) and digits.isascii() and digits.isdigit():
                value = int(digits) * factor
                break
    if type(value) is not int or not 8000 <= value <= 10**12:
        raise BadSpec(
            path, f"must be bits per second from 8000 (or text like 10mbit), is {value!r}"
        )
    return value


def _bandwidth(value: Any, path: str) -> Bandwidth:
    members = _members(value, "ingress egress burst queue", path)
    return Bandwidth(
        _rate(members["ingress"], f"{path}.ingress") if "ingress" in members else 0,
        _rate(members["egress"], f"{path}.egress") if "egress" in members else 0,
        _integer(members.get("burst", 0), 0, 2**31 - 1, f"{path}.burst"),
        _choice(members.get("queue", "tbf"), ("tbf", "fq"), f"{path}.queue"),
    )


def _route(value: Any, path: str) -> Route:
    members = _members(value, "destination via metric", path)
    if "destination" not in members:
        raise BadSpec(f"{path}.destination", "is missing")
    destination = _network_text(members["destination"], f"{path}.destination")
    via = _address_text(members["via"], f"{path}.via") if "via" in members else ""
    if via and parse_address(via).version != parse_prefix(destination).version:
        raise BadSpec(f"{path}.via", f"{via} and {destination} are of different families")
    return Route(
        destination, via, _integer(members.get("metric", 0), 0, 2**32 - 1, f"{path}.metric")
    )


def _check_interface(interface: Interface, path: str) -> None:
    """Check what no property shows alone."""
    kind = interface.kind
    if kind in ("macvlan", "ipvlan", "device") and not interface.parent:
        raise BadSpec(f"{path}.parent", f"is missing: the host's device of the {kind}")
    if kind == "veth" and interface.parent:
        raise BadSpec(f"{path}.parent", "a veth has a bridge, or is routed; it has no parent")
    if kind != "veth":
        for name in ("bridge", "host_name", "peers"):
            if getattr(interface, name):
                shown = "hostName" if name == "host_name" else name
                raise BadSpec(f"{path}.{shown}", f"only a veth can have it, this is a {kind}")
    if interface.bandwidth.ingress and kind != "veth":
        raise BadSpec(f"{path}.bandwidth.ingress", "only a veth can limit what it receives")
    if kind == "user":
        plain = Interface(kind, interface.name, mtu=interface.mtu)
        for name, value, default in zip(interface._fields, interface, plain, strict=True):
            if value != default:
                shown = "hostName" if name == "host_name" else name
                raise BadSpec(f"{path}.{shown}", "a user-mode interface has a name and an mtu only")
        return
    if interface.mode and interface.mode not in MODES.get(kind, ()):
        raise BadSpec(
            f"{path}.mode",
            f"{interface.mode!r} is no mode of {kind}",
            f"{kind} has {', '.join(MODES[kind])}" if kind in MODES else "",
        )
    if interface.bridge and interface.bridge == interface.host_name:
        raise BadSpec(f"{path}.hostName", "is the bridge's name")
    if kind == "ipvlan" and interface.mac:
        raise BadSpec(f"{path}.mac", "an ipvlan has its parent's MAC address")
    networks = [parse_network(text) for text in interface.ranges]
    automatic = AUTO in interface.addresses
    if automatic and not interface.bridge and not networks:
        raise BadSpec(
            f"{path}.addresses",
            '"auto" needs ranges to take an address from',
            "only a bridge has ranges of its own",
        )
    fixed = [parse_prefix(text) for text in interface.addresses if text != AUTO]
    for index, text in enumerate(interface.addresses):
        if text == AUTO:
            continue
        prefix = parse_prefix(text)
        family = [one for one in networks if one.version == prefix.version]
        if family and not any(contains(network, prefix.address) for network in family):
            shown = ", ".join(map(str, family))
            raise BadSpec(f"{path}.addresses[{index}]", f"{prefix} is outside the range {shown}")
    if len({prefix.address for prefix in fixed}) != len(fixed):
        raise BadSpec(f"{path}.addresses", "the same address is there twice")
    links = fixed + networks
    for index, text in enumerate(interface.gateways):
        gateway = parse_address(text)
        on_link = any(contains(link, gateway) for link in links)
        if links and not on_link and not text.startswith("fe80:"):
            raise BadSpec(
                f"{path}.gateways[{index}]", f"{text} is not on the link of any address given"
            )
    if interface.mtu and interface.mtu < 1280 and any(link.version == 6 for link in links):
        raise BadSpec(f"{path}.mtu", f"IPv6 needs at least 1280, is {interface.mtu}")


_INTERFACE_KEYS = (
    "kind name bridge parent mode hostName mac mtu addresses ranges gateways routes bandwidth peers"
)


def _interface(value: Any, path: str, index: int) -> Interface:
    members = _members(value, _INTERFACE_KEYS, path)
    kind = _choice(members.get("kind", "veth"), KINDS, f"{path}.kind")

    def name_of(key: str, default: str = "") -> str:
        return device_name(members[key], f"{path}.{key}") if key in members else default

    addressed = [] if kind in ("device", "user") else [AUTO]
    interface = Interface(
        kind=kind,
        name=name_of("name", members.get("parent", "") if kind == "device" else f"eth{index}"),
        bridge=name_of("bridge"),
        parent=name_of("parent"),
        mode=_string(members["mode"], f"{path}.mode") if "mode" in members else "",
        host_name=name_of("hostName"),
        mac=_mac(members["mac"], f"{path}.mac") if "mac" in members else "",
        mtu=_integer(members["mtu"], 68, 65535, f"{path}.mtu") if "mtu" in members else 0,
        addresses=_array(
            members.get("addresses", addressed), f"{path}.addresses", _interface_address
        ),
        ranges=_array(members.get("ranges", []), f"{path}.ranges", _network_text),
        gateways=_array(members.get("gateways", []), f"{path}.gateways", _address_text),
        routes=_array(members.get("routes", []), f"{path}.routes", _route),
        bandwidth=_bandwidth(members.get("bandwidth", {}), f"{path}.bandwidth"),
        peers=_array(members.get("peers", []), f"{path}.peers", _network_text),
    )
    if interface.name == "lo":
        raise BadSpec(f"{path}.name", "lo is there already")
    _check_interface(interface, path)
    return interface


def _port_range(text: str) -> range:
    first, dash, last = text.partition("-")
    numbers = (first, last) if dash else (first, first)
    if not all(n.isascii() and n.isdigit() and 1 <= int(n) <= 65535 for n in numbers):
        raise ValueError(f"{text!r} is no port (1 to 65535)")
    if int(numbers[0]) > int(numbers[1]):
        raise ValueError(f"{text!r} ends before it begins")
    return range(int(numbers[0]), int(numbers[1]) + 1)


def parse_port(text: str) -> tuple[Port, ...]:
    """Read [ADDRESS:]HOST[:CONTAINER][/PROTOCOL], each port or a range; raises ValueError."""
    body, slash, protocol = text.partition("/")
    protocol = protocol if slash else "tcp"
    if protocol not in PROTOCOLS:
        raise ValueError(f"{protocol!r} is none of {', '.join(PROTOCOLS)}")
    address = ""
    if body.startswith("["):
        address, bracket, body = body[1:].partition("]:")
        if not bracket:
            raise ValueError(f"{text!r} is not [ADDRESS]:HOST:CONTAINER/PROTOCOL")
        address = str(parse_address(address))
    elif body.count(":") == 2:
        address, _, body = body.partition(":")
        address = str(parse_address(address))
    if address in ("0.0.0.0", "::"):
        address = ""
    outside, colon, inside = body.partition(":")
    host = _port_range(outside)
    container = _port_range(inside) if colon else host
    if len(host) != len(container):
        raise ValueError(f"{text!r} has {len(host)} ports outside and {len(container)} inside")
    return tuple(
        Port(one, other, protocol, address) for one, other in zip(host, container, strict=True)
    )


def _port(value: Any, path: str) -> tuple[Port, ...]:
    if type(value) is str:
        ports: tuple[Port, ...] = _parsed(parse_port, value, path)
        return ports
    members = _members(value, "host container protocol address", path)
    if "host" not in members:
        raise BadSpec(f"{path}.host", "is missing")
    host = _integer(members["host"], 1, 65535, f"{path}.host")
    address = _address_text(members["address"], f"{path}.address") if "address" in members else ""
    return (
        Port(
            host,
            _integer(members.get("container", host), 1, 65535, f"{path}.container"),
            _choice(members.get("protocol", "tcp"), PROTOCOLS, f"{path}.protocol"),
            "" if address in ("0.0.0.0", "::") else address,
        ),
    )


def _ports(value: Any, path: str) -> tuple[Port, ...]:
    ports = [port for group in _array(value, path, _port) for port in group]
    taken: dict[tuple[str, int], set[str]] = {}
    for port in ports:
        addresses = taken.setdefault((port.protocol, port.host), set())
        if addresses and (port.address in addresses or "" in addresses or not port.address):
            raise BadSpec(path, f"port {port.host}/{port.protocol} is published twice")
        addresses.add(port.address)
    return tuple(ports)


def _word(value: Any, path: str) -> str:
    text = _string(value, path)
    if any(c.isspace() or c == "#" for c in text):
        raise BadSpec(path, f"{text!r} is more than one word")
    return text


def _dns(value: Any, path: str) -> Dns | None:
    if value is False:
        return None
    members = _members(value, "nameservers search options", path)
    return Dns(
        _array(members.get("nameservers", []), f"{path}.nameservers", _address_text),
        _array(members.get("search", []), f"{path}.search", _word),
        _array(members.get("options", []), f"{path}.options", _word),
    )


def _sysctls(value: Any, path: str) -> tuple[tuple[str, str], ...]:
    _check_type(value, dict, path)
    for key, text in value.items():
        if not key.startswith("net.") or "/" in key or ".." in key:
            raise BadSpec(_member(path, key), "is not a sysctl of the network namespace (net.…)")
        _string(text, _member(path, key))
    return tuple(value.items())


def _hosts(value: Any, path: str) -> tuple[tuple[str, str], ...]:
    _check_type(value, dict, path)
    return tuple(
        (_word(name, path), _address_text(address, _member(path, name)))
        for name, address in value.items()
    )


_KEYS = "interfaces ports masquerade sysctls dns hosts hostname"


def parse(document: Any, path: str = "kontain.network") -> Network:
    """Read the extension's object (or its short form, a string); raises BadSpec."""
    if type(document) is str:
        document = expand(document, path)
    members = _members(document, _KEYS, path)
    listed = members.get("interfaces", [{"bridge": DEFAULT_BRIDGE}])
    _check_type(listed, list, f"{path}.interfaces")
    interfaces = tuple(
        _interface(one, f"{path}.interfaces[{index}]", index) for index, one in enumerate(listed)
    )
    seen: set[str] = set()
    for index, interface in enumerate(interfaces):
        if interface.name in seen:
            raise BadSpec(f"{path}.interfaces[{index}].name", f"{interface.name!r} is there twice")
        seen.add(interface.name)
    masquerade = members.get("masquerade", True)
    _check_type(masquerade, bool, f"{path}.masquerade")
    ports = _ports(members.get("ports", []), f"{path}.ports")
    kinds = {interface.kind for interface in interfaces}
    if "user" in kinds and len(interfaces) > 1:
        raise BadSpec(f"{path}.interfaces", "a user-mode interface stands alone")
    if ports and not kinds & {"veth", "user"}:
        raise BadSpec(f"{path}.ports", "publishing a port needs a veth or user-mode interface")
    return Network(
        interfaces,
        ports,
        masquerade,
        _sysctls(members.get("sysctls", {}), f"{path}.sysctls"),
        _dns(members.get("dns", {}), f"{path}.dns"),
        _hosts(members.get("hosts", {}), f"{path}.hosts"),
        _word(members["hostname"], f"{path}.hostname") if "hostname" in members else "",
    )


# Short form: key → (property, where it belongs, whether it may be repeated).
_SHORT_INTERFACE = {
    "name": "name",
    "host": "hostName",
    "mac": "mac",
    "mtu": "mtu",
    "mode": "mode",
}
_SHORT_LISTS = {"ip": "addresses", "range": "ranges", "gw": "gateways", "peer": "peers"}
_SHORT_DNS = {"dns": "nameservers", "search": "search", "option": "options"}
_SHORT_KEYS = (
    "name host mac mtu mode ip range gw peer route in out port dns search option hostname sysctl "
    "masquerade"
)


def _expand_head(head: str, path: str) -> dict[str, Any]:
    kind, colon, target = head.partition(":")
    if kind == "bridge":
        return {"kind": "veth", "bridge": target if colon else DEFAULT_BRIDGE}
    if kind == "routed" and not colon:
        return {"kind": "veth"}
    if kind == "user" and not colon:
        return {"kind": "user"}
    if kind in ("macvlan", "ipvlan", "device") and colon:
        return {"kind": kind, "parent": target}
    raise BadSpec(
        path,
        f"{head!r} is no interface",
        "write bridge[:NAME], routed, macvlan:PARENT, ipvlan:PARENT, device:NAME or user",
    )


def expand(text: str, path: str) -> dict[str, Any]:
    """Return the object that the short form stands for; raises BadSpec for an unknown word."""
    document: dict[str, Any] = {"interfaces": []}
    for part in text.split(";"):
        # podman cuts the value of --annotation at commas, so words may stand apart by spaces.
        head, *words = part.replace(",", " ").split() or [""]
        interface = _expand_head(head, path)
        document["interfaces"].append(interface)
        for word in words:
            key, equals, value = word.partition("=")
            if not equals or not value:
                raise BadSpec(path, f"{word!r} is not KEY=VALUE", f"keys: {_SHORT_KEYS}")
            if key == "mtu":
                interface["mtu"] = int(value) if value.isascii() and value.isdigit() else value
            elif key in _SHORT_INTERFACE:
                interface[_SHORT_INTERFACE[key]] = value
            elif key in _SHORT_LISTS:
                interface.setdefault(_SHORT_LISTS[key], []).append(value)
            elif key == "route":
                destination, at, via = value.partition("@")
                route = {"destination": destination, "via": via} if at else {"destination": value}
                interface.setdefault("routes", []).append(route)
            elif key in ("in", "out"):
                side = "ingress" if key == "in" else "egress"
                interface.setdefault("bandwidth", {})[side] = value
            elif key == "port":
                document.setdefault("ports", []).append(value)
            elif key == "dns" and value == "off":
                document["dns"] = False
            elif key in _SHORT_DNS:
                document.setdefault("dns", {}).setdefault(_SHORT_DNS[key], []).append(value)
            elif key == "hostname":
                document["hostname"] = value
            elif key == "sysctl":
                name, colon, setting = value.partition(":")
                if not colon:
                    raise BadSpec(path, f"{word!r} is not sysctl=NAME:VALUE")
                document.setdefault("sysctls", {})[name] = setting
            elif key == "masquerade" and value in ("on", "off"):
                document["masquerade"] = value == "on"
            else:
                raise BadSpec(path, f"{word!r} is not understood", f"keys: {_SHORT_KEYS}")
    return document


def of(spec: Any) -> Network | None:
    """Return the network that a configuration asks for; the annotation wins over the extension.

    OCI's own linux.netDevices are interfaces of kind device.  Raises BadSpec.
    """
    text = (spec.get("annotations") or {}).get(ANNOTATION)
    extension = spec.get("kontain")
    network = None
    if text is not None:
        path = f"annotations[{ANNOTATION}]"
        document: Any = text
        if text.lstrip().startswith("{"):
            try:
                document = jsontext.loads(text)
            except ValueError as error:
                raise BadSpec(path, f"is not JSON: {error}") from None
        network = parse(document, path)
    elif type(extension) is dict and "network" in extension:
        network = parse(extension["network"])
    devices = (spec.get("linux") or {}).get("netDevices")
    if not devices:
        return network
    moved = []
    for name, options in devices.items():
        path = f"linux.netDevices.{name}"
        inside = (options or {}).get("name") or name
        moved.append(Interface("device", device_name(inside, path), parent=device_name(name, path)))
    if network is None:
        return Network(tuple(moved), dns=None)
    return network._replace(interfaces=network.interfaces + tuple(moved))
