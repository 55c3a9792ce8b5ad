"""krun images cache delete: remove an object and its images."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from krun.images.context import open_context
from krun.images.objects import Document, timestamp
from krun.images.passes import chosen, mark_and_run

if TYPE_CHECKING:
    from krun.grammar import Call


def _mark(document: Document) -> None:
    document["metadata"].setdefault("deletionTimestamp", timestamp(time.time()))


def run(call: Call) -> int:
    """Run the verb."""
    if call.options["keep_images"]:
        context = open_context(call.options)
        for key in chosen(context, call):
            context.objects.remove(key)
        return 0
    return mark_and_run(call, _mark)
