"""A host of the tests' own: network and mount namespaces, and a machine outside on a wire.

    containers ── bridge ── host 198.51.100.1 ──── outside 198.51.100.2
                                 fd00:51::1             fd00:51::2

Nothing is seen or changed outside of it: /run is empty, /etc an overlay, the routes are its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from namespaces import Namespaces

REPOSITORY = Path(__file__).resolve().parent.parent.parent
STATE = "/run/krun-network"
OUTSIDE4, OUTSIDE6 = "198.51.100.2", "fd00:51::2"
HOST4, HOST6 = "198.51.100.1", "fd00:51::1"

SETUP = """
set -e
mount -t tmpfs tmpfs /run
mkdir -p /run/overlay/upper /run/overlay/work /run/netns
mount -t overlay overlay -o lowerdir=/etc,upperdir=/run/overlay/upper,workdir=/run/overlay/work /etc
rm -rf /etc/krun
ip link set lo up
ip netns add outside
ip link add wire type veth peer name wire netns outside
ip address add 198.51.100.1/24 dev wire
ip address add fd00:51::1/64 dev wire nodad
ip link set wire up
ip -n outside link set lo up
ip -n outside address add 198.51.100.2/24 dev wire
ip -n outside address add fd00:51::2/64 dev wire nodad
ip -n outside link set wire up
echo ready
exec cat
"""

# Serve one connection and say who came; the answer is the client's address.
SERVER = """
import socket, sys
family = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET
server = socket.create_server((sys.argv[1], int(sys.argv[2])), family=family)
print("ready", flush=True)
while True:
    connection, client = server.accept()
    with connection:
        connection.sendall(client[0].encode())
"""
CLIENT = """
import socket, sys
with socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=float(sys.argv[3])) as s:
    print(s.makefile().read())
"""
# Claim a network as create does; print the configuration, the time and what was imported.
CLAIM = """
import json, sys, time
spec, id, root = json.loads(sys.argv[1]), sys.argv[2], sys.argv[3]
from krun import network
from krun.errors import KrunError
start = time.perf_counter()
try:
    spec = network.claim(spec, id, root)
except KrunError as error:
    sys.exit(str(error))
milliseconds = (time.perf_counter() - start) * 1000
print(json.dumps({"spec": spec, "ms": milliseconds, "modules": sorted(sys.modules)}))
"""
RELEASE = "import sys\nfrom krun import network\nnetwork.release(sys.argv[1], sys.argv[2])\n"


class Container:
    """A claimed network, with a state directory that stands for the container's."""

    def __init__(self, host: Host, id: str, claimed: dict[str, Any]) -> None:
        self.host = host
        self.id = id
        self.spec = claimed["spec"]
        self.ms = claimed["ms"]
        self.modules = set(claimed["modules"])
        namespaces = self.spec["linux"]["namespaces"]
        self.namespace = next(n["path"] for n in namespaces if n["type"] == "network")
        self.member = self.namespace.rpartition("/")[2]
        self.record: dict[str, Any] = json.loads(host.krun("network", "inspect", id).stdout)

    @property
    def addresses(self) -> list[str]:
        """The container's addresses, without prefix lengths."""
        found = [a for one in self.record["interfaces"] for a in one["addresses"]]
        return [text.partition("/")[0] for text in found]

    def address(self, version: int) -> str:
        """The container's first address of a family."""
        return next(a for a in self.addresses if (":" in a) == (version == 6))

    def inside(self, *argv: object) -> list[str]:
        """The command line that runs argv in the container's network."""
        return self.host.inside("nsenter", f"--net={self.namespace}", "--", *argv)

    def run(self, *argv: object, status: int = 0) -> str:
        """Run argv in the container's network; return its output."""
        done = subprocess.run(self.inside(*argv), capture_output=True, text=True, timeout=20)
        assert done.returncode == status, done.stderr
        return done.stdout

    def delete(self) -> None:
        """Delete the container and release its network."""
        os.rmdir(f"{self.host.root}/{self.id}")
        self.host.python(RELEASE, self.id, self.host.root)


class Host(Namespaces):
    """The namespaces; they go when this process goes."""

    def __init__(self, directory: Path) -> None:
        self.root = str(directory / "root")
        os.mkdir(self.root)
        self.servers: list[subprocess.Popen[str]] = []
        super().__init__(["--mount", "--net"], SETUP)
        self.environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}

    def close(self) -> None:
        """End the namespaces and every server in them."""
        for server in self.servers:
            server.kill()
            server.wait()
        super().close()

    def run(self, *argv: object, status: int | None = 0) -> subprocess.CompletedProcess[str]:
        """Run argv on the host to its end, which must be `status` (None: any)."""
        done = subprocess.run(
            self.inside(*argv), capture_output=True, text=True, env=self.environment, timeout=60
        )
        if status is not None and done.returncode != status:
            raise AssertionError(f"{argv}: {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done

    def krun(self, *argv: object, status: int | None = 0) -> subprocess.CompletedProcess[str]:
        """Run krun on the host."""
        return self.run(sys.executable, "-m", "krun", *argv, status=status)

    def python(self, program: str, *argv: object, status: int | None = 0) -> Any:
        """Run a Python program on the host."""
        return self.run(sys.executable, "-c", program, *argv, status=status)

    def claim_words(self, id: str, request: Any, spec: dict[str, Any] | None = None) -> list[str]:
        """The command line that claims a network."""
        document: dict[str, Any] = {
            "hostname": id,
            "linux": {"namespaces": [{"type": "mount"}, {"type": "network"}]},
            **(spec or {}),
        }
        if request is not None:
            document["kontain"] = {"network": request}
        return [sys.executable, "-c", CLAIM, json.dumps(document), id, self.root]

    def claim(self, id: str, request: Any, spec: dict[str, Any] | None = None) -> Container:
        """Make a container: its network, and then a state directory as the engine does."""
        done = self.run(*self.claim_words(id, request, spec))
        os.mkdir(f"{self.root}/{id}")
        return Container(self, id, json.loads(done.stdout))

    def refuses(self, id: str, request: Any, spec: dict[str, Any] | None = None) -> str:
        """Claim what krun must refuse; return its words."""
        done = self.run(*self.claim_words(id, request, spec), status=1)
        lines: list[str] = done.stderr.strip().splitlines()
        assert len(lines) == 1, done.stderr
        return lines[0]

    def serve(self, argv: list[str], address: str, port: int) -> None:
        """Serve on an address, from the command line prefix argv; returns once it listens."""
        server = subprocess.Popen(
            [*argv, sys.executable, "-c", SERVER, address, str(port)],
            stdout=subprocess.PIPE,
            text=True,
        )
        self.servers.append(server)
        assert server.stdout is not None
        assert server.stdout.readline() == "ready\n"

    def fetch(self, argv: list[str], address: str, port: int, timeout: float = 5) -> str | None:
        """Connect from the prefix argv; return whom the server saw, None for nobody."""
        command = [*argv, sys.executable, "-c", CLIENT, address, str(port), str(timeout)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
        return done.stdout.strip() if done.returncode == 0 else None

    @property
    def outside(self) -> list[str]:
        """The prefix of a command that runs on the machine outside."""
        return self.inside("ip", "netns", "exec", "outside")

    def devices(self) -> set[str]:
        """The host's network devices."""
        listed = json.loads(self.run("ip", "-j", "link").stdout)
        return {one["ifname"] for one in listed}

    def left(self) -> dict[str, Any]:
        """Return all that krun's networks have on the host, empty where there is nothing."""
        names = self.run("find", STATE, "-mindepth", "2", "-not", "-path", "*/networks/*").stdout
        leases = self.run("cat", f"{STATE}/leases.json", status=None).stdout
        mounts = self.run("cat", "/proc/self/mounts").stdout
        rules = self.run("nft", "-j", "list", "ruleset").stdout
        found = {
            "records": [n for n in names.split() if not n.startswith(f"{STATE}/containers/%")],
            "containers": [n for n in names.split() if n.count("/") > 4],
            "leases": json.loads(leases)["leases"] if leases else {},
            "mounts": [line for line in mounts.splitlines() if f"{STATE}/netns" in line],
            "links": sorted(d for d in self.devices() if d.startswith("krun")),
            "elements": rules.count('"comment"'),
        }
        return {key: value for key, value in found.items() if value}

    def is_clean(self) -> bool:
        """Whether nothing of any member is left."""
        return not self.left()
