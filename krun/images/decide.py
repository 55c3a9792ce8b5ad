"""Compare what should be on this node with what is, and say what to do. Pure.

Terms of kube-fledged: an object's work has a reason (ImageCacheCreate, …Update, …Refresh,
…Purge, …Delete) and ends in a status (Succeeded, Failed, NoImagesPulledOrDeleted, Aborted).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from krun.images.references import Reference
from krun.images.stores.model import (
    PINNED_BY_CACHE,
    PINNED_BY_USER,
    Image,
    by_name,
)
from krun.record import Record

CREATE = "ImageCacheCreate"
UPDATE = "ImageCacheUpdate"
REFRESH = "ImageCacheRefresh"
PURGE = "ImageCachePurge"
DELETE = "ImageCacheDelete"
DAMAGED = "CacheSpecValidationFailed"

PROCESSING = "Processing"
SUCCEEDED = "Succeeded"
FAILED = "Failed"
ABORTED = "Aborted"
NOTHING = "NoImagesPulledOrDeleted"


class Wish(Record):
    """One object as the decision sees it.

    `wanted` is what it wants on this node; `held` are the names it had here before; `status` and
    `reason` are its last ones; `due` says that its refresh schedule has come; an `idle` object is
    left alone now, but what it wants counts.
    """

    key: str
    wanted: tuple[Reference, ...]
    held: tuple[str, ...] = ()
    status: str = ""
    reason: str = ""
    changed: bool = False
    deleting: bool = False
    purge: bool = False
    refresh: bool = False
    due: bool = False
    idle: bool = False


class Work(Record):
    """An object has something to do, for this reason."""

    key: str
    reason: str


class Pull(Record):
    """Fetch an image that these objects want.

    `present` is the digest name of the image that is there already: then only a changed tag
    needs a pull.
    """

    reference: Reference
    keys: tuple[str, ...]
    present: tuple[str, ...] = ()


class Removal(Record):
    """Remove a name that these objects no longer want and nobody else does."""

    name: str
    keys: tuple[str, ...]


class Kept(Record):
    """A name that would go but stays, because `containers` use its image or a person pinned it."""

    name: str
    keys: tuple[str, ...]
    containers: tuple[str, ...] = ()
    pinned: bool = False


class Decision(Record):
    """Everything to do: `pins` and `unpins` are image ids."""

    works: tuple[Work, ...]
    pulls: tuple[Pull, ...]
    removals: tuple[Removal, ...]
    kept: tuple[Kept, ...]
    pins: tuple[str, ...]
    unpins: tuple[str, ...]


def store_name(reference: Reference) -> str:
    """Return the name under which a store lists the image."""
    return reference.tagged or reference.digested


def _present(reference: Reference, table: Mapping[str, Image]) -> Image | None:
    image = table.get(reference.pullable)
    if image is None or not reference.digest or not reference.tag:
        return image
    return image if reference.tagged in image.names else None


def _reason(wish: Wish, table: Mapping[str, Image]) -> str:
    """Return why there is work for an object, "" if there is none."""
    if wish.idle:
        return ""
    if wish.deleting:
        return DELETE
    if wish.purge or (wish.status == PROCESSING and wish.reason == PURGE):
        return PURGE
    if not wish.status:
        return CREATE
    unfinished = wish.status in (PROCESSING, ABORTED)
    if wish.changed:
        return CREATE if unfinished and wish.reason == CREATE else UPDATE
    if wish.refresh:
        return REFRESH
    if unfinished:
        # Its reconciler was killed or stopped: go on where it was.
        return wish.reason
    if wish.reason == PURGE:
        # What was purged stays away until its next change or a refresh on demand; what a container
        # held back is tried again.
        return PURGE if wish.status == FAILED else ""
    if wish.due:
        return REFRESH
    if wish.status != FAILED and any(_present(ref, table) is None for ref in wish.wanted):
        return REFRESH
    return ""


def _is_alive(wish: Wish, reason: str) -> bool:
    """True if the object wants its images now."""
    if reason in (DELETE, PURGE) or wish.deleting or wish.purge:
        return False
    return bool(reason) or wish.reason != PURGE


def decide(
    wishes: Sequence[Wish],
    images: Sequence[Image],
    used: Mapping[str, Sequence[str]],
    always: bool = False,
    pin: bool = False,
) -> Decision:
    """Return what to do so that exactly the wanted images are there.

    `used` are containers by image id; `always` asks the registry for every tag at a refresh, not
    only for `latest`; `pin` pins what is wanted.
    """
    table = by_name(images)
    works: list[Work] = []
    pulls: dict[Reference, list[str]] = {}
    current: dict[Reference, Image] = {}
    unwanted: dict[str, list[str]] = {}
    alive: set[str] = set()
    alive_references: set[Reference] = set()
    for wish in wishes:
        reason = _reason(wish, table)
        names = {store_name(reference) for reference in wish.wanted}
        if reason:
            works.append(Work(wish.key, reason))
        if _is_alive(wish, reason):
            alive |= names
            alive_references.update(wish.wanted)
            gone = set(wish.held) - names
        else:
            gone = (set(wish.held) | names) if reason else set()
        if not reason:
            continue
        for name in gone:
            unwanted.setdefault(name, []).append(wish.key)
        if reason in (DELETE, PURGE):
            continue
        for reference in wish.wanted:
            image = _present(reference, table)
            if image is None:
                pulls.setdefault(reference, []).append(wish.key)
            elif reference.mutable or (always and not reference.digest):
                pulls.setdefault(reference, []).append(wish.key)
                current[reference] = image
    removals: list[Removal] = []
    kept: list[Kept] = []
    leaving = {name for name in unwanted if name in table and name not in alive}
    for name in sorted(leaving):
        image = table[name]
        keys = tuple(unwanted[name])
        containers = used.get(image.id)
        if containers:
            kept.append(Kept(name, keys, tuple(containers)))
        elif image.pinned == PINNED_BY_USER:
            kept.append(Kept(name, keys, pinned=True))
        elif "@" in name and not leaving.issuperset(image.names):
            # The digest is another name's image too; removing it would take both.
            continue
        else:
            removals.append(Removal(name, keys))
    pins: list[str] = []
    unpins: list[str] = []
    removed = {removal.name for removal in removals}
    if pin:
        for reference in alive_references:
            image = _present(reference, table)
            if image is not None and not image.pinned:
                pins.append(image.id)
    for image in images:
        if image.pinned == PINNED_BY_CACHE:
            wanted = any(name in alive for name in (*image.names, *image.digests))
            if not wanted or removed.issuperset(image.names) or not pin:
                unpins.append(image.id)
    return Decision(
        tuple(works),
        tuple(
            Pull(ref, tuple(keys), current[ref].digests if ref in current else ())
            for ref, keys in pulls.items()
        ),
        tuple(removals),
        tuple(kept),
        tuple(sorted(set(pins))),
        tuple(unpins),
    )


class Outcome(Record):
    """How one pull or removal ended; `reason` and `message` are empty when it went well."""

    name: str
    pulled: bool = False
    removed: bool = False
    reason: str = ""
    message: str = ""


_MESSAGES = {
    (SUCCEEDED, False): "Every image is on this node",
    (SUCCEEDED, True): "Every image of the cache was deleted from this node",
    (FAILED, False): 'Pulling failed for some images, see "failures"',
    (FAILED, True): 'Deleting failed for some images, see "failures"',
    (NOTHING, False): "Nothing was pulled or deleted: no nodeSelector or nodeName means this node",
    (NOTHING, True): "Nothing was deleted: no nodeSelector or nodeName means this node",
}
STARTED = {
    CREATE: "Images are being pulled to this node",
    UPDATE: "The cache is being updated on this node",
    REFRESH: "The cache is being refreshed on this node",
    PURGE: "The images of the cache are being deleted from this node",
    DELETE: "The images of the cache are being deleted from this node",
}


class Settled(Record):
    """What an object's status becomes; `images` are (name, digest or "") on this node."""

    status: str
    reason: str
    message: str
    failures: dict[str, tuple[str, str]]
    images: tuple[tuple[str, str], ...]


def settle(
    wish: Wish,
    work: Work,
    outcomes: Mapping[str, Outcome],
    kept: Sequence[Kept],
    images: Sequence[Image] | Mapping[str, Image],
) -> Settled:
    """Return the status of an object after its work; `images` is the store afterwards.

    `outcomes` are by store name.
    """
    table = images if isinstance(images, Mapping) else by_name(images)
    removing = work.reason in (PURGE, DELETE)
    failures: dict[str, tuple[str, str]] = {}
    mine: list[tuple[str, str]] = []
    names = {store_name(reference): reference for reference in wish.wanted}
    for name, reference in names.items():
        outcome = outcomes.get(name)
        image = table.get(reference.pullable)
        if image is not None:
            mine.append((name, _digest_of(image, reference)))
        if outcome is not None and outcome.reason:
            failures[name] = (outcome.reason, outcome.message)
        elif image is None and not removing:
            failures[name] = ("ErrImagePull", "the store does not list it after its pull")
    for name in sorted(set(wish.held) - set(names)):
        if name in table:
            mine.append((name, ""))
        outcome = outcomes.get(name)
        if outcome is not None and outcome.reason:
            failures[name] = (outcome.reason, outcome.message)
    for item in kept:
        if wish.key in item.keys and item.containers:
            shown = ", ".join(item.containers[:3])
            failures[item.name] = ("ImageInUse", f"used by container {shown}; nothing was removed")
    if failures:
        status = FAILED
    elif not wish.wanted and not wish.held:
        status = NOTHING
    else:
        status = SUCCEEDED
    return Settled(status, work.reason, _MESSAGES[status, removing], failures, tuple(mine))


def _digest_of(image: Image, reference: Reference) -> str:
    if reference.digest:
        return reference.digest
    prefix = f"{reference.name}@"
    return next((name[len(prefix) :] for name in image.digests if name.startswith(prefix)), "")
