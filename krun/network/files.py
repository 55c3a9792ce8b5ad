"""resolv.conf, hosts and hostname of a container; pure but for writing them."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from krun.network.model import Dns, Network
    from krun.types import Mount, Spec

RESOLV_CONF = "/etc/resolv.conf"
HOSTS = "/etc/hosts"
HOSTNAME = "/etc/hostname"
# systemd-resolved's own list, for a host whose resolv.conf names only its loopback stub.
_UPSTREAM = "/run/systemd/resolve/resolv.conf"


def reachable(text: str) -> str:
    """Return a resolv.conf without the servers that only the host's loopback reaches.  Pure."""
    kept = []
    for line in text.splitlines():
        words = line.split()
        if words[:1] == ["nameserver"] and (
            len(words) < 2 or words[1].startswith("127.") or words[1] == "::1"
        ):
            continue
        kept.append(line)
    return "\n".join(kept) + "\n" if kept else ""


def resolv_conf(dns: Dns, host: str) -> str:
    """Return the text of resolv.conf; `host` is the host's own.  Pure."""
    if not dns.nameservers:
        base = reachable(host)
        words = ("search", "options")
        given = {word for word in words if getattr(dns, word)}
        lines = [line for line in base.splitlines() if (line.split() or [""])[0] not in given]
    else:
        lines = [f"nameserver {server}" for server in dns.nameservers]
    if dns.search:
        lines.append("search " + " ".join(dns.search))
    if dns.options:
        lines.append("options " + " ".join(dns.options))
    return "\n".join(lines) + "\n" if lines else ""


_LOCALHOST = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n"


def hosts(network: Network, hostname: str, addresses: tuple[str, ...], base: str = "") -> str:
    """Return the text of hosts(5): `base` (or localhost), the container, the names asked for.

    Pure.  What base says of the container's own name is left out, as it predates the network.
    """
    kept = [line for line in base.splitlines() if not hostname or hostname not in line.split()]
    text = "\n".join(kept) + "\n" if kept else _LOCALHOST
    if hostname:
        text += "".join(f"{address}\t{hostname}\n" for address in addresses)
    return text + "".join(f"{address}\t{name}\n" for name, address in network.hosts)


def host_resolv_conf() -> str:
    """Return what the host asks for names."""
    text = ""
    for path in (RESOLV_CONF, _UPSTREAM):
        try:
            with open(path, encoding="utf-8", errors="replace") as file:
                text = file.read()
        except OSError:
            continue
        if "nameserver" in reachable(text):
            break
    return text


def _shown_already(spec: Spec) -> dict[str, str]:
    """Return the text of each file under /etc that the configuration mounts itself."""
    shown = {}
    for mount in spec.get("mounts") or []:
        if mount.get("destination") in (RESOLV_CONF, HOSTS, HOSTNAME):
            try:
                with open(mount.get("source", ""), encoding="utf-8", errors="replace") as file:
                    shown[mount["destination"]] = file.read()
            except OSError:
                continue
    return shown


def texts(
    network: Network, hostname: str, addresses: tuple[str, ...], shown: dict[str, str], host: str
) -> dict[str, str]:
    """Return the files to mount; `shown` are those that podman or docker mount already.  Pure.

    They write their users' --dns and --add-host there, so these are kept.
    """
    made = {}
    if network.dns is not None:
        caller = shown.get(RESOLV_CONF, "")
        if network.dns.nameservers or "nameserver" not in reachable(caller):
            made[RESOLV_CONF] = resolv_conf(network.dns, host)
    base = shown.get(HOSTS, "")
    made[HOSTS] = hosts(network, hostname, addresses, base)
    if hostname and (network.hostname or HOSTNAME not in shown):
        made[HOSTNAME] = hostname + "\n"
    return made


def write(directory: str, spec: Spec, network: Network, addresses: tuple[str, ...]) -> list[Mount]:
    """Write the files into a member's directory; return the mounts that show them."""
    if network.dns is None and not network.hosts and not network.hostname:
        return []
    hostname = network.hostname or spec.get("hostname") or ""
    host = host_resolv_conf() if network.dns is not None else ""
    mounts: list[Mount] = []
    shown = _shown_already(spec)
    for destination, text in texts(network, hostname, addresses, shown, host).items():
        path = f"{directory}/{destination.rpartition('/')[2]}"
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
        mounts.append(
            {
                "destination": destination,
                "type": "bind",
                "source": path,
                "options": ["bind", "nosuid", "nodev", "noexec"],
            }
        )
    return mounts
