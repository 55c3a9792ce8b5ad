"""A machine of the tests' own: a private mount namespace with clients that keep to one directory.

In it /etc is an overlay (so that a policy, subordinate ids and users can be written without the
host noticing), /run/krun and /var/lib/krun are empty, and the cgroup layout is one that crun takes.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pty
import select
import shlex
import shutil
import subprocess
import tarfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import installed
from namespaces import Namespaces

REPOSITORY = Path(__file__).resolve().parent.parent.parent
# The machine's ordinary user, with subordinate ids.
TESTER = 4711
IMAGE = "localhost/krun-test:latest"
PAUSE_IMAGE = "localhost/krun-pause:latest"
USER = 1000

# crun 1.8 refuses the hybrid layout: here is a v1 layout of the same controllers, in a directory
# of its own, since dockerd and others make directories there, over which podman stumbles.
SETUP = r"""
set -e
if [ "$(stat --file-system --format %T /sys/fs/cgroup)" = tmpfs ]; then
  mkdir "$1/cgroup"
  mount -t tmpfs -o mode=755 tmpfs "$1/cgroup"
  mkdir "$1/cgroup/unified"
  sed -n 's|^.* /sys/fs/cgroup/\([^ /]*\) .* - cgroup .*$|\1|p' /proc/self/mountinfo |
    while read -r name; do
      mkdir "$1/cgroup/$name"
      mount --bind "/sys/fs/cgroup/$name" "$1/cgroup/$name"
    done
  umount -l /sys/fs/cgroup
  mount --rbind "$1/cgroup" /sys/fs/cgroup
  umount -l "$1/cgroup"
fi
mount -t overlay overlay -o lowerdir=/etc,upperdir="$1/etc",workdir="$1/work" /etc
rm -rf /etc/krun && mkdir /etc/krun
mount -t tmpfs -o mode=711 tmpfs /run/krun
mount -t tmpfs -o mode=755 tmpfs /var/lib/krun
printf 'containers:1000000:400000\ntester:2000000:65536\n' | tee /etc/subuid > /etc/subgid
echo 'tester:x:4711:4711::/tmp:/bin/sh' >> /etc/passwd
echo 'tester:x:4711:' >> /etc/group
eval "$2"
echo ready
exec cat
"""


def finished(
    done: subprocess.CompletedProcess[str], status: int | None
) -> subprocess.CompletedProcess[str]:
    """Return `done` if it ended with `status` (None: any), else fail with all it said."""
    if status is not None and done.returncode != status:
        raise AssertionError(
            f"{' '.join(map(str, done.args))}\nended with {done.returncode}, not {status}\n"
            f"stdout: {done.stdout}\nstderr: {done.stderr}"
        )
    return done


def wait_for(what: str, condition: Any, seconds: float = 20) -> Any:
    """Return the first true value of condition(); fail after `seconds`."""
    end = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > end:
            raise AssertionError(f"not within {seconds} s: {what}")
        time.sleep(0.02)


def cgroups(name: str) -> list[str]:
    """The cgroup directories that carry a container's id, inner ones first."""
    found = []
    for directory, children, _ in os.walk("/sys/fs/cgroup", topdown=False):
        found += [f"{directory}/{child}" for child in children if name in child]
    return found


class Machine(Namespaces):
    """The mount namespace; with `wires`, commands that make its network, one of that too."""

    def __init__(self, directory: Path, wires: str = "") -> None:
        self.directory = directory
        os.makedirs("/run/krun", mode=0o711, exist_ok=True)
        os.makedirs("/var/lib/krun", mode=0o755, exist_ok=True)
        for name in ("etc", "work"):
            (directory / name).mkdir()
        options = ["--mount", "--net"] if wires else ["--mount"]
        super().__init__(options, SETUP, str(directory), wires)

    def run(
        self, *argv: object, status: int | None = 0, timeout: float = 60, **keywords: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run argv in the namespace to its end, which must be `status` (None: any)."""
        if "input" not in keywords:
            keywords.setdefault("stdin", subprocess.DEVNULL)
        done = subprocess.run(
            self.inside(*argv),
            text=True,
            errors="surrogateescape",
            timeout=timeout,
            **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | keywords,
        )
        return finished(done, status)

    def run_in_terminal(
        self, *argv: object, after: str = "", typed: str = "", timeout: float = 20
    ) -> tuple[int, str]:
        """Run argv on a new pseudo-terminal; type `typed` after the output `after`.

        Return (status, output).
        """
        pid, master = pty.fork()
        if pid == 0:
            command = self.inside(*argv)
            os.execvp(command[0], command)
        output = b""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            if not select.select([master], [], [], 0.5)[0]:
                continue
            try:
                part = os.read(master, 65536)
            except OSError:
                break
            if not part:
                break
            output += part
            if typed and after.encode() in output:
                os.write(master, typed.encode())
                typed = ""
        else:
            os.kill(pid, 9)
        os.close(master)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        return status, output.decode(errors="replace").replace("\r\n", "\n")

    def write(self, path: str, text: str, mode: int = 0o644) -> None:
        """Write a file as the namespace sees it (below /etc, for one)."""
        self.run("sh", "-c", 'cat > "$0" && chmod "$1" "$0"', path, f"{mode:o}", input=text)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a daemon of ours and wait for it."""
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


class Record:
    """What the km stand-in wrote down in one test; nothing, where km is real."""

    def __init__(self, path: Path, km_is_real: bool) -> None:
        self.path = path
        self.km_is_real = km_is_real
        path.touch()
        path.chmod(0o666)

    @property
    def volume(self) -> str:
        """The value of podman's and docker's --volume."""
        return f"{self.path}:/km-record"

    @property
    def lines(self) -> list[dict[str, Any]]:
        """Each start of km, in order; a line that is being written is not one yet."""
        text = self.path.read_text(errors="surrogateescape")
        return [json.loads(line) for line in text.splitlines(keepends=True) if line[-1] == "\n"]

    def last(self) -> dict[str, Any] | None:
        """The last start of km; None with a real km.  Fails if km was not started."""
        if self.km_is_real:
            return None
        assert self.lines, "no km was started: the payload did not run in a VM"
        return self.lines[-1]

    def count(self, number: int) -> None:
        """Check how many km were started."""
        if not self.km_is_real:
            assert len(self.lines) == number

    def wait(self, number: int) -> None:
        """Wait until that many km were started."""
        if not self.km_is_real:
            wait_for(f"{number} starts of km", lambda: len(self.lines) >= number)


def make_launcher(path: Path, engine: str, *options: str) -> Path:
    """The installed krun with one engine."""
    words = [str(installed.launcher()), "--engine", engine, *options]
    path.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
    path.chmod(0o755)
    return path


def make_containers_conf(path: Path, runtime: str) -> Path:
    """podman's settings with `runtime` under the name krun, which podman treats specially."""
    path.write_text(
        '[containers]\ndefault_ulimits = ["nofile=1024:1024", "nproc=1024:1024"]\n'
        '[engine]\ncgroup_manager = "cgroupfs"\nevents_logger = "file"\n'
        f'[engine.runtimes]\nkrun = ["{runtime}"]\ncrun = ["/usr/bin/crun"]\n'
    )
    path.chmod(0o644)
    return path


def make_rootfs(directory: Path, payload: Path) -> Path:
    """A root filesystem: a static busybox with its links, /payload, and what tests stumble over."""
    busybox = shutil.which("busybox")
    assert busybox, "busybox-static is needed (Debian package busybox-static)"
    for name in ("bin", "etc", "proc", "sys", "dev", "tmp", "root", "run", "var", "data"):
        (directory / name).mkdir(parents=True)
    (directory / "tmp").chmod(0o1777)
    shutil.copy(busybox, directory / "bin/busybox")
    applets = subprocess.run([busybox, "--list"], capture_output=True, text=True, check=True)
    for applet in applets.stdout.split():
        if applet != "busybox":
            (directory / "bin" / applet).symlink_to("busybox")
    shutil.copy(payload, directory / "payload")
    shutil.copy(payload, directory / "bin/in-path")
    (directory / "bin/a-link").symlink_to("../payload")
    (directory / "script").write_text("#! /payload args\n")
    (directory / "script").chmod(0o755)
    (directory / "not-executable").write_text("text\n")
    (directory / "text").write_text("neither an ELF file nor a script, but executable\n" * 3)
    (directory / "text").chmod(0o755)
    # A km snapshot is an ELF core file.
    header = b"\x7fELF\x02\x01\x01" + bytes(9) + (4).to_bytes(2, "little") + b"\x3e\x00"
    (directory / "snapshot").write_bytes(header + bytes(100))
    (directory / "snapshot").chmod(0o755)
    (directory / "etc/passwd").write_text(
        "root:x:0:0:root:/root:/bin/sh\nguest:x:1000:1000:guest:/data:/bin/sh\n"
    )
    (directory / "etc/group").write_text("root:x:0:\nguest:x:1000:\n")
    return directory


def make_image(path: Path, rootfs: Path, name: str, command: list[str]) -> Path:
    """A docker archive of rootfs, which podman, docker and containerd all load."""
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as archive:
        archive.add(rootfs, arcname=".")
    diff = hashlib.sha256(layer.getvalue()).hexdigest()
    config = json.dumps(
        {
            "architecture": "amd64",
            "os": "linux",
            "config": {"Cmd": command, "Env": ["PATH=/bin", "FROM=image"]},
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{diff}"]},
        }
    ).encode()
    digest = f"{hashlib.sha256(config).hexdigest()}.json"
    manifest = json.dumps([{"Config": digest, "RepoTags": [name], "Layers": ["layer.tar"]}])
    with tarfile.open(path, "w") as archive:
        for member, content in (
            ("layer.tar", layer.getvalue()),
            (digest, config),
            ("manifest.json", manifest.encode()),
        ):
            entry = tarfile.TarInfo(member)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


class Client:
    """A client's command with its fixed options."""

    def __init__(self, machine: Machine, argv: Sequence[object], env: dict[str, str]) -> None:
        self.machine = machine
        self.argv = list(map(str, argv))
        self.env = env

    def __call__(self, *argv: object, **keywords: Any) -> subprocess.CompletedProcess[str]:
        return self.machine.run(*self.argv, *argv, env=os.environ | self.env, **keywords)

    def terminal(self, *argv: object, after: str = "", typed: str = "") -> tuple[int, str]:
        """Run on a new pseudo-terminal, see Machine.run_in_terminal."""
        settings = [f"{name}={value}" for name, value in self.env.items()]
        command = ["env", *settings, *self.argv, *argv]
        return self.machine.run_in_terminal(*command, after=after, typed=typed)


def as_tester(home: Path, *environment: str) -> list[object]:
    """The beginning of the ordinary user's command lines, in a home that is made if needed."""
    for directory in (home, home / "run"):
        directory.mkdir(exist_ok=True)
        os.chown(directory, TESTER, TESTER)
    user = ["setpriv", "--reuid", TESTER, "--regid", TESTER, "--clear-groups", "env", "-i"]
    user += ["-C", home, f"HOME={home}", f"XDG_RUNTIME_DIR={home}/run"]
    return [*user, "PATH=/usr/sbin:/usr/bin:/sbin:/bin", *environment]


def rootless_podman(machine: Machine, home: Path, engine: str) -> Client:
    """The ordinary user's podman --runtime krun, with the tests' image."""
    conf = home / "containers.conf"
    user = as_tester(home, f"CONTAINERS_CONF={conf}")
    make_containers_conf(conf, str(machine.directory / f"krun-{engine}"))
    client = Client(machine, [*user, "podman", "--runtime", "krun"], {})
    client("load", "-q", "-i", machine.directory / "image.tar")
    return client


def remove_rootless(podman: Client, home: Path) -> None:
    """Remove what an ordinary user's podman has, and the process that keeps its namespaces."""
    podman("rm", "-f", "-t", "0", "--all", status=None)
    podman("unshare", "rm", "-rf", home / ".local", status=None)
    podman("system", "migrate", status=None)


@contextmanager
def dockerd(machine: Machine, runtimes: dict[str, Any]) -> Iterator[Client]:
    """docker with the tests' image, and a dockerd of its own with these runtimes."""
    home = machine.directory / "docker"
    home.mkdir()
    limit = {"nofile": {"Name": "nofile", "Hard": 1024, "Soft": 1024}}
    (home / "daemon.json").write_text(json.dumps({"runtimes": runtimes, "default-ulimits": limit}))
    socket = f"unix://{home}/socket"
    options = ["--config-file", home / "daemon.json", "--data-root", home / "root"]
    options += ["--exec-root", home / "exec", "-H", socket, "-p", home / "pid"]
    options += ["--iptables=false", "--bridge=none"]
    program = "/usr/bin/docker" if os.path.exists("/usr/bin/docker") else "docker"
    client = Client(machine, [program, "-H", socket], {})
    with _daemon(client, home, "dockerd", *options):
        client("load", "-i", machine.directory / "image.tar")
        yield client
        ids = client("ps", "-aq").stdout.split()
        if ids:
            client("rm", "-f", *ids, status=None)


@contextmanager
def containerd(machine: Machine, home: Path, settings: str, *options: str) -> Iterator[Client]:
    """ctr (with options) with the tests' image, and a containerd of its own in a new directory."""
    home.mkdir()
    (home / "config.toml").write_text(
        f'version = 2\nroot = "{home}/root"\nstate = "{home}/state"\n{settings}'
        f'[grpc]\n  address = "{home}/socket"\n'
    )
    client = Client(machine, ["ctr", "-a", f"{home}/socket", *options], {})
    with _daemon(client, home, "containerd", "-c", home / "config.toml"):
        client("images", "import", machine.directory / "image.tar")
        yield client


@contextmanager
def _daemon(client: Client, home: Path, *argv: object) -> Iterator[None]:
    """A daemon that runs until its client needs it no more."""
    with open(home / "log", "wb") as log:
        daemon = subprocess.Popen(client.machine.inside(*argv), stdout=log, stderr=log)

    def answers() -> bool:
        assert daemon.poll() is None, (home / "log").read_text()[-2000:]
        return client("version", status=None).returncode == 0

    try:
        wait_for(f"{argv[0]} answers", answers)
        yield
    finally:
        stop(daemon)
