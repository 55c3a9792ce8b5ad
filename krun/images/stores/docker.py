"""dockerd through its REST API; sole importer of the docker package."""

from __future__ import annotations

import contextlib
import hashlib
import threading
import time
from collections.abc import Callable
from typing import Any

import docker
import docker.errors
import requests

from krun.images.credentials import Credential
from krun.images.settings import DockerSettings
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
    last_line,
    late,
    pin_name,
    pull_failed,
)

_SECONDS = 60


class Docker:
    """The images of one dockerd."""

    name = "docker"

    def __init__(self, settings: DockerSettings) -> None:
        self._host = settings.host
        self._connected: docker.APIClient | None = None
        self._lock = threading.Lock()
        self._cancelled = threading.Event()
        self._chains: dict[str, set[str]] = {}

    def _client(self) -> docker.APIClient:
        with self._lock:
            if self._connected is None:
                try:
                    self._connected = docker.APIClient(
                        base_url=self._host, version="auto", timeout=_SECONDS, use_ssh_client=True
                    )
                except docker.errors.DockerException as error:
                    raise StoreUnavailable(
                        f"docker at {self._host}: does not answer ({_cause(error)})",
                        "start dockerd, or set docker.host in /etc/krun/images.toml",
                    ) from error
            return self._connected

    @contextlib.contextmanager
    def _asked(self, what: str) -> Any:
        try:
            yield self._client()
        except docker.errors.APIError as error:
            raise StoreFailed(f"docker: {what}: {last_line(str(error.explanation))}") from error
        except requests.RequestException as error:
            raise StoreUnavailable(
                f"docker at {self._host}: {what}: {_cause(error)}", "is dockerd running?"
            ) from error

    def images(self) -> list[Image]:
        """Return every image."""
        with self._asked("list images") as client:
            pins = {
                container["ImageID"]: container["Labels"][PIN_LABEL]
                for container in client.containers(all=True, filters={"label": PIN_LABEL})
            }
            return [_image(entry, pins) for entry in client.images()]

    def layers(self, image_id: str) -> tuple[Layer, ...]:
        """Return an image's layers; their sizes come from its history where it tells."""
        with self._asked("inspect image") as client:
            diff_ids = client.inspect_image(image_id)["RootFS"].get("Layers") or []
            sizes = [step["Size"] for step in client.history(image_id) if step["Size"] > 0]
        sizes.reverse()
        if len(sizes) != len(diff_ids):
            sizes = [0] * (len(diff_ids) - 1) + [sum(sizes)] if diff_ids else []
        return tuple(
            Layer("", diff_id, size) for diff_id, size in zip(diff_ids, sizes, strict=True)
        )

    def in_use(self) -> dict[str, list[str]]:
        """Return which containers use an image, by image id; containers that pin do not count."""
        used: dict[str, list[str]] = {}
        with self._asked("list containers") as client:
            for container in client.containers(all=True):
                if PIN_LABEL in (container.get("Labels") or {}):
                    continue
                name = (container.get("Names") or [container["Id"][:12]])[0].lstrip("/")
                used.setdefault(container["ImageID"], []).append(name)
        return used

    def missing(self, manifest: Manifest) -> list[Layer]:
        """Return the layers to fetch: dockerd reuses whole chains from the bottom only."""
        chains: set[str] = set()
        with self._asked("inspect images") as client:
            for entry in client.images():
                chains |= self._chains_of(client, entry["Id"])
        chain = ""
        for position, layer in enumerate(manifest.layers):
            chain = chain_id(chain, layer.diff_id)
            if not layer.diff_id or chain not in chains:
                return list(manifest.layers[position:])
        return []

    def _chains_of(self, client: docker.APIClient, image_id: str) -> set[str]:
        """Return the ChainIDs of an image; an id's layers never change, so they are kept."""
        known = self._chains.get(image_id)
        if known is None:
            known, chain = set(), ""
            try:
                detail = client.inspect_image(image_id)  # type: ignore[no-untyped-call]
            except docker.errors.ImageNotFound:
                # Removed between the list and here.
                return known
            for diff_id in detail["RootFS"].get("Layers") or []:
                chain = chain_id(chain, diff_id)
                known.add(chain)
            self._chains[image_id] = known
        return known

    def pull(self, request: PullRequest, report: Callable[[Progress], None]) -> None:
        """Fetch an image; raises PullFailed."""
        image = str(request.reference)
        reference = request.reference
        deadline = time.monotonic() + request.timeout
        counter = Counter(image, report)
        counter.stage("resolving")
        try:
            stream = self._client().pull(
                reference.name,
                tag=reference.digest or reference.tag,
                stream=True,
                decode=True,
                auth_config=_auth(request.credential, reference.host) or {},
            )
            for event in stream:
                if self._cancelled.is_set():
                    stream.close()
                    raise cancelled(image)
                if time.monotonic() > deadline:
                    # Closing the connection makes dockerd give the pull up.
                    stream.close()
                    raise late(image, request.timeout)
                if "error" in event:
                    raise pull_failed(image, str(event["error"]))
                counter.event(event)
            if reference.digest and reference.tag:
                self._client().tag(reference.digested, reference.name, reference.tag)
        except docker.errors.APIError as error:
            raise pull_failed(image, str(error.explanation or error)) from error
        except requests.exceptions.ReadTimeout as error:
            raise PullFailed(
                f"pull {image}: dockerd was silent for {_SECONDS} s", "ErrImagePull", False
            ) from error
        except requests.RequestException as error:
            raise StoreUnavailable(
                f"docker at {self._host}: pull {image}: {_cause(error)}", "is dockerd running?"
            ) from error

    def remove(self, name: str) -> None:
        """Remove a name, and the image with its last name; no error when it is not there."""
        with self._asked(f"remove {name}") as client:
            try:
                client.remove_image(name)
            except docker.errors.ImageNotFound:
                return

    def pin(self, image: Image, by: str) -> None:
        """Hold the image with a container that never starts: image prune leaves it alone."""
        if image.pinned == by:
            return
        if image.pinned:
            self.unpin(image)
        with self._asked("pin") as client:
            client.create_container(
                image.id,
                command=["/krun-pin"],
                name=pin_name(image),
                labels={PIN_LABEL: by},
                host_config=client.create_host_config(network_mode="none"),
            )

    def unpin(self, image: Image) -> None:
        """Undo pin."""
        with self._asked("unpin") as client:
            try:
                client.remove_container(pin_name(image), force=True)
            except docker.errors.NotFound:
                return

    def directory(self) -> str:
        """Return a directory of the file system that pulls fill."""
        with self._asked("info") as client:
            return str(client.info()["DockerRootDir"])

    def cancel(self) -> None:
        """End the pulls under way, from another thread; they raise PullFailed."""
        self._cancelled.set()

    def close(self) -> None:
        """Let go of what is kept between two pulls: nothing."""


def chain_id(parent: str, diff_id: str) -> str:
    """Return the ChainID of a layer on its parent (image-spec, config.md)."""
    if not parent:
        return diff_id
    return "sha256:" + hashlib.sha256(f"{parent} {diff_id}".encode()).hexdigest()


def _auth(credential: Credential | None, host: str) -> dict[str, str] | None:
    if credential is None:
        return None
    if credential.identity_token:
        return {"identitytoken": credential.identity_token, "serveraddress": host}
    return {
        "username": credential.username,
        "password": credential.password,
        "serveraddress": host,
    }


def _image(entry: dict[str, Any], pins: dict[str, str]) -> Image:
    names = [canonical(text) for text in entry.get("RepoTags") or () if "<none>" not in text]
    digests = [canonical(text) for text in entry.get("RepoDigests") or () if "<none>" not in text]
    return Image(
        entry["Id"],
        tuple(reference.tagged for reference in names if reference is not None),
        tuple(reference.digested for reference in digests if reference is not None),
        (),
        int(entry.get("Size", 0)),
        float(entry.get("Created", 0)),
        pins.get(entry["Id"], ""),
    )


def _cause(error: BaseException) -> str:
    """Return the innermost reason on one line."""
    text = str(error)
    for words in ("No such file or directory", "Connection refused", "Permission denied"):
        if words in text:
            return words
    return last_line(text)[:200]
