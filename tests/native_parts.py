"""Bundles and calls for the tests of the native engine: busybox in a root of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import uuid
from pathlib import Path
from typing import Any

import installed
from km import build
from needs import need

REPOSITORY = Path(__file__).resolve().parent.parent
CAPABILITIES = ["CAP_AUDIT_WRITE", "CAP_KILL", "CAP_NET_BIND_SERVICE"]


def need_root() -> None:
    """Skip where containers cannot be made."""
    need("busybox", root="namespaces, mounts, cgroups")


def configuration(*args: str) -> dict[str, Any]:
    """A configuration like that of `runc spec`."""
    namespaces = ("pid", "network", "ipc", "uts", "mount", "cgroup")
    sets = ("bounding", "effective", "permitted")
    return {
        "ociVersion": "1.2.0",
        "process": {
            "terminal": False,
            "user": {"uid": 0, "gid": 0},
            "args": list(args),
            "env": ["PATH=/bin", "TERM=xterm"],
            "cwd": "/",
            "capabilities": dict.fromkeys(sets, CAPABILITIES),
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
            "noNewPrivileges": True,
        },
        "root": {"path": "rootfs", "readonly": False},
        "hostname": "krun",
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {
                "destination": "/dev",
                "type": "tmpfs",
                "source": "tmpfs",
                "options": ["nosuid", "strictatime", "mode=755", "size=65536k"],
            },
            {
                "destination": "/dev/pts",
                "type": "devpts",
                "source": "devpts",
                "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"],
            },
            {
                "destination": "/sys",
                "type": "sysfs",
                "source": "sysfs",
                "options": ["nosuid", "noexec", "nodev", "ro"],
            },
        ],
        "linux": {
            "resources": {"devices": [{"allow": False, "access": "rwm"}]},
            "namespaces": [{"type": kind} for kind in namespaces],
            "maskedPaths": ["/proc/kcore", "/proc/keys", "/proc/acpi", "/sys/firmware"],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys"],
        },
    }


class Native:
    """A state root, a bundle, and krun with the native engine; nothing may be left at the end."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        # A path below /tmp that other users may pass, for user namespaces.
        self.root = directory / "state"
        self.bundle = directory / "bundle"
        self.rootfs = self.bundle / "rootfs"
        (self.rootfs / "bin").mkdir(parents=True)
        busybox = shutil.which("busybox")
        assert busybox
        shutil.copy(busybox, self.rootfs / "bin/busybox")
        for name in ("sh", "cat", "ls", "id", "sleep", "true", "ps", "grep", "readlink", "env"):
            os.symlink("busybox", self.rootfs / "bin" / name)
        (directory / "policy.json").write_text(json.dumps({"defaults": {"mode": "label"}}))
        self.names: list[str] = []

    def compile(self, name: str, source: str) -> None:
        """Make the text of a C program /bin/NAME of the container."""
        need("gcc")
        text = self.directory / f"{name}.c"
        text.write_text(source)
        build.compile_static(text, self.rootfs / "bin" / name)

    @property
    def words(self) -> list[str]:
        """The command line up to the verb: what the launcher executes.

        KRUN_TEST_START=cold takes the plain interpreter instead of the warm start.
        """
        policy = str(self.directory / "policy.json")
        options = ["--engine", "native", "--policy", policy, "--root", str(self.root)]
        return [*installed.words(os.environ.get("KRUN_TEST_START", "warm")), *options]

    def __call__(
        self, *argv: object, status: int | None = 0, **keywords: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run krun; its status must be the given one (None: any)."""
        keywords.setdefault("timeout", 30)
        if "input" not in keywords:
            keywords.setdefault("stdin", subprocess.DEVNULL)
        if "stdout" not in keywords:
            keywords["capture_output"] = True
        done = subprocess.run([*self.words, *map(str, argv)], text=True, **keywords)
        if status is not None:
            assert done.returncode == status, f"{argv}: {done.returncode}: {done.stderr}"
        return done

    def name(self) -> str:
        """A fresh container id."""
        self.names.append(f"native-test-{uuid.uuid4().hex[:12]}")
        return self.names[-1]

    def write(self, document: dict[str, Any]) -> None:
        """Make document the bundle's configuration."""
        (self.bundle / "config.json").write_text(json.dumps(document))

    def run(
        self, document: dict[str, Any], status: int | None = 0, *options: object, **keywords: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run a configuration to its end."""
        self.write(document)
        words = ("run", "--bundle", self.bundle, *options, self.name())
        return self(*words, status=status, **keywords)

    def shell(self, script: str, status: int | None = 0) -> str:
        """Run a script in a container of the plain configuration; returns its output."""
        return self.run(configuration("sh", "-c", script), status).stdout

    def start(self, *args: str) -> str:
        """Run a container in the background; returns its id."""
        self.write(configuration(*args))
        name = self.name()
        self("run", "--detach", "--bundle", self.bundle, name, stdout=subprocess.DEVNULL)
        return name

    def state(self, name: str) -> dict[str, Any]:
        """The container's state."""
        document: dict[str, Any] = json.loads(self("state", name).stdout)
        return document

    def left(self) -> list[str]:
        """What is left of every container of this test: state, cgroups, processes, mounts."""
        found = [str(path) for path in self.root.glob("*")] if self.root.exists() else []
        for top in Path("/sys/fs/cgroup").iterdir():
            for name in self.names:
                found += [str(top / name)] if (top / name).exists() else []
        own = next(
            line.split(":", 2)[2]
            for line in Path("/proc/self/cgroup").read_text().splitlines()
            if "memory" in line or line.startswith("0::")
        )
        for name in self.names:
            path = Path(f"/sys/fs/cgroup/memory{own}/{name}")
            found += [str(path)] if path.exists() else []
        mounts = Path("/proc/self/mountinfo").read_text()
        found += [line for line in mounts.splitlines() if str(self.directory) in line]
        return found

    def close(self) -> None:
        """Delete every container and check that nothing is left."""
        for name in self.names:
            self("delete", "--force", name, status=None)
        left = self.left()
        shutil.rmtree(self.directory, ignore_errors=True)
        assert left == [], left
