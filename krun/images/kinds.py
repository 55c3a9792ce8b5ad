"""ImageCache and ImageWarm as kube-fledged's and cache-imagewarm's users write them.

Pure: a document goes in, a record or an error that names object and field comes out.
Read from the projects' CRDs: kubefledged.io/v1alpha2 (senthilrch/kube-fledged), v1alpha3
(tensorchord/kube-fledged), caching.knative.dev/v1alpha1 (zhaojizhuang/cache-imagewarm).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from krun.errors import BadSpec
from krun.images.references import BadReference, Reference, parse
from krun.record import Record

IMAGE_CACHE = "ImageCache"
IMAGE_WARM = "ImageWarm"
SECRET = "Secret"
VERSIONS = {
    IMAGE_CACHE: ("kubefledged.io/v1alpha2", "kubefledged.io/v1alpha3"),
    IMAGE_WARM: ("caching.knative.dev/v1alpha1",),
    SECRET: ("v1",),
}
DEFAULT_NAMESPACE = "default"
REFRESH_ANNOTATION = "kubefledged.io/refresh-imagecache"
PURGE_ANNOTATION = "kubefledged.io/purge-imagecache"
# This object's own schedule instead of the settings' `refresh`: off, a duration or a cron line.
SCHEDULE_ANNOTATION = "kontain.app/refresh-schedule"

_NAME = frozenset("abcdefghijklmnopqrstuvwxyz0123456789-.")
_LABEL = _NAME - {"."}


class Entry(Record):
    """Images for the nodes whose labels have every pair of `selector`."""

    images: tuple[Reference, ...]
    selector: tuple[tuple[str, str], ...] = ()


class CacheObject(Record):
    """One ImageCache or ImageWarm: what should be on which nodes, and the pull secrets."""

    kind: str
    namespace: str
    name: str
    entries: tuple[Entry, ...]
    secrets: tuple[str, ...] = ()
    node_name: str = ""
    schedule: str = ""

    @property
    def key(self) -> str:
        """What tells this object from every other."""
        return f"{self.kind}/{self.namespace}/{self.name}"


def _component(value: Any, path: str, where: str, allowed: frozenset[str], limit: int) -> str:
    """Check a Kubernetes name (RFC 1123); it becomes part of a file name here."""
    if not isinstance(value, str) or not value:
        raise BadSpec(path, "is missing", document=where)
    edges = (value[0], value[-1])
    if not allowed.issuperset(value) or "-" in edges or "." in edges or len(value) > limit:
        raise BadSpec(
            path, f"{value!r} is no Kubernetes name (lower-case letters, digits, -)", document=where
        )
    return value


def identity(document: Any, origin: str) -> tuple[str, str, str]:
    """Return kind, namespace and name; raises BadSpec for an unknown kind or version."""
    if not isinstance(document, dict):
        raise BadSpec("", "is no Kubernetes object (a mapping with kind)", document=origin)
    kind = document.get("kind")
    if not isinstance(kind, str) or kind not in VERSIONS:
        raise BadSpec("kind", f"{kind!r} is not one of {', '.join(VERSIONS)}", document=origin)
    version = document.get("apiVersion")
    if version not in VERSIONS[kind]:
        raise BadSpec(
            "apiVersion",
            f"{version!r} is no version of {kind}",
            f"use {' or '.join(VERSIONS[kind])}",
            document=f"{origin}: {kind}",
        )
    metadata = document.get("metadata")
    where = f"{origin}: {kind}"
    if not isinstance(metadata, dict):
        raise BadSpec("metadata", "must be an object with a name", document=where)
    name = _component(metadata.get("name"), "metadata.name", where, _NAME, 253)
    namespace = metadata.get("namespace", DEFAULT_NAMESPACE)
    return kind, _component(namespace, "metadata.namespace", where, _LABEL, 63), name


def _fields(value: Any, path: str, where: str, known: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadSpec(path, "must be an object", document=where)
    for field in value:
        if field not in known:
            raise BadSpec(
                f"{path}.{field}", "is no field", f"fields are {', '.join(known)}", document=where
            )
    return value


def _list(value: Any, path: str, where: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise BadSpec(path, "must be a list that is not empty", document=where)
    return value


def _reference(value: Any, path: str, where: str) -> Reference:
    if not isinstance(value, str) or not value:
        raise BadSpec(path, "must be an image reference", document=where)
    try:
        return parse(value)
    except BadReference as error:
        raise BadSpec(path, error.message, error.hint, document=where) from None


def _selector(value: Any, path: str, where: str) -> tuple[tuple[str, str], ...]:
    """Read {label: value}, or "label=value,label=value" as the design proposal wrote it."""
    if value is None:
        return ()
    pairs: dict[str, str] = {}
    if isinstance(value, str):
        for part in value.split(","):
            label, equals, text = part.strip().partition("=")
            if not equals or not label:
                raise BadSpec(path, f"{part!r} is not LABEL=VALUE", document=where)
            pairs[label] = text.removeprefix("=")
    elif isinstance(value, dict):
        for label, text in value.items():
            if not isinstance(label, str) or not isinstance(text, str):
                raise BadSpec(
                    f"{path}.{label}", "must be a string", "put quotes around it", document=where
                )
            pairs[label] = text
    else:
        raise BadSpec(path, "must be an object or LABEL=VALUE", document=where)
    return tuple(pairs.items())


def _entry(value: Any, path: str, where: str) -> Entry:
    fields = _fields(value, path, where, ("images", "nodeSelector"))
    seen: dict[Reference, str] = {}
    for index, item in enumerate(_list(fields.get("images"), f"{path}.images", where)):
        here = f"{path}.images[{index}]"
        text = item
        if isinstance(item, dict):
            image = _fields(item, here, where, ("name", "forceFullCache"))
            if not isinstance(image.get("forceFullCache", False), bool):
                raise BadSpec(f"{here}.forceFullCache", "must be true or false", document=where)
            text, here = image.get("name"), f"{here}.name"
        reference = _reference(text, here, where)
        if reference in seen:
            raise BadSpec(here, f"{text} is the same image as {seen[reference]}", document=where)
        seen[reference] = f"images[{index}]"
    return Entry(tuple(seen), _selector(fields.get("nodeSelector"), f"{path}.nodeSelector", where))


def _secrets(value: Any, where: str) -> tuple[str, ...]:
    if value is None:
        return ()
    names: list[str] = []
    if not isinstance(value, list):
        raise BadSpec("spec.imagePullSecrets", "must be a list", document=where)
    for index, item in enumerate(value):
        path = f"spec.imagePullSecrets[{index}]"
        name = _fields(item, path, where, ("name",)).get("name")
        names.append(_component(name, f"{path}.name", where, _NAME, 253))
    return tuple(dict.fromkeys(names))


def read(document: Any, origin: str) -> CacheObject:
    """Read one ImageCache or ImageWarm; raises BadSpec that names object and field."""
    kind, namespace, name = identity(document, origin)
    where = f"{origin}: {kind} {namespace}/{name}"
    annotations = document["metadata"].get("annotations") or {}
    if not isinstance(annotations, dict):
        raise BadSpec("metadata.annotations", "must be an object", document=where)
    schedule = str(annotations.get(SCHEDULE_ANNOTATION, ""))
    if kind == IMAGE_CACHE:
        spec = _fields(document.get("spec"), "spec", where, ("cacheSpec", "imagePullSecrets"))
        entries = tuple(
            _entry(item, f"spec.cacheSpec[{index}]", where)
            for index, item in enumerate(_list(spec.get("cacheSpec"), "spec.cacheSpec", where))
        )
        secrets = _secrets(spec.get("imagePullSecrets"), where)
        return CacheObject(kind, namespace, name, entries, secrets, "", schedule)
    spec = _fields(document.get("spec"), "spec", where, ("image", "nodeName", "imagePullSecrets"))
    node_name = spec.get("nodeName", "")
    if not isinstance(node_name, str):
        raise BadSpec("spec.nodeName", "must be a string", document=where)
    image = _reference(spec.get("image"), "spec.image", where)
    secrets = _secrets(spec.get("imagePullSecrets"), where)
    return CacheObject(kind, namespace, name, (Entry((image,)),), secrets, node_name, schedule)


def flatten(documents: Iterable[Any], origin: str) -> list[tuple[str, Any]]:
    """Return each object with the words that say where it was; Lists give their items."""
    flat: list[tuple[str, Any]] = []
    several = [document for document in documents if document is not None]
    for number, document in enumerate(several, 1):
        here = origin if len(several) == 1 else f"{origin}, document {number}"
        if isinstance(document, dict) and str(document.get("kind", "")).endswith("List"):
            items = document.get("items")
            if not isinstance(items, list):
                raise BadSpec("items", "must be a list", document=here)
            flat += [(f"{here}, items[{index}]", item) for index, item in enumerate(items)]
        else:
            flat.append((here, document))
    return flat


def selects(entry: Entry, labels: Mapping[str, str]) -> bool:
    """True if a node with these labels is meant."""
    return all(labels.get(label) == value for label, value in entry.selector)


def wanted_here(cache: CacheObject, node: str, labels: Mapping[str, str]) -> tuple[Reference, ...]:
    """Return the images that belong on this node, each once."""
    if cache.node_name and cache.node_name != node:
        return ()
    wanted: dict[Reference, None] = {}
    for entry in cache.entries:
        if selects(entry, labels):
            wanted.update(dict.fromkeys(entry.images))
    return tuple(wanted)
