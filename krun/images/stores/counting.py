"""Count the bytes of one pull, layer by layer, and report their sum."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from krun.images.stores.model import Layer, Progress


class Counter:
    """The layers of one pull: bytes fetched and bytes in all, as far as the store tells."""

    def __init__(self, image: str, report: Callable[[Progress], None]) -> None:
        self._image = image
        self._report = report
        self._layers: dict[str, tuple[int, int]] = {}

    def stage(self, stage: str) -> None:
        """Report where the pull is."""
        self._report(Progress(self._image, stage))

    def expect(self, layers: Iterable[Layer]) -> None:
        """Take the sizes of the layers to come from elsewhere: the registry's manifest."""
        self._layers.update((layer.digest, (0, layer.size)) for layer in layers)

    def fetched(self, layer: str, done: int, total: int) -> None:
        """Report that so many bytes of a layer are here."""
        self._layers[layer] = (done, total)
        self._report(
            Progress(
                self._image,
                "fetching",
                sum(done for done, _ in self._layers.values()),
                sum(total for _, total in self._layers.values()),
            )
        )

    def complete(self, layer: str) -> None:
        """Report that a layer is here; one whose size was never told does not count."""
        if layer in self._layers:
            total = self._layers[layer][1]
            self.fetched(layer, total, total)

    def event(self, event: dict[str, Any]) -> None:
        """Count one event of a pull in dockerd's form (Docker Engine API, POST /images/create)."""
        status, layer = event.get("status", ""), event.get("id", "")
        detail = event.get("progressDetail") or {}
        if status == "Downloading" and detail.get("total"):
            self.fetched(layer, int(detail.get("current", 0)), int(detail["total"]))
        elif status in ("Download complete", "Pull complete"):
            self.complete(layer)
