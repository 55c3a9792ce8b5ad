"""krun images cache get: the objects and how they are."""

from __future__ import annotations

import time
from datetime import datetime
from typing import TYPE_CHECKING

from krun.images import output
from krun.images.context import open_context
from krun.images.objects import key_of, shown

if TYPE_CHECKING:
    from krun.grammar import Call


def _age(text: str) -> str:
    """Return the time since then in its greatest unit, as kubectl does."""
    if not text:
        return "-"
    seconds = time.time() - datetime.fromisoformat(text).timestamp()
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= size:
            return f"{seconds // size:.0f}{unit}"
    return f"{max(0, seconds):.0f}s"


def run(call: Call) -> int:
    """Run the verb."""
    context = open_context(call.options)
    namespace = call.options["namespace"]
    stored = context.objects.read_all()
    found = [*stored.documents.values(), *map(shown, stored.damaged)]
    if namespace:
        found = [item for item in found if item["metadata"]["namespace"] == namespace]
    if call.arguments:
        keys = set(context.objects.find(call.arguments, namespace))
        found = [item for item in found if key_of(item) in keys]
    if call.options["format"] == "json":
        output.document({"apiVersion": "v1", "kind": "List", "items": found})
        return 0
    rows = []
    for item in found:
        metadata, status = item["metadata"], item.get("status") or {}
        deleting = "deletionTimestamp" in metadata
        rows.append(
            (
                item["kind"],
                metadata["namespace"],
                metadata["name"],
                "Deleting" if deleting else status.get("status", "") or "Pending",
                status.get("reason", "") or "-",
                str(len(status.get("images", ()))),
                str(len(status.get("failures", ()))),
                _age(metadata.get("creationTimestamp", "")),
            )
        )
    heading = ("KIND", "NAMESPACE", "NAME", "STATUS", "REASON", "IMAGES", "FAILURES", "AGE")
    output.table(heading, rows)
    return 0
