"""Real parts for the image tests: docker-registry, podman, dockerd, containerd, own roots."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import random
import shutil
import socket
import subprocess
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import requests
from e2e.machine import stop

MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
CONFIG = "application/vnd.docker.container.image.v1+json"
LAYER = "application/vnd.docker.image.rootfs.diff.tar.gzip"
# Every store, and a registry to pull from; who may use them.
STORES = ("podman", "dockerd", "containerd", "ctr", "docker-registry")
ROOT = "daemons, image stores"


def wait_for(ready: Callable[[], bool], what: str, process: subprocess.Popen[bytes]) -> None:
    """Poll until a started daemon answers; its early death or 30 s of silence is an error."""
    deadline = time.monotonic() + 30
    while not ready():
        if process.poll() is not None:
            raise RuntimeError(f"{what} ended with {process.returncode} while starting")
        if time.monotonic() > deadline:
            stop(process)
            raise RuntimeError(f"{what} did not answer within 30 s")
        time.sleep(0.02)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def layer(name: str, size: int = 2000, *, seed: str = "") -> bytes:
    """A tar.gz of one file whose incompressible content follows from the name."""
    content = random.Random(seed or name).randbytes(size)
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as tar:
        info = tarfile.TarInfo(f"data/{name}")
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
    return gzip.compress(raw.getvalue(), 1, mtime=0)


def busybox_layer() -> bytes:
    """A tar.gz of the static busybox as /bin/sh and /bin/true."""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as tar:
        for name in ("sh", "true"):
            info = tarfile.TarInfo(f"bin/{name}")
            info.mode = 0o755
            info.size = Path("/bin/busybox").stat().st_size
            with open("/bin/busybox", "rb") as file:
                tar.addfile(info, file)
    return gzip.compress(raw.getvalue(), 1, mtime=0)


class Registry:
    """A docker-registry on a loopback port; `stop` and `start` keep its content."""

    def __init__(
        self, base: Path, *, users: dict[str, str] | None = None, tls: bool = False
    ) -> None:
        self.base = base
        self.port = free_port()
        self.host = f"127.0.0.1:{self.port}"
        self.auth = next(iter(users.items())) if users else None
        self.ca: Path | None = None
        base.mkdir(parents=True)
        config = {
            "version": "0.1",
            "log": {"level": "error", "accesslog": {"disabled": True}},
            "storage": {
                "filesystem": {"rootdirectory": str(base / "data")},
                "delete": {"enabled": True},
            },
            "http": {"addr": self.host},
        }
        if users:
            lines = [
                subprocess.run(
                    ["htpasswd", "-Bbn", name, password], check=True, capture_output=True, text=True
                ).stdout
                for name, password in users.items()
            ]
            (base / "htpasswd").write_text("".join(lines))
            config["auth"] = {"htpasswd": {"realm": "test", "path": str(base / "htpasswd")}}
        if tls:
            self.ca = base / "ca.crt"
            subprocess.run(
                ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
                 "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1",
                 "-keyout", str(base / "key.pem"), "-out", str(self.ca)],
                check=True, capture_output=True,
            )  # fmt: skip
            config["http"]["tls"] = {  # type: ignore[index]
                "certificate": str(self.ca),
                "key": str(base / "key.pem"),
            }
        self.url = f"{'https' if tls else 'http'}://{self.host}"
        (base / "config.yml").write_text(json.dumps(config))
        self.http = requests.Session()
        # REQUESTS_CA_BUNDLE would win over `verify`.
        self.http.trust_env = False
        self.http.auth = self.auth
        self.http.verify = str(self.ca) if self.ca else True
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(
            ["docker-registry", "serve", str(self.base / "config.yml")],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_for(self._answers, "docker-registry", self.process)

    def _answers(self) -> bool:
        try:
            return self.http.get(f"{self.url}/v2/", timeout=5).status_code == 200
        except requests.ConnectionError:
            return False

    def stop(self) -> None:
        stop(self.process)

    def push(self, name: str, tag: str, layers: Sequence[bytes], **config: object) -> str:
        """Upload an image built from layers and return its manifest's digest."""
        document = {
            "architecture": "amd64",
            "os": "linux",
            "config": {"Cmd": ["/none"]},
            "rootfs": {"type": "layers", "diff_ids": [digest(gzip.decompress(b)) for b in layers]},
            **config,
        }
        blob = json.dumps(document, sort_keys=True).encode()
        for data in (blob, *layers):
            self._upload(name, data)
        manifest = json.dumps(
            {
                "schemaVersion": 2,
                "mediaType": MANIFEST,
                "config": {"mediaType": CONFIG, "size": len(blob), "digest": digest(blob)},
                "layers": [
                    {"mediaType": LAYER, "size": len(b), "digest": digest(b)} for b in layers
                ],
            }
        ).encode()
        self.http.put(
            f"{self.url}/v2/{name}/manifests/{tag}",
            data=manifest,
            headers={"Content-Type": MANIFEST},
        ).raise_for_status()
        return digest(manifest)

    def _upload(self, name: str, data: bytes) -> None:
        if self.http.head(f"{self.url}/v2/{name}/blobs/{digest(data)}").status_code == 200:
            return
        begun = self.http.post(f"{self.url}/v2/{name}/blobs/uploads/")
        begun.raise_for_status()
        self.http.put(
            begun.headers["Location"],
            params={"digest": digest(data)},
            data=data,
            headers={"Content-Type": "application/octet-stream"},
        ).raise_for_status()


@contextmanager
def registry(
    base: Path, *, users: dict[str, str] | None = None, tls: bool = False
) -> Iterator[Registry]:
    """Run a docker-registry for the length of the block."""
    served = Registry(base, users=users, tls=tls)
    try:
        yield served
    finally:
        served.stop()


@contextmanager
def slowed(host: str, rate: int, sizes: list[int] | None = None) -> Iterator[str]:
    """Yield another address of a loopback server, whose answers come at `rate` bytes a second.

    What is sent is added to `sizes`.
    """
    name, _, port = host.rpartition(":")
    listener = socket.create_server(("127.0.0.1", 0))

    def copy(source: socket.socket, target: socket.socket, pace: int) -> None:
        with suppress(OSError):
            while data := source.recv(min(65536, pace // 10 or 65536)):
                if pace and sizes is not None:
                    sizes.append(len(data))
                target.sendall(data)
                time.sleep(len(data) / pace if pace else 0)
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def serve() -> None:
        with suppress(OSError):
            while True:
                client, _ = listener.accept()
                server = socket.create_connection((name, int(port)))
                for source, target, pace in ((client, server, 0), (server, client, rate)):
                    threading.Thread(target=copy, args=(source, target, pace), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield f"127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def processes_of(word: str) -> list[str]:
    """Return the command lines that name a directory, such as the root of a store."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) != os.getpid():
            try:
                words = Path(f"/proc/{entry}/cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            line = " ".join(map(os.fsdecode, words))
            if word in line:
                found.append(line)
    return found


def wait_until(true: Callable[[], bool], seconds: float = 20) -> bool:
    """Poll until something is true; return whether it came true in time."""
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


@contextmanager
def small_disk(size: int) -> Iterator[Path]:
    """Mount a file system of so many bytes, in a short path: podman wants its --runroot short."""
    disk = Path(tempfile.mkdtemp(prefix="krun-disk-"))
    image = Path(tempfile.mkstemp(prefix="krun-disk-")[1])
    try:
        os.truncate(image, size)
        subprocess.run(["mkfs.ext4", "-q", "-m0", str(image)], check=True)
        subprocess.run(["mount", "-o", "loop", str(image), str(disk)], check=True)
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
        disk.rmdir()
        image.unlink()


@contextmanager
def small_tmpfs(path: Path, size: int) -> Iterator[Path]:
    """Mount a tmpfs of so many bytes on a directory."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


def podman_settings(base: Path) -> dict[str, object]:
    """Return the settings of a podman with its own root; images.toml's [podman] table."""
    return {
        "root": str(base / "root"),
        "runroot": str(base / "run"),
        "options": ["--cgroup-manager=cgroupfs"],
    }


def remove_podman(base: Path) -> None:
    """Remove a podman root with its containers and mounts."""
    subprocess.run(
        ["podman", f"--root={base}/root", f"--runroot={base}/run", "--cgroup-manager=cgroupfs",
         "rm", "--all", "--force"],
        capture_output=True,
    )  # fmt: skip
    remove_tree(base)


@contextmanager
def podman() -> Iterator[dict[str, object]]:
    """Give a podman a root of its own, in a short path: it refuses a --runroot over 50 bytes."""
    base = Path(tempfile.mkdtemp(prefix="krun-podman-"))
    try:
        yield podman_settings(base)
    finally:
        remove_podman(base)


def remove_tree(base: Path) -> None:
    """Remove a daemon's directory with the mounts that it left: dockerd keeps its root mounted."""
    mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    for mount in sorted(mounts, reverse=True):
        if mount.startswith(f"{base}/"):
            subprocess.run(["umount", "-l", mount], capture_output=True)
    shutil.rmtree(base, ignore_errors=True)


def _unix_answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as s:
        try:
            s.connect(str(path))
        except OSError:
            return False
    return True


def _docker_answers(path: Path) -> bool:
    """True when dockerd answers requests: its socket accepts some time before that."""
    if not _unix_answers(path):
        return False
    asked = subprocess.run(["docker", "-H", f"unix://{path}", "version"], capture_output=True)
    return asked.returncode == 0


@contextmanager
def dockerd(*options: str, data: Path | None = None) -> Iterator[dict[str, object]]:
    """Run a dockerd of its own, in a short path: unix(7) has 108 bytes for a socket's.

    Its images live in `data`, or beside the socket.  Yields images.toml's [docker] table.
    """
    base = Path(tempfile.mkdtemp(prefix="krun-dockerd-"))
    sock = base / "d.sock"
    process = subprocess.Popen(
        ["dockerd", f"--data-root={data or base / 'data'}", f"--exec-root={base}/exec", f"--host=unix://{sock}",
         f"--pidfile={base}/d.pid", "--iptables=false", "--bridge=none",
         "--default-ulimit=nofile=1024:1024", *options],
        stdout=subprocess.DEVNULL, stderr=open(base / "log", "wb"),
    )  # fmt: skip
    try:
        wait_for(lambda: _docker_answers(sock), "dockerd", process)
        yield {"host": f"unix://{sock}"}
    finally:
        stop(process)
        for directory in {base, data or base}:
            remove_tree(directory)


@contextmanager
def containerd(data: Path | None = None) -> Iterator[dict[str, object]]:
    """Run a containerd of its own, with its images in `data`, or beside its socket.

    Yields images.toml's [containerd] table.
    """
    base = Path(tempfile.mkdtemp(prefix="krun-containerd-"))
    sock = base / "c.sock"
    (base / "config.toml").write_text(
        f'version = 2\nroot = "{data or base / "root"}"\nstate = "{base}/state"\n'
        f'[grpc]\naddress = "{sock}"\n'
    )
    process = subprocess.Popen(
        ["containerd", "--config", str(base / "config.toml")],
        stdout=subprocess.DEVNULL,
        stderr=open(base / "log", "wb"),
    )
    try:
        wait_for(lambda: _unix_answers(sock), "containerd", process)
        yield {"address": str(sock)}
    finally:
        stop(process)
        remove_tree(base)
