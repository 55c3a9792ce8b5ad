"""One pass over this node: read objects and store, decide, act, and keep the status with each."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from datetime import datetime
from typing import Any

from krun import log
from krun.errors import KrunError
from krun.images import decide, kinds, schedule
from krun.images.act import Reporter, Worker
from krun.images.context import Context, default_credentials, find_secret
from krun.images.credentials import AuthFile, BadCredentials
from krun.images.decide import Kept, Outcome, Settled, Wish, Work
from krun.images.files import locked, try_locked, write_atomically
from krun.images.index import NAME as INDEX
from krun.images.index import Known, text_of
from krun.images.node import Node
from krun.images.objects import Document, Stored, timestamp
from krun.images.stores.model import (
    PINNED_BY_CACHE,
    Image,
    PullFailed,
    by_name,
)
from krun.record import Record


class Done(Record):
    """What a pass did to one object."""

    key: str
    settled: Settled
    pulled: int
    removed: int


def _moment(text: Any) -> float:
    """Return the seconds since the epoch of a stored time, 0 for none."""
    if not isinstance(text, str) or not text:
        return 0.0
    return datetime.fromisoformat(text).timestamp()


def _is_due(cache: kinds.CacheObject, status: dict[str, Any], default: str, now: float) -> bool:
    line = cache.schedule or default
    plan = schedule.parse(line, f"{cache.key}: {kinds.SCHEDULE_ANNOTATION}")
    next_time = schedule.next_after(plan, _moment(status.get("lastRefreshTime")) or now)
    return next_time is not None and next_time <= now


def wish_of(
    document: Document,
    cache: kinds.CacheObject,
    node: Node,
    *,
    refresh: str,
    now: float,
    idle: bool = False,
) -> Wish:
    """Return a stored object as the decision sees it."""
    metadata = document["metadata"]
    status = document.get("status") or {}
    annotations = metadata.get("annotations") or {}
    return Wish(
        cache.key,
        kinds.wanted_here(cache, node.name, node.labels),
        tuple(item["image"] for item in status.get("images", ())),
        str(status.get("status", "")),
        str(status.get("reason", "")),
        metadata["generation"] != status.get("observedGeneration"),
        "deletionTimestamp" in metadata,
        kinds.PURGE_ANNOTATION in annotations,
        kinds.REFRESH_ANNOTATION in annotations,
        _is_due(cache, status, refresh, now),
        idle,
    )


def _mark_processing(context: Context, works: Sequence[Work], now: float) -> None:
    for work in works:

        def change(document: Document, work: Work = work) -> None:
            status = dict(document.get("status") or {})
            going_on = status.get("status") == decide.PROCESSING and status.get("reason")
            if going_on != work.reason:
                status["startTime"] = timestamp(now)
            status.update(
                status=decide.PROCESSING,
                reason=work.reason,
                message=decide.STARTED[work.reason],
                failures={},
            )
            status.pop("completionTime", None)
            _set_condition(status, "Unknown", work.reason, status["message"], now)
            document["status"] = status

        context.objects.change(work.key, change)


def _set_condition(
    status: dict[str, Any], value: str, reason: str, message: str, now: float
) -> None:
    """Keep one Ready condition (Kubernetes API conventions; knative's duck type)."""
    old: dict[str, Any] = next(iter(status.get("conditions") or ()), {})
    changed = old.get("status") != value
    status["conditions"] = [
        {
            "type": "Ready",
            "status": value,
            "reason": reason,
            "message": message,
            "lastTransitionTime": timestamp(now) if changed else old["lastTransitionTime"],
        }
    ]


def _store_result(
    context: Context, work: Work, settled: Settled, *, node: Node, generation: int, now: float
) -> None:
    """Write an object's final status; annotations that asked for the work are taken off."""

    def change(document: Document) -> None:
        status = dict(document.get("status") or {})
        status.update(
            status=settled.status,
            reason=settled.reason,
            message=settled.message,
            failures={
                name: [{"node": node.name, "reason": reason, "message": message}]
                for name, (reason, message) in settled.failures.items()
            },
            completionTime=timestamp(now),
            observedGeneration=generation,
            images=[{"image": name, "digest": digest} for name, digest in settled.images],
        )
        if work.reason != decide.DELETE:
            status["lastRefreshTime"] = timestamp(now)
        ready = "False" if settled.status == decide.FAILED else "True"
        if work.reason == decide.PURGE:
            ready = "False"
        _set_condition(status, ready, settled.reason, settled.message, now)
        document["status"] = status
        annotations = document["metadata"].get("annotations") or {}
        if work.reason == decide.PURGE:
            annotations.pop(kinds.PURGE_ANNOTATION, None)
        annotations.pop(kinds.REFRESH_ANNOTATION, None)

    context.objects.change(work.key, change)


def _abort(context: Context, works: Sequence[Work], now: float) -> None:
    for work in works:

        def change(document: Document) -> None:
            status = document["status"]
            status.update(
                status=decide.ABORTED,
                message="Stopped before it was done; the next pass goes on",
                completionTime=timestamp(now),
            )
            _set_condition(status, "Unknown", "ImagePullAborted", status["message"], now)

        context.objects.change(work.key, change)


def write_index(context: Context, images: Sequence[Image]) -> None:
    """Write what the hooks look up; the file is left alone when nothing changed."""
    lines = []
    for image in images:
        for name in image.names:
            prefix = name.rpartition(":")[0] + "@"
            digest = next((d[len(prefix) :] for d in image.digests if d.startswith(prefix)), "")
            lines.append(Known(name, image.id, digest, image.pinned))
        lines += [
            Known(name, image.id, name.rpartition("@")[2], image.pinned) for name in image.digests
        ]
    data = text_of(lines).encode()
    path = f"{context.state}/{INDEX}"
    try:
        with open(path, "rb") as file:
            if file.read() == data:
                return
    except FileNotFoundError:
        pass
    write_atomically(path, data, 0o644)


def credentials_for(
    context: Context, caches: dict[str, kinds.CacheObject]
) -> Callable[[Sequence[str]], list[AuthFile]]:
    """Return a function from objects' keys to the credentials of their pulls."""
    known: dict[str, list[AuthFile]] = {}
    defaults: list[list[AuthFile]] = []

    def files(keys: Sequence[str]) -> list[AuthFile]:
        found: list[AuthFile] = []
        for key in keys:
            cache = caches.get(key)
            if cache is None:
                continue
            if key not in known:
                secrets = []
                for name in cache.secrets:
                    try:
                        secret = find_secret(context, cache.namespace, name)
                    except BadCredentials as error:
                        raise PullFailed(
                            f"{key}: spec.imagePullSecrets: {error.message}",
                            "FailedToRetrieveImagePullSecret",
                            True,
                            error.hint,
                        ) from error
                    if secret is None:
                        raise PullFailed(
                            f"{key}: spec.imagePullSecrets: "
                            f"there is no Secret {cache.namespace}/{name}",
                            "FailedToRetrieveImagePullSecret",
                            True,
                            "apply the Secret, or put it into the secrets directory",
                        )
                    secrets.append(secret)
                known[key] = secrets
            found += known[key]
        if not defaults:
            defaults.append(default_credentials(context))
        return found + defaults[0]

    return files


def read_objects(context: Context) -> Stored:
    """Return the stored objects, for a verb that only needs what they want; damaged ones warn."""
    stored = context.objects.read_all()
    for damaged in stored.damaged:
        log.warning(damaged.message)
    return stored


def reconcile(
    context: Context,
    node: Node,
    reporter: Reporter,
    only: Collection[str] | None = None,
    wait: bool = True,
) -> list[Done] | None:
    """Make one pass; None when another reconciler is at work and `wait` is False.

    With `only`, the other objects are left alone, but what they want stays.
    """
    lock = context.objects.reconcile_lock
    if not wait:
        with try_locked(lock) as mine:
            return _pass(context, node, reporter, only) if mine else None
    with try_locked(lock) as mine:
        if mine:
            return _pass(context, node, reporter, only)
    log.info("another reconciler is at work, waiting for it")
    with locked(lock):
        return _pass(context, node, reporter, only)


def _pass(
    context: Context, node: Node, reporter: Reporter, only: Collection[str] | None
) -> list[Done]:
    settings, store = context.settings, context.store
    now = time.time()
    stored = context.objects.read_all()
    documents, caches = stored.documents, stored.caches
    broken = [
        Done(damaged.key, Settled(decide.FAILED, decide.DAMAGED, damaged.message, {}, ()), 0, 0)
        for damaged in stored.damaged
        if only is None or damaged.key in only
    ]
    wishes = {
        key: wish_of(
            documents[key],
            cache,
            node,
            refresh=settings.refresh,
            now=now,
            idle=only is not None and key not in only,
        )
        for key, cache in caches.items()
    }
    images, used = store.images(), store.in_use()
    pin = settings.pin == "always" or (settings.pin == "auto" and store.name == "containerd")
    decision = decide.decide(
        list(wishes.values()), images, used, settings.pull_policy == "Always", pin
    )
    if not decision.works and not decision.unpins and not decision.pins:
        write_index(context, images)
        return broken
    _mark_processing(context, decision.works, now)
    worker = Worker(settings, store, reporter, credentials_for(context, caches))
    try:
        outcomes = worker.pull_all(decision.pulls)
        _change_pins(context, images, decision.unpins, decision.pins)
        removed, kept = worker.remove_all(decision.removals)
        outcomes.update(_second_chance(worker, decision, outcomes, removed))
    except BaseException:
        # Stopped by a signal, or the store went away: whoever comes next goes on from here.
        _abort(context, decision.works, time.time())
        raise
    outcomes.update(removed)
    after = store.images()
    if pin and any(outcome.pulled for outcome in outcomes.values()):
        again = decide.decide(
            [wish._replace(idle=True) for wish in wishes.values()], after, used, pin=pin
        )
        _change_pins(context, after, (), again.pins)
        after = store.images()
    done = _finish(
        context,
        node,
        decision,
        documents=documents,
        wishes=wishes,
        outcomes=outcomes,
        kept=kept,
        after=after,
    )
    write_index(context, after)
    return broken + done


def _second_chance(
    worker: Worker,
    decision: decide.Decision,
    outcomes: dict[str, Outcome],
    removed: dict[str, Outcome],
) -> dict[str, Outcome]:
    """Pull again what found no room, when removals made some."""
    if not any(outcome.removed for outcome in removed.values()):
        return {}
    full = [
        pull
        for pull in decision.pulls
        if outcomes[decide.store_name(pull.reference)].reason == "NoDiskSpace"
    ]
    return worker.pull_all(full)


def _change_pins(
    context: Context, images: Sequence[Image], unpins: Sequence[str], pins: Sequence[str]
) -> None:
    ids = {image.id: image for image in images}
    for image_id in unpins:
        context.store.unpin(ids[image_id])
    for image_id in pins:
        context.store.pin(ids[image_id], PINNED_BY_CACHE)


def _finish(
    context: Context,
    node: Node,
    decision: decide.Decision,
    *,
    documents: dict[str, Document],
    wishes: dict[str, Wish],
    outcomes: dict[str, Outcome],
    kept: Sequence[Kept],
    after: Sequence[Image],
) -> list[Done]:
    """Write each object's status; a deleted one whose images are gone goes too."""
    table = by_name(after)
    finished: list[Done] = []
    now = time.time()
    for work in decision.works:
        wish = wishes[work.key]
        settled = decide.settle(wish, work, outcomes, (*decision.kept, *kept), table)
        # A spec applied meanwhile has a higher generation and gets its own pass.
        generation = documents[work.key]["metadata"]["generation"]
        if work.reason == decide.DELETE and settled.status != decide.FAILED:
            context.objects.remove(work.key)
        else:
            _store_result(context, work, settled, node=node, generation=generation, now=now)
        names = {decide.store_name(reference) for reference in wish.wanted} | set(wish.held)
        mine = [outcome for name, outcome in outcomes.items() if name in names]
        finished.append(
            Done(
                work.key,
                settled,
                sum(outcome.pulled for outcome in mine),
                sum(outcome.removed for outcome in mine),
            )
        )
    return finished


def check_secrets(
    context: Context, caches: Sequence[tuple[str, kinds.CacheObject]], given: Collection[str]
) -> None:
    """Raise KrunError for the first pull secret that exists neither here nor in `given`."""
    for origin, cache in caches:
        for index, name in enumerate(cache.secrets):
            if f"{cache.namespace}/{name}" in given:
                continue
            if find_secret(context, cache.namespace, name) is None:
                raise KrunError(
                    f"{origin}: {cache.kind} {cache.namespace}/{cache.name}: "
                    f"spec.imagePullSecrets[{index}].name: "
                    f"there is no Secret {cache.namespace}/{name}",
                    "apply it with the same command, or put it into --secrets DIR",
                )
