"""krun images cache apply: store objects and bring this node to what they want."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from krun import log
from krun.errors import BadSpec, UsageError
from krun.images import documents, kinds, node, schedule
from krun.images.context import open_context
from krun.images.credentials import secret
from krun.images.objects import Document
from krun.images.passes import report, run_pass
from krun.images.reconcile import check_secrets

if TYPE_CHECKING:
    from krun.grammar import Call


def _read(
    paths: list[str],
) -> tuple[list[tuple[str, kinds.CacheObject, Document]], dict[str, Document]]:
    """Return every cache object with where it was read, and the secrets; all are checked."""
    caches: list[tuple[str, kinds.CacheObject, Document]] = []
    secrets: dict[str, Document] = {}
    seen: dict[str, str] = {}
    for path, found in documents.load(paths):
        for origin, document in kinds.flatten(found, path):
            kind, namespace, name = kinds.identity(document, origin)
            key = f"{kind}/{namespace}/{name}"
            if key in seen:
                raise BadSpec("metadata.name", f"{key} is in {seen[key]} already", document=origin)
            seen[key] = origin
            if kind == kinds.SECRET:
                secret(document, f"{origin}: {key}")
                secrets[f"{namespace}/{name}"] = document
            else:
                cache = kinds.read(document, origin)
                if cache.schedule:
                    where = f"{origin}: {key}: metadata.annotations.{kinds.SCHEDULE_ANNOTATION}"
                    schedule.parse(cache.schedule, where)
                caches.append((origin, cache, document))
    return caches, secrets


def _warn_of_selectors(origin: str, cache: kinds.CacheObject, here: node.Node) -> None:
    if cache.node_name and cache.node_name != here.name:
        log.warning(
            f"{origin}: {cache.key}: spec.nodeName: {cache.node_name} is not this node "
            f"({here.name}; --node NAME)"
        )
    for index, entry in enumerate(cache.entries):
        if not kinds.selects(entry, here.labels):
            shown = ",".join(f"{label}={value}" for label, value in entry.selector)
            log.warning(
                f"{origin}: {cache.key}: spec.cacheSpec[{index}].nodeSelector: {shown} does not "
                f"match this node ({here.name}; --labels FILE)"
            )


def run(call: Call) -> int:
    """Run the verb."""
    if not call.options["filename"]:
        raise UsageError("no manifest named", "give -f FILE, -f DIR or -f -")
    caches, secrets = _read(call.options["filename"])
    context = open_context(call.options)
    here = node.load(context.settings)
    check_secrets(context, [(origin, cache) for origin, cache, _ in caches], set(secrets))
    if not call.options["record_only"]:
        # A store that does not answer is found out before anything is stored.
        context.store.in_use()
    for origin, cache, _ in caches:
        _warn_of_selectors(origin, cache, here)
    stored = [
        {
            **document,
            "metadata": {"namespace": cache.namespace, **document["metadata"]},
        }
        for _, cache, document in caches
    ]
    words = dict(context.objects.apply(stored, list(secrets.values()), time.time()))
    form = call.options["format"]
    if form == "table":
        for key in [f"Secret/{name}" for name in secrets]:
            print(f"{key} stored")
        for key, word in words.items():
            print(f"{key} {word}")
    if call.options["record_only"]:
        return 0
    return report(run_pass(context, form, list(words)), form, words)
