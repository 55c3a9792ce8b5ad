"""Carry out pulls and removals: in parallel, with retries, and only where the disk has room."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from krun.errors import KrunError
from krun.images import credentials
from krun.images.credentials import AuthFile
from krun.images.decide import Kept, Outcome, Pull, Removal, store_name
from krun.images.quantities import show_size
from krun.images.references import Reference
from krun.images.registry import Registry, RegistryFailed
from krun.images.settings import Settings
from krun.images.stores.model import (
    Layer,
    Manifest,
    Progress,
    PullFailed,
    PullRequest,
    Store,
    cancelled,
)

_LONGEST_BACKOFF = 30.0


class Reporter(Protocol):
    """Who shows a person or a program how the work goes; called from several threads."""

    @property
    def shows_bytes(self) -> bool:
        """True if somebody watches the bytes of a pull."""
        ...

    def begin(self, name: str) -> None:
        """A pull starts."""
        ...

    def progress(self, progress: Progress) -> None:
        """A pull goes on."""
        ...

    def retry(self, name: str, error: str, seconds: float) -> None:
        """A pull failed and will be tried again after these seconds."""
        ...

    def end(self, outcome: Outcome, seconds: float) -> None:
        """A pull or removal ended."""
        ...


class _Room:
    """The bytes that pulls under way have been promised on the store's file system."""

    def __init__(self, directory: str, reserve: int) -> None:
        self._directory = directory
        self._reserve = reserve
        self._promised = 0
        self._lock = threading.Lock()

    def claim(self, name: str, need: int) -> None:
        """Promise bytes to a pull; raises PullFailed when they are not there."""
        with self._lock:
            file_system = os.statvfs(self._directory)
            free = file_system.f_bavail * file_system.f_frsize - self._promised
            if need > free - self._reserve:
                raise PullFailed(
                    f"pull {name}: needs about {show_size(need)} on {self._directory}, "
                    f"{show_size(max(0, free))} free, {show_size(self._reserve)} reserved",
                    "NoDiskSpace",
                    True,
                    "free disk space, run krun images gc, or lower disk_reserve",
                )
            self._promised += need

    def give_back(self, need: int) -> None:
        """Take a promise back: the pull ended."""
        with self._lock:
            self._promised -= need


class _Layers:
    """The layers that pulls under way fetch.

    dockerd and containerd fetch a layer once for all who wait for it; podman pulls are processes
    that know nothing of each other, so a pull waits here until nobody else fetches what it lacks.
    """

    def __init__(self) -> None:
        self._busy: set[str] = set()
        self._changed = threading.Condition()

    def claim(self, missing: Callable[[], list[Layer]], stop: threading.Event) -> list[Layer]:
        """Return what a pull lacks, once no other pull is fetching any of it."""
        with self._changed:
            while True:
                layers = missing()
                digests = {layer.digest for layer in layers}
                if not digests & self._busy or stop.is_set():
                    self._busy |= digests
                    return layers
                self._changed.wait(1.0)

    def give_back(self, layers: Sequence[Layer]) -> None:
        """Let others have these layers: the pull ended."""
        with self._changed:
            self._busy.difference_update(layer.digest for layer in layers)
            self._changed.notify_all()


class Worker:
    """One batch of pulls and removals on a store."""

    def __init__(
        self,
        settings: Settings,
        store: Store,
        reporter: Reporter,
        credentials_for: Callable[[Sequence[str]], list[AuthFile]],
    ) -> None:
        self._settings = settings
        self._store = store
        self._reporter = reporter
        self._credentials_for = credentials_for
        self._registry = Registry(settings.insecure_registries, settings.certs_directories)
        self._stop = threading.Event()
        self._layers = _Layers()
        self._room: _Room | None = None

    def pull_all(self, pulls: Sequence[Pull]) -> dict[str, Outcome]:
        """Fetch images, `parallel_pulls` at a time; return how each ended, by store name.

        On KeyboardInterrupt the pulls under way are ended before it goes on.
        """
        if not pulls:
            return {}
        if self._settings.disk_check:
            self._room = _Room(self._store.directory(), self._settings.disk_reserve)
        pool = ThreadPoolExecutor(self._settings.parallel_pulls, "pull")
        try:
            outcomes = list(pool.map(self._pull, pulls))
        except BaseException:
            self._stop.set()
            self._store.cancel()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
            self._store.close()
        return {outcome.name: outcome for outcome in outcomes}

    def _pull(self, pull: Pull) -> Outcome:
        name = store_name(pull.reference)
        began = time.monotonic()
        try:
            pulled = self._pull_with_retries(pull)
            outcome = Outcome(name, pulled=pulled)
        except PullFailed as error:
            outcome = Outcome(name, reason=error.reason, message=str(error))
        except KrunError as error:
            outcome = Outcome(name, reason="ErrImagePull", message=str(error))
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            outcome = Outcome(name, reason="ErrImagePull", message=f"{where}{error.strerror}")
        self._reporter.end(outcome, time.monotonic() - began)
        return outcome

    def _pull_with_retries(self, pull: Pull) -> bool:
        """Pull once or several times; True if something was fetched."""
        reference = pull.reference
        credential = credentials.find(reference, self._credentials_for(pull.keys))
        wait = self._settings.backoff
        for attempt in range(self._settings.retries + 1):
            try:
                return self._pull_once(pull, credential)
            except PullFailed as error:
                if error.permanent or attempt == self._settings.retries or self._stop.is_set():
                    raise
                self._reporter.retry(store_name(reference), str(error), wait)
                if self._stop.wait(wait):
                    raise
                wait = min(wait * 2, _LONGEST_BACKOFF)
        raise AssertionError("unreachable")

    def _ask(
        self, reference: Reference, credential: credentials.Credential | None
    ) -> tuple[Manifest | None, RegistryFailed | None]:
        """Return what the registry says of an image, or why it said nothing.

        The store may reach it all the same: it knows mirrors that are none of krun's business.
        """
        try:
            # Chain stores are told by diff_ids which layers they have.
            diff_ids = self._store.name == "docker"
            return self._registry.resolve(reference, credential, diff_ids), None
        except RegistryFailed as error:
            return None, error

    def _pull_once(self, pull: Pull, credential: credentials.Credential | None) -> bool:
        reference = pull.reference
        if self._stop.is_set():
            raise cancelled(reference)
        refused = None
        if pull.present:
            try:
                digest = self._registry.digest(reference, credential)
            except RegistryFailed as error:
                refused = error
            else:
                if f"{reference.name}@{digest}" in pull.present:
                    return False
        self._reporter.begin(store_name(reference))
        manifest = None
        if self._room is not None and refused is None:
            manifest, refused = self._ask(reference, credential)
        missing: list[Layer] = []
        if manifest is not None:
            missing = self._missing(manifest)
        need = int(sum(layer.size for layer in missing) * self._settings.disk_expansion)
        claimed = False
        try:
            if self._room is not None and need:
                self._room.claim(str(reference), need)
                claimed = True
            self._fetch(reference, credential, missing)
        except PullFailed as error:
            status = refused.status if refused is not None else 0
            if refused is not None and status in (401, 403, 404) and not self._stop.is_set():
                # The registry's own answer is clearer than what the store made of it.
                raise PullFailed(
                    f"pull {reference}: {refused.message}", error.reason, True, refused.hint
                ) from error
            raise
        finally:
            if self._room is not None and claimed:
                self._room.give_back(need)
            self._layers.give_back(missing)
        return True

    def _missing(self, manifest: Manifest) -> list[Layer]:
        """Return the layers to fetch; with podman, when nobody else is fetching them."""
        if self._store.name == "podman":
            return self._layers.claim(lambda: self._store.missing(manifest), self._stop)
        return self._store.missing(manifest)

    def _fetch(
        self,
        reference: Reference,
        credential: credentials.Credential | None,
        missing: Sequence[Layer],
    ) -> None:
        access = self._registry.access(reference.host)
        request = PullRequest(
            reference,
            credential,
            self._settings.timeout,
            access.scheme,
            access.insecure,
            access.certificates,
            self._settings.layers_at_once,
            tuple(missing) if self._reporter.shows_bytes else (),
        )
        name = store_name(reference)
        self._store.pull(
            request, lambda progress: self._reporter.progress(progress._replace(image=name))
        )

    def remove_all(self, removals: Sequence[Removal]) -> tuple[dict[str, Outcome], list[Kept]]:
        """Remove names; one whose image came into use meanwhile is kept."""
        if not removals:
            return {}, []
        used = self._store.in_use()
        ids = {name: image.id for image in self._store.images() for name in image.names}
        for image in self._store.images():
            for name in image.digests:
                ids.setdefault(name, image.id)
        outcomes: dict[str, Outcome] = {}
        kept: list[Kept] = []
        for removal in removals:
            containers = used.get(ids.get(removal.name, ""))
            if containers:
                kept.append(Kept(removal.name, removal.keys, tuple(containers)))
                continue
            began = time.monotonic()
            try:
                self._store.remove(removal.name)
                outcome = Outcome(removal.name, removed=True)
            except KrunError as error:
                outcome = Outcome(removal.name, reason="ErrImageRemove", message=str(error))
            outcomes[removal.name] = outcome
            self._reporter.end(outcome, time.monotonic() - began)
        return outcomes, kept
