"""Settings of `krun images`: /etc/krun/images.toml, with defaults for everything."""

from __future__ import annotations

import os
import socket
import tomllib
from typing import Any

from krun.errors import BadSpec, KrunError
from krun.images.quantities import parse_duration, parse_size
from krun.record import Record

PATH = "/etc/krun/images.toml"
STORES = ("podman", "docker", "containerd")
PULL_POLICIES = ("IfNotPresent", "Always")
PINS = ("auto", "always", "never")


class PodmanSettings(Record):
    """How to call podman; empty paths leave podman its own defaults."""

    program: str = "podman"
    root: str = ""
    runroot: str = ""
    options: tuple[str, ...] = ()


class DockerSettings(Record):
    """Where dockerd listens."""

    host: str = "unix:///var/run/docker.sock"


class ContainerdSettings(Record):
    """Where containerd listens, and which of its namespaces holds the images."""

    address: str = "/run/containerd/containerd.sock"
    namespace: str = "k8s.io"
    program: str = "ctr"
    snapshotter: str = ""
    hosts_directory: str = "/etc/containerd/certs.d"


class Settings(Record):
    """All settings; times in seconds, sizes in bytes.

    `refresh` is "off", a duration or a cron expression; `disk_expansion` estimates the bytes on
    disk for one compressed byte; `pin` says whether cached images are pinned in the store.
    """

    store: str = "podman"
    node: str = ""
    labels_file: str = ""
    kubeconfig: str = ""
    secrets_directory: str = ""
    state_directory: str = ""
    refresh: str = "15m"
    pull_policy: str = "IfNotPresent"
    parallel_pulls: int = 3
    layers_at_once: int = 0
    timeout: float = 300.0
    retries: int = 3
    backoff: float = 1.0
    disk_check: bool = True
    disk_reserve: int = 1 << 30
    disk_expansion: float = 2.5
    insecure_registries: tuple[str, ...] = ()
    certs_directories: tuple[str, ...] = (
        "/etc/containers/certs.d",
        "/etc/docker/certs.d",
        "/etc/containerd/certs.d",
    )
    authfile: str = ""
    pin: str = "auto"
    podman: PodmanSettings = PodmanSettings()
    docker: DockerSettings = DockerSettings()
    containerd: ContainerdSettings = ContainerdSettings()


def _text(path: str, value: Any, origin: str) -> str:
    if not isinstance(value, str):
        raise BadSpec(path, "must be a string", document=origin)
    return value


def _number(path: str, value: Any, origin: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise BadSpec(path, "must be a whole number, 0 or more", document=origin)
    return value


def _convert(path: str, default: Any, value: Any, origin: str) -> Any:
    """Bring a TOML value to the type of its default; durations and sizes may be text."""
    key = path.rpartition(".")[2]
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise BadSpec(path, "must be true or false", document=origin)
        return value
    if key in ("timeout", "backoff"):
        return parse_duration(_text(path, value, origin), f"{origin}: {path}")
    if key == "disk_reserve":
        return parse_size(_text(path, value, origin), f"{origin}: {path}")
    if isinstance(default, tuple):
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise BadSpec(path, "must be a list of strings", document=origin)
        return tuple(value)
    if isinstance(default, int):
        return _number(path, value, origin)
    if isinstance(default, float):
        if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
            raise BadSpec(path, "must be a number, 0 or more", document=origin)
        return float(value)
    return _text(path, value, origin)


def _section(defaults: Any, table: Any, prefix: str, origin: str) -> Any:
    if not isinstance(table, dict):
        raise BadSpec(prefix.rstrip("."), "must be a table", document=origin)
    known = defaults._asdict()
    changes: dict[str, Any] = {}
    for key, value in table.items():
        path = prefix + key
        if key not in known:
            raise BadSpec(
                path, "is no setting", f"settings are {', '.join(sorted(known))}", document=origin
            )
        default = known[key]
        if hasattr(default, "_asdict"):
            changes[key] = _section(default, value, path + ".", origin)
        else:
            changes[key] = _convert(path, default, value, origin)
    return defaults._replace(**changes)


_CHOICES = (("store", STORES), ("pull_policy", PULL_POLICIES), ("pin", PINS))


def parse(table: dict[str, Any], origin: str) -> Settings:
    """Read the settings of a parsed TOML file; raises BadSpec that names the setting."""
    settings: Settings = _section(Settings(), table, "", origin)
    for key, choices in _CHOICES:
        value = getattr(settings, key)
        if value not in choices:
            raise BadSpec(key, f"{value!r} is not one of {', '.join(choices)}", document=origin)
    if settings.parallel_pulls < 1:
        raise BadSpec("parallel_pulls", "must be 1 or more", document=origin)
    from krun.images.schedule import parse as parse_schedule

    parse_schedule(settings.refresh, f"{origin}: refresh")
    return settings


def load(path: str) -> Settings:
    """Read the settings file: the given one, $KRUN_IMAGES_CONFIG, or /etc/krun/images.toml."""
    named = path or os.environ.get("KRUN_IMAGES_CONFIG", "")
    origin = named or PATH
    try:
        with open(origin, "rb") as file:
            table = tomllib.load(file)
    except FileNotFoundError:
        if named:
            raise KrunError(f"settings {origin}: there is no such file") from None
        table = {}
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise KrunError(f"settings {origin}: is not TOML: {error}") from None
    return parse(table, origin)


def state_directory(settings: Settings) -> str:
    """Return where objects, ledger and index are kept."""
    if settings.state_directory:
        return settings.state_directory
    if os.geteuid() == 0:
        return "/var/lib/krun/images"
    home = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return f"{home}/krun/images"


def node_name(settings: Settings) -> str:
    """Return the node's name: as set, else the host's (the kubelet's default)."""
    return settings.node or socket.gethostname().lower()
