"""podman: pulls and removes through its command line, lists through containers/storage's indexes.

`podman images` computes every image's size anew (0.8 s for 200 images); the indexes that
containers/storage replaces atomically (images.json, layers.json) hold the same facts and read in
milliseconds.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from datetime import datetime
from typing import Any

from krun.images.credentials import Credential
from krun.images.references import BadReference, Reference, parse
from krun.images.settings import PodmanSettings
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
    pull_failed,
)
from krun.images.stores.processes import Programs


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

    def missing(self, manifest: Manifest) -> list[Layer]:
        """Return the layers to fetch: podman finds those it has by the digest of the blob."""
        present = set()
        for entry in self._index("layers"):
            present.add(entry.get("compressed-diff-digest"))
            present.add(entry.get("diff-digest"))
        return [
            layer
            for layer in manifest.layers
            if layer.digest not in present and (not layer.diff_id or layer.diff_id not in present)
        ]

    def pull(self, request: PullRequest, report: Callable[[Progress], None]) -> None:
        """Fetch an image; raises PullFailed."""
        image = str(request.reference)
        argv = [*self._argv, "pull"]
        if request.scheme == "http" or request.insecure:
            argv.append("--tls-verify=false")
        elif request.certificates:
            argv.append(f"--cert-dir={request.certificates}")
        environ = dict(os.environ)
        descriptors = []
        try:
            if request.credential is not None:
                descriptors.append(_auth_descriptor(request.reference, request.credential))
                argv.append(f"--authfile=/proc/self/fd/{descriptors[-1]}")
            if request.layers_at_once:
                # Where podman is too old to read this, image_parallel_copies decides.
                descriptors.append(_layers_descriptor(request.layers_at_once))
                environ["CONTAINERS_CONF_OVERRIDE"] = f"/proc/self/fd/{descriptors[-1]}"
            report(Progress(image, "resolving"))

            def on_line(line: str) -> None:
                if line.startswith("Copying blob"):
                    report(Progress(image, "fetching"))
                elif line.startswith("Writing manifest"):
                    report(Progress(image, "storing"))

            result = self._programs.run(
                [*argv, "--", request.reference.pullable],
                timeout=request.timeout,
                environ=environ,
                on_line=on_line,
                pass_fds=descriptors,
            )
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        if result.status == 0:
            if request.reference.digest and request.reference.tag:
                self._programs.ask(
                    [*self._argv, "tag", request.reference.digested, request.reference.tagged]
                )
            return
        if result.cancelled:
            raise PullFailed(f"pull {image}: cancelled", "ImagePullAborted", True)
        if result.timed_out:
            raise PullFailed(
                f"pull {image}: not done in {request.timeout:.0f} s", "ErrImagePull", False
            )
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
                f"--name={_pin_name(image)}",
                f"--label={PIN_LABEL}={by}",
                "--network=none",
                "--entrypoint=/krun-pin",
                image.id.removeprefix("sha256:"),
            ]
        )

    def unpin(self, image: Image) -> None:
        """Undo pin."""
        self._programs.ask([*self._argv, "rm", "--force", "--ignore", _pin_name(image)])

    def directory(self) -> str:
        """Return a directory of the file system that pulls fill."""
        return self._location()[0]

    def cancel(self) -> None:
        """End the pulls under way, from another thread; they raise PullFailed."""
        self._programs.cancel()


def _driver_in(root: str) -> tuple[str, str] | None:
    """Return a given root with the one driver that has images there, None if that is not clear."""
    try:
        names = os.listdir(root) if root else []
    except FileNotFoundError:
        return None
    drivers = [name.removesuffix("-images") for name in names if name.endswith("-images")]
    return (root, drivers[0]) if len(drivers) == 1 else None


def _pin_name(image: Image) -> str:
    return f"krun-pin-{image.id.removeprefix('sha256:')[:24]}"


def _auth_descriptor(reference: Reference, credential: Credential) -> int:
    """Return a descriptor of an auth.json in memory: no password on disk or a command line."""
    entry: dict[str, str] = {"auth": credential.encoded()}
    if credential.identity_token:
        entry["identitytoken"] = credential.identity_token
    return _memory("auth.json", json.dumps({"auths": {reference.host: entry}}))


def _layers_descriptor(number: int) -> int:
    """Return a descriptor of a containers.conf(5) that limits the layers fetched at once."""
    return _memory("containers.conf", f"[engine]\nimage_parallel_copies = {number}\n")


def _memory(name: str, text: str) -> int:
    fd = os.memfd_create(name, os.MFD_CLOEXEC)
    os.write(fd, text.encode())
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def canonical(name: str) -> Reference | None:
    """Return the reference of a store's own name, None for a name outside the grammar."""
    try:
        return parse(name)
    except BadReference:
        return None


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
