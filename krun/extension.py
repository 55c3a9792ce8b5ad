"""choose(spec, policy, settings) -> Choice: what the bundle, within the host's policy, asks for.

Order, each over the one before: the policy's defaults, the bundle's `kontain` object, annotations
`app.kontain.*` (podman and docker cannot write the object), the command line of the host.  Pure.
"""

from __future__ import annotations

from krun import jsontext
from krun.errors import BadSpec, PolicyDenied
from krun.monitor import km
from krun.policy import ENGINES, MONITORS, Policy
from krun.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from krun.grammar import Settings
    from krun.types import Spec

PREFIX = "app.kontain."
# The mark of the original label trigger: containers that want a VM where not all get one.
MARK, MARK_VALUE, MARK_PATH = "app.kontain.version", "1", "/.kontain"
# Where krun files what exec needs later; nothing in an image or a bundle can set it.
STATE = "app.kontain.state"

_SANDBOX_MARKS = (
    ("io.kubernetes.cri.container-type", "sandbox"),
    ("io.kubernetes.cri-o.ContainerType", "sandbox"),
    ("io.podman.annotations.infra", "TRUE"),
)

# name of the member -> (kind, values)
_MEMBERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "monitor": ("choice", MONITORS),
    "monitorPath": ("path", ()),
    "engine": ("choice", ENGINES),
    "init": ("text", ()),
    "mode": ("choice", ("all", "label")),
    "sandbox": ("choice", ("vm", "native")),
    "execOutsideVM": ("boolean", ()),
    "memory": ("size", ()),
    "km": ("object", ()),
    "directInvocation": ("array", ()),
    "network": ("any", ()),
    "images": ("object", ()),
}

_KM_MEMBERS: dict[str, str] = {
    "membusWidth": "width",
    "enable1gPages": "boolean",
    "overcommitMemory": "boolean",
    "device": "device",
    "log": "text",
    "verbose": "verbose",
    "hcallStats": "boolean",
    "coredump": "path",
    "coreOnErr": "boolean",
    "dumpShutdown": "boolean",
    "gdb": "gdb",
    "snapshot": "path",
    "mgtpipe": "path",
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


def _kebab(name: str) -> str:
    """membusWidth -> membus-width, execOutsideVM -> exec-outside-vm."""
    if name == "enable1gPages":
        return "enable-1g-pages"
    text = name.replace("VM", "Vm")
    return "".join(f"-{c.lower()}" if c.isupper() else c for c in text)


_BY_ANNOTATION = {_kebab(name): name for name in _MEMBERS}
_KM_BY_ANNOTATION = {"km." + _kebab(name): name for name in _KM_MEMBERS}


def _size(value: Any, where: str) -> int:
    """Return bytes from 1024, "512M" or "2G"; raises BadSpec."""
    if isinstance(value, bool):
        raise BadSpec(where, "must be a number of bytes, or a string such as 512M")
    if isinstance(value, int):
        if value < 0:
            raise BadSpec(where, "must not be negative")
        return value
    if isinstance(value, str) and value:
        unit = {"K": 10, "M": 20, "G": 30, "T": 40}.get(value[-1].upper())
        number = value[:-1] if unit else value
        if number.isascii() and number.isdigit():
            return int(number) << (unit or 0)
    raise BadSpec(where, "must be a number of bytes, or a string such as 512M")


def _strings(value: Any, where: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise BadSpec(where, "must be an array of strings")
    return value


def _check_km(table: dict[str, Any], where: str) -> None:
    for name, value in table.items():
        kind = _KM_MEMBERS.get(name)
        here = f"{where}.{name}"
        if kind is None:
            raise BadSpec(here, "is not a km option", f"known: {', '.join(_KM_MEMBERS)}")
        if kind == "boolean" and not isinstance(value, bool):
            raise BadSpec(here, "must be a boolean")
        if kind in ("text", "path") and not isinstance(value, str):
            raise BadSpec(here, "must be a string")
        if kind == "path" and not value.startswith("/"):
            raise BadSpec(here, "must be absolute")
        if kind == "width" and (type(value) is not int or not 32 <= value <= 39):
            raise BadSpec(here, "must be 32 to 39")
        if kind == "device" and value not in ("kvm", "kkm", "auto"):
            raise BadSpec(here, "must be one of kvm, kkm, auto")
        if kind == "verbose" and not isinstance(value, bool | str):
            raise BadSpec(here, "must be a boolean or a regular expression of tags")
        if kind == "strings":
            _strings(value, here)
        if kind == "gdb":
            port = value.get("port") if isinstance(value, dict) else value
            good = port is None or isinstance(port, bool)
            if not good and not (type(port) is int and 0 < port < 1 << 16):
                raise BadSpec(here, "must be a port, true or false, or an object with port")


def check(table: Any, where: str = "kontain") -> None:
    """Check an extension object; raises BadSpec with the JSON path.  Unknown members pass."""
    if not isinstance(table, dict):
        raise BadSpec(where, "must be an object")
    for name, value in table.items():
        kind, values = _MEMBERS.get(name, ("any", ()))
        here = f"{where}.{name}"
        if kind == "choice" and value not in values:
            raise BadSpec(here, f"must be one of {', '.join(values)}")
        if kind in ("text", "path") and not isinstance(value, str):
            raise BadSpec(here, "must be a string")
        if kind == "path" and not value.startswith("/"):
            raise BadSpec(here, "must be absolute")
        if name == "init" and value not in ("auto", "none") and not value.startswith("/"):
            raise BadSpec(here, "must be auto, none or an absolute path")
        if kind == "boolean" and not isinstance(value, bool):
            raise BadSpec(here, "must be a boolean")
        if kind == "size":
            _size(value, here)
        if kind == "object" and not isinstance(value, dict):
            raise BadSpec(here, "must be an object")
        if kind == "array" and not isinstance(value, list):
            raise BadSpec(here, "must be an array")
    _check_km(table.get("km", {}), f"{where}.km")
    for index, entry in enumerate(table.get("directInvocation", [])):
        if not isinstance(entry, dict) or not isinstance(entry.get("sha256"), str):
            raise BadSpec(f"{where}.directInvocation[{index}].sha256", "must be a string")


def _value(text: str, kind: str, where: str) -> Any:
    """Read an annotation's text as the member's type."""
    if kind == "boolean":
        lower = text.lower()
        if lower in ("true", "1", "yes"):
            return True
        if lower in ("false", "0", "no"):
            return False
        raise BadSpec(where, "must be true or false")
    if kind == "width" and text.isascii() and text.isdigit():
        return int(text)
    if kind in ("verbose", "gdb"):
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        return int(text) if kind == "gdb" and text.isascii() and text.isdigit() else text
    if kind == "strings" and not text.startswith("["):
        return text.split()
    if kind in ("object", "array", "strings") or (kind == "any" and text[:1] in ("{", "[")):
        try:
            return jsontext.loads(text)
        except ValueError as error:
            raise BadSpec(where, f"is not JSON: {error}") from None
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
            value = _value(text, _KM_MEMBERS[member], where)
            try:
                _check_km({member: value}, "km")
            except BadSpec as error:
                raise BadSpec(where, error.text, error.hint) from None
            table.setdefault("km", {})[member] = value
        elif name in _BY_ANNOTATION:
            member = _BY_ANNOTATION[name]
            value = _value(text, _MEMBERS[member][0], where)
            try:
                check({member: value})
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


def _permit(table: dict[str, Any], where: str, policy: Policy) -> dict[str, Any]:
    """Return the members of table that the policy lets a bundle set; raises PolicyDenied."""
    allow = policy.allow
    chosen = dict(table)
    for name in ("monitor", "engine"):
        value = chosen.get(name)
        allowed = allow.get(name)
        if value is not None and allowed is not None and value not in allowed:
            raise _deny(f"{where}.{name} {value}", policy, f"allow.{name} lists what is")
    path = chosen.get("monitorPath")
    if path is not None and path not in allow.get("monitorPaths", []):
        raise _deny(f"{where}.monitorPath {path}", policy, "add it to allow.monitorPaths")
    init = chosen.get("init")
    if init is not None and init not in ("auto", "none") and init != policy.init_path:
        raise _deny(f"{where}.init {init}", policy, "set paths.init in the policy")
    if chosen.get("mode") == "label" and policy.mode == "all":
        raise _deny(f"{where}.mode label", policy, "only the host decides who goes without a VM")
    if chosen.get("sandbox") == "native" and policy.sandbox == "vm":
        raise _deny(f"{where}.sandbox native", policy, "set defaults.sandbox in the policy")
    if chosen.get("execOutsideVM") is True and not policy.exec_outside_vm:
        raise _deny(f"{where}.execOutsideVM", policy, "set defaults.execOutsideVM in the policy")
    options = chosen.get("km", {})
    for name in options:
        host_only = name in km.HOST_ONLY and not allow.get(name, False)
        if host_only or ("km" in allow and name not in allow["km"]):
            raise _deny(f"{where}.km.{name}", policy, f"allow.{name if host_only else 'km'}")
    return chosen


def is_sandbox(annotations: dict[str, str]) -> bool:
    """Return whether this is a pod's pause container (containerd, CRI-O, podman)."""
    return any(annotations.get(key) == value for key, value in _SANDBOX_MARKS)


def is_marked(annotations: dict[str, str]) -> bool:
    """Return whether the label trigger's annotation asks for a VM."""
    return annotations.get(MARK) == MARK_VALUE


def choose(spec: Spec, policy: Policy, settings: Settings) -> Choice:
    """Merge policy, extension object, annotations and command line.

    Raises BadSpec for a wrong value, PolicyDenied for one the host does not allow.
    """
    annotations = spec.get("annotations") or {}
    merged: dict[str, Any] = {}
    options = dict(policy.km)
    bundle = spec.get("kontain")
    layers: list[tuple[str, dict[str, Any]]] = []
    if bundle is not None:
        check(bundle)
        if bundle and not policy.allow.get("extension", True):
            raise _deny("the object kontain", policy, "set allow.extension in the policy")
        layers.append(("kontain", bundle))
    noted = from_annotations(annotations)
    if noted:
        if not policy.allow.get("annotations", True):
            raise _deny(f"annotations {PREFIX}*", policy, "set allow.annotations in the policy")
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
        memory=_size(merged.get("memory", 0), "kontain.memory"),
        km=options,
        direct_sha256=digests,
        network=merged.get("network"),
        images={**policy.images, **merged.get("images", {})},
    )
