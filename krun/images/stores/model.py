"""What every store answers and does; the records that travel between stores and decisions."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

from krun.errors import KrunError
from krun.images.credentials import Credential
from krun.images.references import BadReference, Reference, parse
from krun.record import Record

# Who pinned an image: a person, a cache object, or the store's own configuration.
PINNED_BY_USER = "user"
PINNED_BY_CACHE = "cache"
PINNED_BY_STORE = "store"
# The label that says so, on the image (containerd) or on the container that holds it.
PIN_LABEL = "app.kontain.pin"


class Layer(Record):
    """One layer: `digest` of the blob as transferred ("" if unknown), `diff_id` of its content
    ("" if unknown), `size` in bytes as the store counts it."""

    digest: str
    diff_id: str
    size: int


class Image(Record):
    """One image of a store.

    `id` is the digest of its configuration, `names` are canonical host/path:tag, `digests` are
    host/path@digest, `size` is in bytes, `created` in seconds since the epoch (0 if unknown),
    `pinned` is who pinned it or "".
    """

    id: str
    names: tuple[str, ...]
    digests: tuple[str, ...]
    layers: tuple[Layer, ...]
    size: int
    created: float = 0.0
    pinned: str = ""


class Manifest(Record):
    """What a registry says of one image: `digest` of what the name leads to (an index or a
    manifest), `manifest` digest for this platform, `config` digest, layers in order."""

    digest: str
    manifest: str
    config: str
    layers: tuple[Layer, ...]


class Progress(Record):
    """How far a pull is: bytes and layers, 0 where the store does not say."""

    image: str
    stage: str
    done: int = 0
    total: int = 0


class PullRequest(Record):
    """One pull: `timeout` in seconds, `scheme` http or https, `insecure` skips certificate checks,
    `certificates` is a directory with *.crt or "", `layers_at_once` 0 leaves it to the store;
    `missing` are the layers to count where somebody watches the bytes."""

    reference: Reference
    credential: Credential | None
    timeout: float
    scheme: str
    insecure: bool
    certificates: str
    layers_at_once: int
    missing: tuple[Layer, ...] = ()

    @property
    def verified(self) -> bool:
        """True if the registry must show a certificate that is good."""
        return self.scheme == "https" and not self.insecure


class PullFailed(KrunError):
    """A pull did not end well; `reason` is the kubelet's word for it."""

    def __init__(self, message: str, reason: str, permanent: bool, hint: str = "") -> None:
        super().__init__(message, hint)
        self.reason = reason
        self.permanent = permanent


def cancelled(image: object) -> PullFailed:
    """Return the failure of a pull that krun itself ended."""
    return PullFailed(f"pull {image}: cancelled", "ImagePullAborted", True)


def late(image: object, seconds: float) -> PullFailed:
    """Return the failure of a pull that took longer than it may."""
    return PullFailed(f"pull {image}: not done in {seconds:.0f} s", "ErrImagePull", False)


class StoreUnavailable(KrunError):
    """The store's program or daemon does not answer."""


class StoreFailed(KrunError):
    """The store refused an operation."""


class Store(Protocol):
    """A place where images live."""

    name: str

    def images(self) -> list[Image]:
        """Return every image."""
        ...

    def in_use(self) -> dict[str, list[str]]:
        """Return which containers use an image, by image id; containers that pin do not count."""
        ...

    def missing(self, manifest: Manifest) -> list[Layer]:
        """Return the layers that a pull of manifest would have to fetch."""
        ...

    def pull(self, request: PullRequest, report: Callable[[Progress], None]) -> None:
        """Fetch an image; raises PullFailed."""
        ...

    def remove(self, name: str) -> None:
        """Remove a name, and the image with its last name; no error when it is not there."""
        ...

    def pin(self, image: Image, by: str) -> None:
        """Keep the store's garbage collection off the image."""
        ...

    def unpin(self, image: Image) -> None:
        """Undo pin."""
        ...

    def directory(self) -> str:
        """Return a directory of the file system that pulls fill."""
        ...

    def cancel(self) -> None:
        """End the pulls under way, from another thread; they raise PullFailed."""
        ...

    def close(self) -> None:
        """Let go of what is kept between two pulls; the store can go on pulling."""
        ...


# Words of the stores' errors: (text to find in lower case, kubelet's reason, permanent, way out).
_CAUSES = (
    ("no space left on device", "ErrImagePull", True, "free disk space or run krun images gc"),
    ("unauthorized", "ErrImagePull", True, "check the registry credentials"),
    ("authentication required", "ErrImagePull", True, "check the registry credentials"),
    ("no basic auth credentials", "ErrImagePull", True, "check the registry credentials"),
    ("invalid username/password", "ErrImagePull", True, "check the registry credentials"),
    ("denied", "ErrImagePull", True, "check the registry credentials and the repository's name"),
    ("authorization failed", "ErrImagePull", True, "check the registry credentials"),
    ("manifest unknown", "ErrImagePull", True, "check the tag"),
    ("name unknown", "ErrImagePull", True, "check the repository's name"),
    ("not found", "ErrImagePull", True, "check the name and the tag"),
    ("x509", "RegistryUnavailable", True, "put the registry's CA in certs.d/HOST/ca.crt"),
    ("certificate", "RegistryUnavailable", True, "put the registry's CA in certs.d/HOST/ca.crt"),
    ("connection refused", "RegistryUnavailable", False, "is the registry running?"),
    ("no such host", "RegistryUnavailable", False, "check the registry's name and DNS"),
    ("connection reset", "RegistryUnavailable", False, ""),
    ("timeout", "RegistryUnavailable", False, ""),
    ("unexpected eof", "RegistryUnavailable", False, ""),
)


def pull_failed(image: str, text: str) -> PullFailed:
    """Turn a store's error text into PullFailed with the kubelet's reason and a way out."""
    line = last_line(text)
    lowered = text.lower()
    for words, reason, permanent, hint in _CAUSES:
        if words in lowered:
            return PullFailed(f"pull {image}: {line}", reason, permanent, hint)
    return PullFailed(f"pull {image}: {line}", "ErrImagePull", False)


def last_line(text: str) -> str:
    """Return the last line that says something, without a log prefix."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        return "it gave no reason"
    line = lines[-1]
    for prefix in ("Error: ", "ctr: ", "FATA[0000] "):
        line = line.removeprefix(prefix)
    return line


def canonical(name: str) -> Reference | None:
    """Return the reference of a store's own name, None for a name outside the grammar."""
    try:
        return parse(name)
    except BadReference:
        return None


def pin_name(image: Image) -> str:
    """Return the name of the container that holds an image, with podman and docker."""
    return f"krun-pin-{image.id.removeprefix('sha256:')[:24]}"


def covers(image: Image, reference: Reference) -> bool:
    """True if the image is what the reference names."""
    if reference.digest:
        return reference.digested in image.digests
    return reference.tagged in image.names


def by_name(images: Iterable[Image]) -> dict[str, Image]:
    """Index images by every name and digest name they have."""
    table: dict[str, Image] = {}
    for image in images:
        for name in image.names:
            table[name] = image
        for name in image.digests:
            table.setdefault(name, image)
    return table
