"""krun features: what this runtime supports (runtime-spec, features.md and features-linux.md)."""

from __future__ import annotations

import sys

import krun
from krun import jsontext, many, version
from krun.errors import KrunError
from krun.linux.flags import CAPABILITIES
from krun.plan import mounts, namespaces, seccomp

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from krun.grammar import Call

_HOOKS = (
    "prestart",
    "createRuntime",
    "createContainer",
    "startContainer",
    "poststart",
    "poststop",
)
_OTHER_OPTIONS = ("bind", "rbind", "remount", "tmpcopyup", "copy-symlink", "idmap", "ridmap")


def mount_options() -> list[str]:
    """Return the mount options of the native engine, from the tables that it reads."""
    recursive = [f"r{name}" for name in mounts.ATTRIBUTES]
    known = {*mounts.ATTRIBUTES, *recursive, *mounts.PROPAGATION, *mounts.SUPERBLOCK}
    return sorted({*known, *mounts.IGNORED, *_OTHER_OPTIONS})


def native() -> dict[str, Any]:
    """Return the features of the native engine."""
    return {
        "ociVersionMin": "1.0.0",
        "ociVersionMax": version.SPEC,
        "hooks": list(_HOOKS),
        "mountOptions": mount_options(),
        "linux": {
            "namespaces": sorted(namespaces.FLAGS),
            "capabilities": [f"CAP_{name}" for name in CAPABILITIES],
            "cgroup": {"v1": True, "v2": True, "systemd": True, "systemdUser": True},
            "seccomp": {
                "enabled": True,
                "actions": sorted(seccomp.ACTIONS),
                "operators": sorted(seccomp.OPERATORS),
                "archs": ["SCMP_ARCH_X86", "SCMP_ARCH_X32", "SCMP_ARCH_X86_64"],
                "knownFlags": sorted(seccomp.FLAGS),
            },
            "apparmor": {"enabled": True},
            "selinux": {"enabled": True},
            "mountExtensions": {"idmap": {"enabled": True}},
            "intelRdt": {"enabled": True, "schemata": True, "monitoring": True},
            "netDevices": {"enabled": True},
        },
        "potentiallyUnsafeConfigAnnotations": ["run.oci."],
    }


def _of_crun(call: Call) -> dict[str, Any] | None:
    """Return crun's own answer; None without crun, or with one before 1.8.6 that has none."""
    try:
        features: dict[str, Any] = jsontext.loads(many.crun_output(call, ["features"]))
    except (KrunError, ValueError):
        return None
    return features


def run(call: Call) -> int:
    """Print the features of the engine in use, with krun's own annotations."""
    features = None if call.settings.engine == "native" else _of_crun(call)
    source = "native" if features is None else "crun"
    features = native() if features is None else features
    features["annotations"] = {
        **(features.get("annotations") or {}),
        "app.kontain.krun.version": krun.__version__,
        "app.kontain.krun.engines": "crun,native",
        "app.kontain.krun.monitors": "km,builtin",
        "app.kontain.krun.features-of": source,
    }
    unsafe = features.get("potentiallyUnsafeConfigAnnotations") or []
    features["potentiallyUnsafeConfigAnnotations"] = [*unsafe, "app.kontain."]
    sys.stdout.write(jsontext.dumps(features, indent="  ") + "\n")
    return 0
