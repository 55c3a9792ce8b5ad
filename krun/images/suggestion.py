"""An ImageCache of what the ledger saw. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from krun.images.references import BadReference, parse


def suggest(
    entries: Iterable[Mapping[str, Any]],
    *,
    name: str,
    namespace: str,
    of_namespace: str = "",
    annotated: bool = False,
    since: float = 0.0,
    least: int = 1,
    by_digest: bool = False,
) -> dict[str, Any] | None:
    """Return the manifest, most started image first; None when nothing matches.

    `since` is in seconds since the epoch; `least` is the fewest starts that count.
    """
    starts: dict[str, int] = {}
    for entry in entries:
        if entry.get("event") != "start" or entry.get("time", 0) < since:
            continue
        if of_namespace and entry.get("namespace") != of_namespace:
            continue
        if annotated and not entry.get("cache"):
            continue
        try:
            reference = parse(str(entry.get("image", "")))
        except BadReference:
            continue
        digest = entry.get("digest")
        if by_digest and isinstance(digest, str) and digest:
            text = f"{reference.name}@{digest}"
        else:
            text = str(reference)
        starts[text] = starts.get(text, 0) + 1
    images = sorted(
        (image for image, number in starts.items() if number >= least),
        key=lambda image: (-starts[image], image),
    )
    if not images:
        return None
    return {
        "apiVersion": "kubefledged.io/v1alpha2",
        "kind": "ImageCache",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"cacheSpec": [{"images": images}]},
    }
