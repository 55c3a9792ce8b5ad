"""Open the store that the settings name; each store's client is imported only when chosen."""

from __future__ import annotations

from krun.errors import UsageError
from krun.images.settings import STORES, Settings
from krun.images.stores.model import Store


def open_store(settings: Settings) -> Store:
    """Return the store; nothing is asked of it yet."""
    if settings.store == "podman":
        from krun.images.stores.podman import Podman

        return Podman(settings.podman)
    if settings.store == "docker":
        from krun.images.stores.docker import Docker

        return Docker(settings.docker)
    if settings.store == "containerd":
        from krun.images.stores.containerd import Containerd

        return Containerd(settings.containerd)
    raise UsageError(f"store {settings.store!r} is not one of {', '.join(STORES)}")
