"""The container that a hook is called for: its state (runtime-spec, hooks) and its image.

Who started it decides where the image's name is: CRI runtimes annotate it; podman keeps it in
containers/storage's containers.json above the bundle; dockerd in config.v2.json under the data
root that the root filesystem's path shows.
"""

from __future__ import annotations

import posix

from krun import jsontext
from krun.errors import KrunError
from krun.images.references import BadReference, parse
from krun.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# kontain.app/… are the flat forms: podman's --annotation cannot carry a comma or a quote.
IMAGE = "kontain.app/image"
CHECK = "kontain.app/images-check"
PREFETCH = "kontain.app/images-prefetch"
CACHE = "kontain.app/images-cache"
# The extension's object as one annotation, {"check": …, "prefetch": […]}.
OBJECT = "app.kontain.images"

_IMAGE_NAMES = (IMAGE, "io.kubernetes.cri.image-name", "io.kubernetes.cri-o.ImageName")
_NAMESPACES = ("io.kubernetes.cri.sandbox-namespace", "io.kubernetes.pod.namespace")
# A pod's first container, whose image the runtime chooses and nobody asked for.
_KINDS = ("io.kubernetes.cri.container-type", "io.kubernetes.cri-o.ContainerType")
# No file that tells of one container is larger.
_LIMIT = 64 << 20


class BadState(KrunError):
    """What the runtime wrote to the hook is no container state."""


class Container(Record):
    """One container: `name` of its image in canonical form or "", `image_id` or ""."""

    id: str
    pid: int
    status: str
    bundle: str
    annotations: dict[str, str]
    name: str
    image_id: str
    namespace: str


def read_state() -> dict[str, Any]:
    """Return the state that the runtime writes to stdin; raises BadState."""
    parts = []
    while True:
        part = posix.read(0, 65536)
        if not part:
            break
        parts.append(part)
    try:
        state = jsontext.loads(b"".join(parts))
    except ValueError as error:
        raise BadState(f"container state: {error}") from None
    if not isinstance(state, dict) or not isinstance(state.get("id"), str):
        raise BadState("container state: has no id")
    annotations = state.get("annotations")
    state["annotations"] = annotations if isinstance(annotations, dict) else {}
    return state


def _load(path: str) -> Any:
    try:
        with open(path, "rb") as file:
            return jsontext.loads(file.read(_LIMIT))
    except (OSError, ValueError):
        return None


def _of_podman(bundle: str, container: str) -> tuple[str, str]:
    """Look the container up in containers/storage, whose directory holds the bundle."""
    base = bundle.removesuffix("/userdata").removesuffix(f"/{container}")
    for name in ("containers.json", "volatile-containers.json"):
        for entry in _load(f"{base}/{name}") or ():
            if entry.get("id") == container:
                try:
                    metadata = jsontext.loads(entry.get("metadata") or "{}")
                except ValueError:
                    metadata = {}
                image = entry.get("image") or ""
                return str(metadata.get("image-name", "")), f"sha256:{image}" if image else ""
    return "", ""


def _of_docker(bundle: str, root: str, container: str) -> tuple[str, str]:
    """Look the container up in dockerd's data root: root is DATA/overlay2/LAYER/merged."""
    if not root:
        config = _load(f"{bundle}/config.json")
        root = str((config or {}).get("root", {}).get("path", ""))
    parts = root.split("/")
    if len(parts) < 5:
        return "", ""
    config = _load(f"{'/'.join(parts[:-3])}/containers/{container}/config.v2.json")
    if not isinstance(config, dict):
        return "", ""
    inner = config.get("Config") or {}
    return str(inner.get("Image", "")), str(config.get("Image", ""))


def describe(state: dict[str, Any]) -> Container:
    """Return what is known of the container and its image."""
    annotations: dict[str, str] = state["annotations"]
    bundle = str(state.get("bundle", ""))
    name = next((annotations[key] for key in _IMAGE_NAMES if annotations.get(key)), "")
    image_id = ""
    if bundle.endswith("/userdata"):
        found, image_id = _of_podman(bundle, state["id"])
        name = name or found
    elif not name:
        name, image_id = _of_docker(bundle, str(state.get("root", "")), state["id"])
    try:
        name = str(parse(name)) if name else ""
    except BadReference:
        # docker run SHA256 and the like: an id is no name.
        name = ""
    pid = state.get("pid")
    return Container(
        state["id"],
        pid if isinstance(pid, int) else 0,
        str(state.get("status", "")),
        bundle,
        annotations,
        name,
        image_id,
        next((annotations[key] for key in _NAMESPACES if annotations.get(key)), ""),
    )


def is_sandbox(annotations: dict[str, str]) -> bool:
    """True for the container that holds a pod's namespaces."""
    return any(annotations.get(key) == "sandbox" for key in _KINDS)


def settings_of(annotations: dict[str, str]) -> dict[str, Any]:
    """Return {"check": …, "prefetch": […]} as the annotations say; raises BadState."""
    settings: dict[str, Any] = {}
    if annotations.get(OBJECT):
        try:
            found = jsontext.loads(annotations[OBJECT])
        except ValueError as error:
            raise BadState(f"annotation {OBJECT}: {error}") from None
        if not isinstance(found, dict):
            raise BadState(f"annotation {OBJECT}: must be an object")
        settings.update(found)
    if annotations.get(CHECK):
        settings["check"] = annotations[CHECK]
    if annotations.get(PREFETCH):
        settings["prefetch"] = annotations[PREFETCH].replace(",", " ").split()
    return settings
