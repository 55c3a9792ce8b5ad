"""choose(...) -> Choice: what the bundle asks for, within what the host's policy allows.  Pure.

Order, each over the one before: the policy's defaults, the bundle's `kontain` object, annotations
`app.kontain.*` (podman and docker cannot write the object), the command line of the host.
"""

from __future__ import annotations

from krun import jsontext, spec
from krun.errors import BadSpec, PolicyDenied
from krun.monitor import km
from krun.policy import Policy
from krun.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from krun.grammar import Settings
    from krun.types import Spec

PREFIX = "app.kontain."
# The mark of the original label trigger: containers that want a VM where not all get one.
MARK, MARK_VALUE, MARK_PATH = "app.kontain.version", "1", "/.kontain"
# Where krun files what exec needs later; nothing in an image or a bundle can set it.
STATE = "app.kontain.state"

# crun's annotations, and those of them that reach no file, socket or library of the host's.
CRUN_PREFIX = "run.oci."
_CONTAINED = (
    "run.oci.keep_original_groups",
    "run.oci.mount_context_type",
    "run.oci.seccomp_fail_unknown_syscall",
    "run.oci.systemd.subgroup",
)
# podman puts an image's annotations among those of its user; these clients say who they are.
_CLIENT_MARKS = ("io.container.manager", "io.kubernetes.cri.container-type")

_SANDBOX_MARKS = (
    ("io.kubernetes.cri.container-type", "sandbox"),
    ("io.kubernetes.cri-o.ContainerType", "sandbox"),
    ("io.podman.annotations.infra", "TRUE"),
)

# How the text of an annotation becomes the member's value; what is not listed stays text.
_MEMBERS = {
    "monitor": "text",
    "monitorPath": "text",
    "engine": "text",
    "init": "text",
    "mode": "text",
    "sandbox": "text",
    "execOutsideVM": "boolean",
    "memory": "size",
    "km": "json",
    "directInvocation": "json",
    "network": "any",
    "images": "json",
}
_KM_MEMBERS = {
    "membusWidth": "number",
    "enable1gPages": "boolean",
    "overcommitMemory": "boolean",
    "device": "text",
    "log": "text",
    "verbose": "flag",
    "hcallStats": "boolean",
    "coredump": "text",
    "coreOnErr": "boolean",
    "dumpShutdown": "boolean",
    "gdb": "flag",
    "snapshot": "text",
    "mgtpipe": "text",
    "copyenv": "strings",
    "killUnimplementedSyscalls": "boolean",
    "vendorId": "boolean",
    "extraArgs": "strings",
}


class Choice(Record):
    """What was chosen, before it is known what the host has."""

    monitor: str
    monitor_path: str
    engine: str
    init: str
    mode: str
    sandbox: str
    exec_outside_vm: bool
    memory: int
    km: dict[str, Any]
    direct_sha256: tuple[str, ...] | None
    network: Any
    images: dict[str, Any]
    dropped: tuple[str, ...] = ()


def _kebab(name: str) -> str:
    """membusWidth -> membus-width, execOutsideVM -> exec-outside-vm."""
    if name == "enable1gPages":
        return "enable-1g-pages"
    text = name.replace("VM", "Vm")
    return "".join(f"-{c.lower()}" if c.isupper() else c for c in text)


_BY_ANNOTATION = {_kebab(name): name for name in _MEMBERS}
_KM_BY_ANNOTATION = {"km." + _kebab(name): name for name in _KM_MEMBERS}


def memory_size(value: int | str) -> int:
    """Return bytes from 1024, "512M" or "2G", whose form spec.parse has checked."""
    if isinstance(value, int):
        return value
    unit = {"K": 10, "M": 20, "G": 30, "T": 40}.get(value[-1].upper())
    return int(value[:-1]) << unit if unit else int(value)


def _json(text: str, where: str) -> Any:
    try:
        return jsontext.loads(text)
    except ValueError as error:
        raise BadSpec(where, f"is not JSON: {error}") from None


def _value(text: str, kind: str, where: str) -> Any:
    """Read an annotation's text as the member's type; what does not fit stays text."""
    if kind == "boolean" or (kind == "flag" and text.lower() in ("true", "false")):
        value = {"true": True, "1": True, "false": False, "0": False}.get(text.lower())
        if value is None:
            raise BadSpec(where, "must be true or false")
        return value
    if kind in ("number", "size", "flag") and text.isascii() and text.isdigit() and len(text) < 20:
        return int(text)
    if kind == "json" or (kind in ("any", "flag", "strings") and text[:1] in ("{", "[")):
        return _json(text, where)
    if kind == "strings":
        return text.split()
    return text


def from_annotations(annotations: dict[str, str]) -> dict[str, Any]:
    """Return the extension object that annotations spell; raises BadSpec naming the annotation."""
    table: dict[str, Any] = {}
    for key, text in annotations.items():
        if not key.startswith(PREFIX) or key in (MARK, STATE):
            continue
        name = key[len(PREFIX) :]
        where = f'annotations["{key}"]'
        if name in _KM_BY_ANNOTATION:
            member = _KM_BY_ANNOTATION[name]
            value: Any = {member: _value(text, _KM_MEMBERS[member], where)}
            member = "km"
        elif name in _BY_ANNOTATION:
            member = _BY_ANNOTATION[name]
            value = _value(text, _MEMBERS[member], where)
        else:
            from difflib import get_close_matches

            near = get_close_matches(name, [*_BY_ANNOTATION, *_KM_BY_ANNOTATION], 1)
            hint = f"did you mean {PREFIX}{near[0]}?" if near else "docs/extension.md lists them"
            raise BadSpec(where, "is not an annotation of krun's", hint)
        try:
            spec.parse_extension({member: value})
        except BadSpec as error:
            raise BadSpec(where, error.text, error.hint) from None
        if member == "km":
            table.setdefault("km", {}).update(value)
        else:
            table[member] = value
    return table


def _deny(what: str, policy: Policy, way_out: str) -> PolicyDenied:
    source = policy.source or "the built-in policy"
    return PolicyDenied(f"{what}: {source} does not allow it", way_out)


def permit_km(members: Iterable[str], where: str, policy: Policy) -> None:
    """Raise PolicyDenied for a km option that the policy keeps for the host."""
    allow = policy.allow
    listed = allow.get("km")
    for name in members:
        here = f"{where} {name}" if where.endswith("option") else _named(where, f"km.{name}")
        if name in km.HOST_ONLY:
            if not allow.get(name, False):
                raise _deny(here, policy, f"set allow.{name} in the policy")
        elif name in _KM_MEMBERS and listed is not None and name not in listed:
            raise _deny(here, policy, "allow.km lists what is")


def _named(where: str, member: str) -> str:
    """Return a member as its user wrote it: in the object, or as an annotation."""
    if where != "annotations":
        return f"{where}.{member}"
    group, dot, name = member.rpartition(".")
    return f'annotations["{PREFIX}{group}{dot}{_kebab(name)}"]'


def _permit(table: dict[str, Any], where: str, policy: Policy) -> dict[str, Any]:
    """Return the members of table that the policy lets a bundle set; raises PolicyDenied."""
    allow = policy.allow
    chosen = dict(table)

    def deny(name: str, way_out: str) -> PolicyDenied:
        value = chosen[name]
        shown = f" {value}" if isinstance(value, str) else ""
        return _deny(f"{_named(where, name)}{shown}", policy, way_out)

    for name in ("monitor", "engine"):
        if name in chosen and chosen[name] not in allow.get(name, [chosen[name]]):
            raise deny(name, f"allow.{name} lists what is")
    if "monitorPath" in chosen and chosen["monitorPath"] not in allow.get("monitorPaths", []):
        raise deny("monitorPath", "add it to allow.monitorPaths")
    for name in ("init", "network"):
        if name in chosen and not allow.get(name, True):
            raise deny(name, f"set allow.{name} in the policy")
    if chosen.get("init", "auto") not in ("auto", "none", policy.init_path):
        raise deny("init", "set paths.init in the policy")
    if chosen.get("mode") == "label" and policy.mode == "all":
        raise deny("mode", "only the host decides who goes without a VM")
    if chosen.get("sandbox") == "native" and policy.sandbox == "vm":
        raise deny("sandbox", "set defaults.sandbox in the policy")
    if chosen.get("execOutsideVM") is True and not policy.exec_outside_vm:
        raise deny("execOutsideVM", "set defaults.execOutsideVM in the policy")
    permit_km(chosen.get("km", {}), where, policy)
    return chosen


def is_sandbox(annotations: dict[str, str]) -> bool:
    """Return whether this is a pod's pause container (containerd, CRI-O, podman)."""
    return any(annotations.get(key) == value for key, value in _SANDBOX_MARKS)


def is_marked(annotations: dict[str, str]) -> bool:
    """Return whether the label trigger's annotation asks for a VM."""
    return annotations.get(MARK) == MARK_VALUE


def unwanted(annotations: dict[str, str], policy: Policy) -> tuple[str, ...]:
    """Return which of crun's annotations the container does not keep."""
    allowed = policy.allow.get("crunAnnotations")
    if allowed is None:
        allowed = not any(mark in annotations for mark in _CLIENT_MARKS) or _CONTAINED
    asked = [name for name in annotations if name.startswith(CRUN_PREFIX)]
    if isinstance(allowed, bool):
        return () if allowed else tuple(asked)
    return tuple(name for name in asked if name not in allowed)


_CHECKS = ("record", "warn", "refuse")


def _images(host: dict[str, Any], bundle: dict[str, Any]) -> dict[str, Any]:
    """Merge the settings of the image hooks: a bundle can make the check stricter only."""
    both = [table["check"] for table in (host, bundle) if "check" in table]
    images = {**host, **bundle}
    if both:
        images["check"] = max(both, key=_CHECKS.index)
    return images


def _network(document: Spec, asked: Any, default: Any) -> Any:
    """Return the network asked for, else the host's default for a container that is in none yet.

    A network namespace with a path is a network that the client has made.
    """
    if asked is not None or default is None:
        return asked
    linux = document.get("linux") or {}
    namespaces = linux.get("namespaces") or []
    new = any(one["type"] == "network" and not one.get("path") for one in namespaces)
    return default if new and not linux.get("netDevices") else None


def choose(document: Spec, policy: Policy, settings: Settings) -> Choice:
    """Merge policy, extension object, annotations and command line.

    Raises BadSpec for a wrong value, PolicyDenied for one the host does not allow.
    """
    annotations = document.get("annotations") or {}
    merged: dict[str, Any] = {}
    options = dict(policy.km)
    bundle = document.get("kontain")
    layers: list[tuple[str, dict[str, Any]]] = []
    if bundle is not None:
        if bundle and not policy.allow.get("extension", True):
            raise _deny("the object kontain", policy, "set allow.extension in the policy")
        layers.append(("kontain", bundle))
    noted = from_annotations(annotations)
    if noted:
        allowed = policy.allow.get("annotations", True)
        for key in annotations:
            if key.startswith(PREFIX) and key not in (MARK, STATE):
                listed = key in allowed if isinstance(allowed, list) else allowed
                if not listed:
                    raise _deny(f"annotation {key}", policy, "allow.annotations lists what is")
        layers.append(("annotations", noted))
    digests: tuple[str, ...] | None = None
    for where, layer in layers:
        permitted = _permit(layer, where, policy)
        options.update(permitted.pop("km", {}))
        if "directInvocation" in permitted:
            listed = {entry["sha256"].lower() for entry in permitted.pop("directInvocation")}
            digests = tuple(sorted(listed if digests is None else listed & set(digests)))
        if permitted.get("execOutsideVM") and merged.get("execOutsideVM") is False:
            del permitted["execOutsideVM"]
        merged.update(permitted)
    return Choice(
        monitor=settings.monitor or merged.get("monitor") or policy.monitor,
        monitor_path=merged.get("monitorPath", ""),
        engine=settings.engine or merged.get("engine") or policy.engine,
        init=merged.get("init") or policy.init,
        mode=settings.mode or merged.get("mode") or policy.mode,
        sandbox=merged.get("sandbox") or policy.sandbox,
        exec_outside_vm=merged.get("execOutsideVM", policy.exec_outside_vm),
        memory=memory_size(merged.get("memory", 0)),
        km=options,
        direct_sha256=digests,
        network=_network(document, merged.get("network"), settings.network or policy.network),
        images=_images(policy.images, merged.get("images", {})),
        dropped=unwanted(annotations, policy),
    )
