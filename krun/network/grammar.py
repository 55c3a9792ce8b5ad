"""The verbs of `krun network`."""

from __future__ import annotations

from krun.grammar import Argument, Command, Option

_FORMAT = Option(("--format", "-f"), "table or json", "FORMAT", "table", choices=("table", "json"))
_MODULE = "krun.commands.network"

COMMANDS = (
    Command(
        "ls",
        "list the networks, or the containers of one with addresses and counters",
        (Argument("NETWORK", "?"),),
        (_FORMAT,),
        module=_MODULE,
        examples=("krun network ls", "krun network ls krun0 --format json"),
    ),
    Command(
        "inspect",
        "print all about a network, or about a container's interfaces, as JSON",
        (Argument("NAME"),),
        module=_MODULE,
        examples=("krun network inspect krun0", "krun network inspect web1"),
    ),
    Command(
        "create",
        "define a network; its bridge and rules are made on first use",
        (Argument("NETWORK"),),
        (
            Option(("--range",), "addresses of the network, as 10.91.7.0/24", "CIDR", repeat=True),
            Option(
                ("--gateway",),
                "the bridge's address in a range (default its first)",
                "ADDRESS",
                repeat=True,
            ),
            Option(("--mtu",), "MTU of the bridge and its containers", "BYTES", integer=True),
            Option(("--no-masquerade",), "leave the containers' addresses on packets that leave"),
        ),
        detail=(
            "NETWORK is the bridge's name. Without --range a free one is taken, for IPv4 and "
            "IPv6. The definition is kept in /etc/krun/networks."
        ),
        module=_MODULE,
        examples=("krun network create kbr0 --range 10.91.7.0/24 --range fd91:7::/64",),
    ),
    Command(
        "rm",
        "remove a network: its pool, bridge, rules and definition",
        (Argument("NETWORK"),),
        (Option(("--force", "-f"), "also take the network away from containers that have it"),),
        module=_MODULE,
        examples=("krun network rm kbr0",),
    ),
    Command(
        "pool",
        "keep namespaces ready, so that a start need not wait for its network",
        (Argument("INTERFACE", "?"),),
        (
            Option(
                ("--size", "-s"), "namespaces to have ready; 0 ends the pool", "N", integer=True
            ),
            Option(("--keep",), "stay, and refill the pool at once when one is taken"),
            Option(("--refill",), "refill a pool in the background's priority, by its key", "KEY"),
            _FORMAT,
        ),
        detail=(
            "INTERFACE is the short form of one interface, such as bridge:kbr0,mtu=1400 (default "
            "bridge:krun0). Without --size the pools are listed. A pool that is half empty is "
            "refilled by a process that the next create starts."
        ),
        module=_MODULE,
        examples=("krun network pool bridge:kbr0 --size 16", "krun network pool"),
    ),
    Command(
        "attach",
        "finish a container's network; krun's own hook, with the container's state on stdin",
        (Argument("RECORD"),),
        module=_MODULE,
    ),
    Command(
        "gc",
        "remove what killed processes left: interfaces, namespaces, leases, rules",
        (),
        (_FORMAT,),
        module=_MODULE,
        examples=("krun network gc",),
    ),
)
