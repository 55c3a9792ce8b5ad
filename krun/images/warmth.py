"""What a start would have to fetch: percent warm and bytes missing, image by image."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from krun.images import credentials
from krun.images.credentials import AuthFile
from krun.images.references import Reference
from krun.images.registry import Registry, RegistryFailed
from krun.images.stores.model import Image, Store, covers
from krun.record import Record


class Warmth(Record):
    """One image: `state` is warm, partial, cold, outdated (its tag moved) or unknown; bytes are
    those that a pull transfers, -1 where the registry did not say; `note` says why."""

    image: str
    state: str
    percent: float
    missing: int
    total: int
    note: str = ""


def measure(
    store: Store,
    registry: Registry,
    wanted: Sequence[tuple[Reference, list[AuthFile]]],
    images: Sequence[Image],
) -> list[Warmth]:
    """Ask registries and the store; eight registries' answers at a time."""

    def one(pair: tuple[Reference, list[AuthFile]]) -> Warmth:
        return _measure(store, registry, pair[0], pair[1], images)

    with ThreadPoolExecutor(8, "status") as pool:
        return list(pool.map(one, wanted))


def _measure(
    store: Store,
    registry: Registry,
    reference: Reference,
    files: list[AuthFile],
    images: Sequence[Image],
) -> Warmth:
    present = next((image for image in images if covers(image, reference)), None)
    name = str(reference)
    try:
        manifest = registry.resolve(reference, credentials.find(reference, files), diff_ids=True)
    except RegistryFailed as error:
        if present is not None:
            return Warmth(name, "warm", 100.0, 0, -1, error.message)
        return Warmth(name, "unknown", 0.0, -1, -1, error.message)
    total = sum(layer.size for layer in manifest.layers)
    ids = {f"{reference.name}@{manifest.digest}", f"{reference.name}@{manifest.manifest}"}
    if present is not None and (ids & set(present.digests) or present.id == manifest.config):
        return Warmth(name, "warm", 100.0, 0, total)
    missing = sum(layer.size for layer in store.missing(manifest))
    percent = 100.0 * (total - missing) / total if total else 0.0
    if present is not None:
        return Warmth(name, "outdated", percent, missing, total, "its tag names another image now")
    return Warmth(name, "partial" if missing < total else "cold", percent, missing, total)
