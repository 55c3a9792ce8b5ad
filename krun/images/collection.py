"""Which images to drop so that a store fits its quota. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from krun.images.stores.model import Image
from krun.record import Record


class Plan(Record):
    """Images to drop, least recently used first; `before` and `after` are bytes of the store."""

    drops: tuple[Image, ...]
    before: int
    after: int


def _sizes(images: Sequence[Image]) -> tuple[dict[str, int], dict[str, int]]:
    """Return the size of each layer and how many images hold it: shared ones count once."""
    sizes: dict[str, int] = {}
    holders: dict[str, int] = {}
    for image in images:
        for key, size in _layers(image):
            sizes[key] = size
            holders[key] = holders.get(key, 0) + 1
    return sizes, holders


def _layers(image: Image) -> list[tuple[str, int]]:
    found = {layer.diff_id or layer.digest: layer.size for layer in image.layers}
    rest = image.size - sum(found.values())
    if rest > 0:
        # What no layer explains: the configuration, or a store that tells no layers.
        found[image.id] = rest
    return list(found.items())


def plan(
    images: Sequence[Image],
    quota: int,
    *,
    used: Collection[str],
    wanted: Collection[str],
    last_used: Mapping[str, float],
) -> Plan:
    """Return what to drop: neither pinned, nor used (image ids), nor wanted (names).

    `last_used` tells times by image id and by name; an image never started counts from when it
    came.
    """
    sizes, holders = _sizes(images)
    before = total = sum(sizes.values())
    candidates = [
        image
        for image in images
        if not image.pinned
        and image.id not in used
        and not any(name in wanted for name in (*image.names, *image.digests))
    ]

    def moment(image: Image) -> float:
        times = [last_used.get(name, 0.0) for name in (image.id, *image.names, *image.digests)]
        return max(image.created, *times)

    drops: list[Image] = []
    for image in sorted(candidates, key=moment):
        if total <= quota:
            break
        drops.append(image)
        for key, _ in _layers(image):
            holders[key] -= 1
            if not holders[key]:
                total -= sizes[key]
    return Plan(tuple(drops), before, total)
