"""containerd: lists, pins and removes through its gRPC API, pulls through ctr.

A pull is the client's work in containerd 1.x (resolve, fetch, unpack), so ctr does it; its
credentials travel in a hosts.toml of mode 0600, never on a command line.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

from krun.images import registry
from krun.images.settings import ContainerdSettings
from krun.images.stores import scratch
from krun.images.stores.containerd_api import Api, Refused
from krun.images.stores.counting import Counter
from krun.images.stores.model import (
    PIN_LABEL,
    PINNED_BY_STORE,
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
    pull_failed,
)
from krun.images.stores.processes import Programs

# What containerd's CRI and the kubelet's garbage collection look at (containerd 1.7, CRI 1.25).
_CRI_PINNED = "io.cri-containerd.pinned"
_SECONDS = 60.0
_GC_LAYER = "containerd.io/gc.ref.content.l."
_GC_MANIFEST = "containerd.io/gc.ref.content.m."
_GC_CONFIG = "containerd.io/gc.ref.content.config"
_UNCOMPRESSED = "containerd.io/uncompressed"
# One layer's line of ctr's progress: "layer-sha256:…: downloading |++--|  4.0 MiB/28.6 MiB".
_BYTES = re.compile(r"^layer-(\S+):\s+(\w+)\s.*?([\d.]+) (\w+)/([\d.]+) (\w+)")
_DONE = re.compile(r"^layer-(\S+):\s+(done|exists)\b")
_UNITS = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


class Containerd:
    """The images of one containerd namespace."""

    name = "containerd"

    def __init__(self, settings: ContainerdSettings) -> None:
        self._settings = settings
        self._programs = Programs()
        self._connected: Api | None = None

    @contextmanager
    def _asked(self, what: str) -> Any:
        settings = self._settings
        if self._connected is None:
            self._connected = Api(settings.address, settings.namespace, _SECONDS)
        try:
            yield self._connected
        except Refused as error:
            if error.code == "UNAVAILABLE":
                raise StoreUnavailable(
                    f"containerd at {settings.address}: does not answer",
                    "start containerd, or set containerd.address in /etc/krun/images.toml",
                ) from error
            raise StoreFailed(f"containerd: {what}: {error}") from error

    def images(self) -> list[Image]:
        """Return every image; records with one target are one image."""
        with self._asked("list images") as api:
            records = api.images()
            blobs = {blob.digest: blob for blob in api.content()}
        return _images(records, blobs)

    def in_use(self) -> dict[str, list[str]]:
        """Return which containers use an image, by image id."""
        with self._asked("list containers") as api:
            containers = api.containers()
            if not containers:
                return {}
            records = api.images()
            blobs = {blob.digest: blob for blob in api.content()}
        ids = {record.name: _config_of(record.target.digest, blobs) for record in records}
        used: dict[str, list[str]] = {}
        for container in containers:
            # The CRI plugin files the image's id, ctr its name.
            image_id = ids.get(container.image) or container.image
            used.setdefault(image_id, []).append(container.id)
        return used

    def missing(self, manifest: Manifest) -> list[Layer]:
        """Return the layers whose blobs the content store lacks.

        None is lacking when the image itself is there: with discard_unpacked_layers its blobs
        are gone although it runs.
        """
        with self._asked("list content") as api:
            blobs = {blob.digest for blob in api.content()}
            targets = {record.target.digest for record in api.images()}
        if manifest.digest in targets or manifest.manifest in targets:
            return []
        return [layer for layer in manifest.layers if layer.digest not in blobs]

    def _ctr(self, *words: str) -> list[str]:
        settings = self._settings
        return [
            settings.program,
            f"--address={settings.address}",
            f"--namespace={settings.namespace}",
            *words,
        ]

    def pull(self, request: PullRequest, report: Callable[[Progress], None]) -> None:
        """Fetch an image; raises PullFailed."""
        image = str(request.reference)
        reference = request.reference
        argv = self._ctr("images", "pull")
        if request.layers_at_once:
            argv.append(f"--max-concurrent-downloads={request.layers_at_once}")
        if self._settings.snapshotter:
            argv.append(f"--snapshotter={self._settings.snapshotter}")
        counter = Counter(image, report)
        counter.stage("resolving")
        with contextlib.ExitStack() as stack:
            directory = self._hosts_directory(request, stack)
            if directory:
                argv.append(f"--hosts-dir={directory}")
            elif os.path.isdir(self._settings.hosts_directory):
                argv.append(f"--hosts-dir={self._settings.hosts_directory}")
            result = self._programs.run(
                [*argv, reference.pullable],
                timeout=request.timeout,
                on_line=lambda line: _count(line, counter),
            )
        if result.cancelled:
            raise cancelled(image)
        if result.timed_out:
            raise late(image, request.timeout)
        if result.status:
            raise pull_failed(image, _ctr_error(result.errors) or result.output)
        if reference.digest and reference.tag:
            self._tag(reference.digested, reference.tagged)

    def _tag(self, source: str, name: str) -> None:
        with self._asked(f"tag {name}") as api:
            like = next(record for record in api.images() if record.name == source)
            try:
                api.create_image(name, like)
            except Refused as error:
                if error.code != "ALREADY_EXISTS":
                    raise
                api.delete_image(name)
                api.create_image(name, like)

    def _hosts_directory(self, request: PullRequest, stack: contextlib.ExitStack) -> str:
        """Make a hosts directory for this pull where the registry needs one, else return "".

        A registry that needs no credential, CA or plain HTTP keeps the node's own mirrors.  The
        directory goes when the stack is left.
        """
        special = request.credential or request.certificates or request.insecure
        if not special and request.scheme == "https":
            return ""
        host = request.reference.host
        access = registry.Access(request.scheme, request.insecure, request.certificates)
        authorization = ""
        if request.credential is not None:
            asked = registry.Registry(
                [host] if request.insecure else [],
                [os.path.dirname(request.certificates)] if request.certificates else [],
            )
            try:
                authorization = asked.authorization(request.reference, request.credential)
            except registry.RegistryFailed as error:
                raise PullFailed(
                    f"pull {request.reference}: {error.message}",
                    "ErrImagePull" if error.status else "RegistryUnavailable",
                    error.status in (401, 403, 404),
                    error.hint,
                ) from error
        directory = stack.enter_context(scratch.directory("krun-hosts-"))
        os.mkdir(f"{directory}/{host}", 0o700)
        fd = os.open(f"{directory}/{host}/hosts.toml", os.O_WRONLY | os.O_CREAT, 0o600)
        with open(fd, "w") as file:
            file.write(registry.hosts_toml(host, access, authorization))
        return directory

    def remove(self, name: str) -> None:
        """Remove a name, and the image with its last name; no error when it is not there.

        The CRI plugin keeps further records of the same image (its id, its digest name), which
        would keep every byte; they go with the last tag.
        """
        with self._asked(f"remove {name}") as api:
            records = api.images()
            target = next((r.target.digest for r in records if r.name == name), None)
            if target is None:
                return
            same = [r.name for r in records if r.target.digest == target and r.name != name]
            tags = [other for other in same if not other.startswith("sha256:") and "@" not in other]
            for other in [name] if tags else [*same, name]:
                try:
                    api.delete_image(other)
                except Refused as error:
                    if error.code != "NOT_FOUND":
                        raise

    def pin(self, image: Image, by: str) -> None:
        """Label every record of the image: the kubelet's garbage collection leaves it alone."""
        self._label(image, by)

    def unpin(self, image: Image) -> None:
        """Undo pin."""
        self._label(image, "")

    def _label(self, image: Image, by: str) -> None:
        with self._asked("label") as api:
            blobs = {blob.digest: blob for blob in api.content()}
            for record in api.images():
                if _config_of(record.target.digest, blobs) == image.id:
                    api.set_label(record.name, _CRI_PINNED, "pinned" if by else "")
                    api.set_label(record.name, PIN_LABEL, by)

    def directory(self) -> str:
        """Return a directory of the file system that pulls fill."""
        with self._asked("plugins") as api:
            for plugin in api.plugins():
                if plugin.type == "io.containerd.content.v1":
                    return str(plugin.exports.get("root", "")) or "/var/lib/containerd"
        return "/var/lib/containerd"

    def cancel(self) -> None:
        """End the pulls under way, from another thread; they raise PullFailed."""
        self._programs.cancel()

    def close(self) -> None:
        """Let go of what is kept between two pulls: nothing."""


def _manifest_of(target: str, blobs: dict[str, Any]) -> str:
    """Return the manifest that an index leads to on this node: the one whose config is here."""
    blob = blobs.get(target)
    if blob is None or _GC_CONFIG in blob.labels:
        return target
    for label in sorted(blob.labels):
        if label.startswith(_GC_MANIFEST):
            manifest = blobs.get(blob.labels[label])
            if manifest is not None and manifest.labels.get(_GC_CONFIG) in blobs:
                return str(manifest.digest)
    return target


def _config_of(target: str, blobs: dict[str, Any]) -> str:
    """Return the image id: the digest of the configuration, or the target's where it is gone."""
    manifest = blobs.get(_manifest_of(target, blobs))
    return str(manifest.labels.get(_GC_CONFIG, target)) if manifest is not None else target


def _images(records: list[Any], blobs: dict[str, Any]) -> list[Image]:
    groups: dict[str, list[Any]] = {}
    for record in records:
        groups.setdefault(record.target.digest, []).append(record)
    images = []
    for target, group in groups.items():
        names: list[str] = []
        digests: dict[str, None] = {}
        pinned = ""
        for record in group:
            if record.labels.get(PIN_LABEL):
                pinned = record.labels[PIN_LABEL]
            elif record.labels.get(_CRI_PINNED) == "pinned":
                pinned = pinned or PINNED_BY_STORE
            reference = None if record.name.startswith("sha256:") else canonical(record.name)
            if reference is None:
                continue
            if reference.tag:
                names.append(reference.tagged)
            digests[f"{reference.name}@{target}"] = None
        layers = _layers(_manifest_of(target, blobs), blobs)
        images.append(
            Image(
                _config_of(target, blobs),
                tuple(names),
                tuple(digests),
                layers,
                sum(layer.size for layer in layers),
                max(record.updated_at.seconds for record in group),
                pinned,
            )
        )
    return images


def _layers(manifest: str, blobs: dict[str, Any]) -> tuple[Layer, ...]:
    """Return the layers of a manifest from the content store's labels."""
    blob = blobs.get(manifest)
    if blob is None:
        return ()
    numbered = sorted(
        (int(label[len(_GC_LAYER) :]), digest)
        for label, digest in blob.labels.items()
        if label.startswith(_GC_LAYER) and label[len(_GC_LAYER) :].isdigit()
    )
    layers = []
    for _, digest in numbered:
        found = blobs.get(digest)
        if found is None:
            layers.append(Layer(digest, "", 0))
        else:
            layers.append(Layer(digest, found.labels.get(_UNCOMPRESSED, ""), found.size))
    return tuple(layers)


def _count(line: str, counter: Counter) -> None:
    """Count one line of ctr's progress."""
    plain = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", line)
    if found := _BYTES.match(plain):
        digest, _, done, unit, total, total_unit = found.groups()
        sizes = (float(done) * _UNITS.get(unit, 1), float(total) * _UNITS.get(total_unit, 1))
        counter.fetched(digest, int(sizes[0]), int(sizes[1]))
    elif found := _DONE.match(plain):
        counter.complete(found.group(1))


def _ctr_error(text: str) -> str:
    """Return ctr's own error without its log lines."""
    return "\n".join(line for line in text.splitlines() if not line.startswith("time="))
