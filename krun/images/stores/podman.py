"""podman: pulls by its REST API, lists by the indexes of containers/storage, else its command line.

`podman images` computes every image's size anew (0.8 s for 200 images); the indexes that
containers/storage replaces atomically (images.json, layers.json) hold the same facts and read in
milliseconds.
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import datetime
from typing import Any

from krun.images.credentials import Credential
from krun.images.references import Reference
from krun.images.settings import PodmanSettings
from krun.images.stores.counting import Counter
from krun.images.stores.model import (
    PIN_LABEL,
    Image,
    Layer,
    Manifest,
    Progress,
    PullFailed,
    PullRequest,
    StoreFailed,
    StoreUnavailable,
    cancelled,
    canonical,
    late,
    pin_name,
    pull_failed,
)
from krun.images.stores.podman_service import Disconnected, Service, in_memory, parallel_layers
from krun.images.stores.processes import Programs

# How often a store that tells no bytes is looked at.
_WATCH_SECONDS = 0.25


class Podman:
    """The images of one containers/storage root."""

    name = "podman"

    def __init__(self, settings: PodmanSettings) -> None:
        self._programs = Programs()
        self._argv = [settings.program]
        if settings.root:
            self._argv += ["--root", settings.root]
        if settings.runroot:
            self._argv += ["--runroot", settings.runroot]
        self._argv += settings.options
        self._root = settings.root
        self._located: tuple[str, str] | None = None
        self._lock = threading.Lock()
        self._idle: list[Service] = []
        self._busy: set[Service] = set()
        self._cancelled = False

    def _location(self) -> tuple[str, str]:
        """Return graph root and driver; `podman info` (0.3 s) only where it is not plain."""
        if self._located is None:
            self._located = _driver_in(self._root)
        if self._located is None:
            output = self._programs.ask([*self._argv, "info", "--format", "json"])
            try:
                store = json.loads(output)["store"]
                self._located = (str(store["graphRoot"]), str(store["graphDriverName"]))
            except (ValueError, KeyError, TypeError):
                raise StoreUnavailable("podman info: its answer has no store") from None
        return self._located

    def _index(self, kind: str) -> list[dict[str, Any]]:
        root, driver = self._location()
        path = f"{root}/{driver}-{kind}/{kind}.json"
        try:
            with open(path, "rb") as file:
                data = file.read()
        except FileNotFoundError:
            return []
        try:
            entries = json.loads(data) if data.strip() else []
        except ValueError as error:
            raise StoreFailed(f"{path}: is not JSON: {error}", "podman system check") from None
        return entries or []

    def _layers(self) -> dict[str, dict[str, Any]]:
        """Return the layers by their storage id."""
        return {entry["id"]: entry for entry in self._index("layers")}

    def images(self) -> list[Image]:
        """Return every image."""
        layers = self._layers()
        pins = self._pins()
        return [_image(entry, layers, pins) for entry in self._index("images")]

    def _containers(self) -> list[dict[str, Any]]:
        output = self._programs.ask([*self._argv, "ps", "--all", "--external", "--format", "json"])
        try:
            return json.loads(output) or []
        except ValueError:
            raise StoreFailed("podman ps: its answer is not JSON") from None

    def in_use(self) -> dict[str, list[str]]:
        """Return which containers use an image, by image id; containers that pin do not count."""
        used: dict[str, list[str]] = {}
        for container in self._containers():
            if PIN_LABEL not in (container.get("Labels") or {}):
                names = container.get("Names") or [container.get("Id", "")[:12]]
                used.setdefault(f"sha256:{container.get('ImageID', '')}", []).append(names[0])
        return used

    def _pins(self) -> dict[str, str]:
        """Return who pinned an image, by id: containers are looked at only where a pin exists."""
        names = (name for entry in self._index("containers") for name in entry.get("names") or ())
        if not any(name.startswith("krun-pin-") for name in names):
            return {}
        return {
            f"sha256:{container['ImageID']}": container["Labels"][PIN_LABEL]
            for container in self._containers()
            if PIN_LABEL in (container.get("Labels") or {})
        }

    def _present(self) -> set[str]:
        """Return the digests of the layers that are here, of their blobs and of their content."""
        entries = self._index("layers")
        return {
            str(entry.get(key))
            for entry in entries
            for key in ("compressed-diff-digest", "diff-digest")
        }

    def missing(self, manifest: Manifest) -> list[Layer]:
        """Return the layers to fetch: podman finds those it has by the digest of the blob."""
        present = self._present()
        return [layer for layer in manifest.layers if not _is_in(layer, present)]

    def pull(self, request: PullRequest, report: Callable[[Progress], None]) -> None:
        """Fetch an image; raises PullFailed."""
        reference = request.reference
        counter = Counter(str(reference), report)
        counter.stage("resolving")
        by_program = bool(request.certificates) and not _reads(request.certificates)
        told = request.verified and not by_program
        with self._watched(() if told else request.missing, counter):
            if by_program:
                self._pull_by_program(request)
            else:
                self._pull_by_service(request, counter)
        if reference.digest and reference.tag:
            self._programs.ask([*self._argv, "tag", reference.digested, reference.tagged])

    def _pull_by_service(self, request: PullRequest, counter: Counter) -> None:
        image = str(request.reference)
        while True:
            service, fresh = self._take(request)
            error, lost = "", None
            try:
                for event in service.pull(request):
                    error = str(event.get("error") or error)
                    counter.event(event)
            except Disconnected as disconnected:
                lost = disconnected
            finally:
                said = self._give_back(service, broken=lost is not None)
            if self._cancelled:
                raise cancelled(image)
            if error:
                raise pull_failed(image, error)
            if lost is None:
                return
            if lost.late:
                raise late(image, request.timeout)
            if fresh or lost.answered:
                raise PullFailed(
                    f"pull {image}: podman system service ended: {said}", "ErrImagePull", False
                )
            # One that had nothing to do for so long that it ended just now.

    def _take(self, request: PullRequest) -> tuple[Service, bool]:
        """Return a service for one pull, and whether it was started for it."""
        with self._lock:
            if self._cancelled:
                raise cancelled(request.reference)
            service = self._idle.pop() if self._idle else None
            if fresh := service is None:
                service = Service(self._argv, request.layers_at_once)
            self._busy.add(service)
        return service, fresh

    def _give_back(self, service: Service, *, broken: bool) -> str:
        """Keep a service for the next pull; end a broken one and return its last words."""
        with self._lock:
            self._busy.discard(service)
            if not broken and not self._cancelled:
                self._idle.append(service)
                return ""
        return service.end(idle=not broken)

    @contextmanager
    def _watched(self, layers: Sequence[Layer], counter: Counter) -> Iterator[None]:
        """Count each layer when the store has it: for pulls whose bytes podman does not tell."""
        if not layers:
            yield
            return
        counter.expect(layers)
        ended = threading.Event()

        def watch() -> None:
            last = False
            while not last:
                last = ended.wait(_WATCH_SECONDS)
                present = self._present()
                for layer in layers:
                    if _is_in(layer, present):
                        counter.complete(layer.digest)

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def _pull_by_program(self, request: PullRequest) -> None:
        """Pull with a podman of its own, which alone takes a directory of certificates."""
        image = str(request.reference)
        argv = [*self._argv, "pull", "--quiet", f"--cert-dir={request.certificates}"]
        if not request.verified:
            argv.append("--tls-verify=false")
        environ = dict(os.environ)
        with ExitStack() as stack:
            # podman leaves there what it had fetched when it is ended in the middle.
            environ["TMPDIR"] = stack.enter_context(
                tempfile.TemporaryDirectory(
                    prefix="krun-",
                    dir=environ.get("TMPDIR", "/var/tmp"),
                    ignore_cleanup_errors=True,
                )
            )
            descriptors = []
            if request.credential is not None:
                descriptors.append(_auth_descriptor(request.reference, request.credential))
                argv.append(f"--authfile=/proc/self/fd/{descriptors[-1]}")
            if request.layers_at_once:
                descriptors.append(parallel_layers(request.layers_at_once))
                environ["CONTAINERS_CONF_OVERRIDE"] = f"/proc/self/fd/{descriptors[-1]}"
            for descriptor in descriptors:
                stack.callback(os.close, descriptor)
            result = self._programs.run(
                [*argv, "--", request.reference.pullable],
                timeout=request.timeout,
                environ=environ,
                pass_fds=descriptors,
            )
        # podman ends with 0 when it is told to: what krun did to it comes first.
        if result.cancelled:
            raise cancelled(image)
        if result.timed_out:
            raise late(image, request.timeout)
        if result.status:
            raise pull_failed(image, result.errors or result.output)

    def remove(self, name: str) -> None:
        """Remove a name, and the image with its last name; no error when it is not there."""
        result = self._programs.run([*self._argv, "rmi", "--", name], timeout=120)
        if result.status and "image not known" not in result.errors:
            raise StoreFailed(f"remove {name}: {result.errors.strip().splitlines()[-1][:300]}")

    def pin(self, image: Image, by: str) -> None:
        """Hold the image with a container that never starts: image prune leaves it alone."""
        if image.pinned == by:
            return
        if image.pinned:
            self.unpin(image)
        self._programs.ask(
            [
                *self._argv,
                "create",
                "--pull=never",
                f"--name={pin_name(image)}",
                f"--label={PIN_LABEL}={by}",
                "--network=none",
                "--entrypoint=/krun-pin",
                image.id.removeprefix("sha256:"),
            ]
        )

    def unpin(self, image: Image) -> None:
        """Undo pin."""
        self._programs.ask([*self._argv, "rm", "--force", "--ignore", pin_name(image)])

    def directory(self) -> str:
        """Return a directory of the file system that pulls fill."""
        return self._location()[0]

    def cancel(self) -> None:
        """End the pulls under way, from another thread; they raise PullFailed."""
        self._programs.cancel()
        with self._lock:
            self._cancelled = True
            for service in self._busy:
                service.give_up()

    def close(self) -> None:
        """End the services that wait for a pull."""
        with self._lock:
            idle, self._idle = self._idle, []
        for service in idle:
            service.end(idle=True)


def _driver_in(root: str) -> tuple[str, str] | None:
    """Return a given root with the one driver that has images there, None if that is not clear."""
    try:
        names = os.listdir(root) if root else []
    except FileNotFoundError:
        return None
    drivers = [name.removesuffix("-images") for name in names if name.endswith("-images")]
    return (root, drivers[0]) if len(drivers) == 1 else None


def _is_in(layer: Layer, present: Collection[str]) -> bool:
    return layer.digest in present or (bool(layer.diff_id) and layer.diff_id in present)


def _reads(certificates: str) -> bool:
    """True if podman looks into a host's directory by itself (containers-certs.d(5))."""
    home = os.path.expanduser("~/.config/containers/certs.d")
    return os.path.dirname(certificates) in (home, "/etc/containers/certs.d", "/etc/docker/certs.d")


def _auth_descriptor(reference: Reference, credential: Credential) -> int:
    """Return a descriptor of an auth.json in memory: no password on disk or a command line."""
    entry: dict[str, str] = {"auth": credential.encoded()}
    if credential.identity_token:
        entry["identitytoken"] = credential.identity_token
    return in_memory("auth.json", json.dumps({"auths": {reference.host: entry}}))


def _image(entry: dict[str, Any], layers: dict[str, dict[str, Any]], pins: dict[str, str]) -> Image:
    """Read one entry of images.json."""
    names: list[str] = []
    repositories: dict[str, None] = {}
    digests: dict[str, None] = {}
    for text in entry.get("names") or ():
        reference = canonical(text)
        if reference is None:
            continue
        repositories[reference.name] = None
        if reference.digest:
            digests[reference.digested] = None
        elif reference.tag:
            names.append(reference.tagged)
    manifests = {
        digest
        for key, digest in (entry.get("big-data-digests") or {}).items()
        if key == "manifest" or key.startswith("manifest-")
    }
    if entry.get("digest"):
        manifests.add(entry["digest"])
    for repository in repositories:
        for digest in sorted(manifests):
            digests[f"{repository}@{digest}"] = None
    chain: list[Layer] = []
    layer_id = entry.get("layer", "")
    while layer_id:
        found = layers.get(layer_id)
        if found is None:
            break
        chain.append(
            Layer(
                found.get("compressed-diff-digest", ""),
                found.get("diff-digest", ""),
                int(found.get("diff-size", 0)),
            )
        )
        layer_id = found.get("parent", "")
    chain.reverse()
    config = sum((entry.get("big-data-sizes") or {}).values())
    return Image(
        f"sha256:{entry['id']}",
        tuple(names),
        tuple(digests),
        tuple(chain),
        sum(layer.size for layer in chain) + config,
        _seconds(entry.get("created", "")),
        pins.get(f"sha256:{entry['id']}", ""),
    )


def _seconds(text: str) -> float:
    """Return the seconds since the epoch of RFC 3339 with up to nanoseconds."""
    try:
        moment, _, fraction = text.rstrip("Z").partition(".")
        return datetime.fromisoformat(f"{moment}.{fraction[:6] or '0'}+00:00").timestamp()
    except ValueError:
        return 0.0
