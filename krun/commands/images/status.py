"""krun images status: what a start would have to fetch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from krun.images import kinds, node, output
from krun.images.context import open_context
from krun.images.quantities import show_size
from krun.images.reconcile import credentials_for, read_objects
from krun.images.references import Reference, parse
from krun.images.registry import Registry
from krun.images.warmth import measure

if TYPE_CHECKING:
    from krun.grammar import Call


def run(call: Call) -> int:
    """Run the verb; 0 also when something is cold."""
    context = open_context(call.options)
    caches = read_objects(context).caches
    wanted: dict[Reference, list[str]] = {parse(word): [] for word in call.arguments}
    if not wanted:
        here = node.load(context.settings)
        for key, cache in caches.items():
            for reference in kinds.wanted_here(cache, here.name, here.labels):
                wanted.setdefault(reference, []).append(key)
    files = credentials_for(context, caches)
    settings = context.settings
    found = measure(
        context.store,
        Registry(settings.insecure_registries, settings.certs_directories),
        [(reference, files(keys)) for reference, keys in wanted.items()],
        context.store.images(),
    )
    if call.options["format"] == "json":
        output.document([item._asdict() for item in found])
        return 0
    output.table(
        ("IMAGE", "STATE", "WARM", "MISSING", "TOTAL", "NOTE"),
        [
            (
                item.image,
                item.state,
                f"{item.percent:.0f} %",
                show_size(item.missing) if item.missing >= 0 else "?",
                show_size(item.total) if item.total >= 0 else "?",
                item.note,
            )
            for item in found
        ],
    )
    return 0
