"""krun spec: write a config.json that runs."""

from __future__ import annotations

import os

from krun import jsontext
from krun.errors import KrunError
from krun.linux import cgroupfs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from krun.grammar import Call

_CAPABILITIES = ["CAP_AUDIT_WRITE", "CAP_KILL", "CAP_NET_BIND_SERVICE"]
_NAMESPACES = ("pid", "network", "ipc", "uts", "mount", "cgroup")
# What of the host's kernel a container can only harm by reading or writing.
_MASKED = (
    "/proc/acpi",
    "/proc/asound",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
    "/sys/devices/virtual/powercap",
)
_READONLY = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")


def _mount(destination: str, fstype: str, source: str, *options: str) -> dict[str, Any]:
    entry: dict[str, Any] = {"destination": destination, "type": fstype, "source": source}
    if options:
        entry["options"] = list(options)
    return entry


def document(rootless: bool, cgroup_version: int) -> dict[str, Any]:
    """Return a configuration for a shell in rootfs; rootless for an ordinary user.

    A cgroup namespace is for v2 alone, as in runc's: on v1 the payload sees where its cgroup is.
    """
    namespaces = _NAMESPACES if cgroup_version == 2 else _NAMESPACES[:-1]
    quiet = ("nosuid", "noexec", "nodev")
    pts = ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"]
    sys = _mount("/sys", "sysfs", "sysfs", *quiet, "ro")
    if rootless:
        # An ordinary user owns no network namespace that sysfs could be mounted for.
        sys = _mount("/sys", "none", "/sys", "rbind", *quiet, "ro")
    else:
        pts.append("gid=5")
    linux: dict[str, Any] = {
        "resources": {"devices": [{"allow": False, "access": "rwm"}]},
        "namespaces": [{"type": kind} for kind in namespaces],
        "maskedPaths": list(_MASKED),
        "readonlyPaths": list(_READONLY),
    }
    if rootless:
        del linux["resources"]
        kept = [kind for kind in namespaces if kind != "network"]
        linux["namespaces"] = [{"type": kind} for kind in (*kept, "user")]
        linux["uidMappings"] = [{"containerID": 0, "hostID": os.geteuid(), "size": 1}]
        linux["gidMappings"] = [{"containerID": 0, "hostID": os.getegid(), "size": 1}]
    return {
        "ociVersion": "1.0.2",
        "process": {
            "terminal": True,
            "user": {"uid": 0, "gid": 0},
            "args": ["sh"],
            "env": [
                "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
                "TERM=xterm",
            ],
            "cwd": "/",
            "capabilities": {
                kind: list(_CAPABILITIES) for kind in ("bounding", "effective", "permitted")
            },
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
            "noNewPrivileges": True,
        },
        "root": {"path": "rootfs", "readonly": True},
        "hostname": "krun",
        "mounts": [
            _mount("/proc", "proc", "proc"),
            _mount("/dev", "tmpfs", "tmpfs", "nosuid", "strictatime", "mode=755", "size=65536k"),
            _mount("/dev/pts", "devpts", "devpts", *pts),
            _mount("/dev/shm", "tmpfs", "shm", *quiet, "mode=1777", "size=65536k"),
            _mount("/dev/mqueue", "mqueue", "mqueue", *quiet),
            sys,
            _mount("/sys/fs/cgroup", "cgroup", "cgroup", *quiet, "relatime", "ro"),
        ],
        "linux": linux,
    }


def run(call: Call) -> int:
    """Write the file; raises KrunError where one exists already, as runc does."""
    options = call.options
    path = options["file"] or os.path.join(options["bundle"], "config.json")
    text = jsontext.dumps(document(options["rootless"], cgroupfs.version()), indent="\t") + "\n"
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    except FileExistsError as error:
        raise KrunError(f"{path}: file exists, remove it first") from error
    except OSError as error:
        raise KrunError(f"{path}: {error.strerror}") from error
    with open(fd, "w", encoding="utf-8") as file:
        file.write(text)
    return 0
