"""krun images ls: the images of the store."""

from __future__ import annotations

from typing import TYPE_CHECKING

from krun.images import kinds, node, output
from krun.images.context import open_context
from krun.images.decide import store_name
from krun.images.quantities import show_size
from krun.images.reconcile import read_objects, write_index

if TYPE_CHECKING:
    from krun.grammar import Call


def run(call: Call) -> int:
    """Run the verb."""
    context = open_context(call.options)
    here = node.load(context.settings)
    wanted: dict[str, list[str]] = {}
    for key, cache in read_objects(context).caches.items():
        for reference in kinds.wanted_here(cache, here.name, here.labels):
            wanted.setdefault(store_name(reference), []).append(key)
    images = context.store.images()
    used = context.store.in_use()
    write_index(context, images)
    found = [
        {
            "image": name,
            "id": image.id,
            "digests": list(image.digests),
            "size": image.size,
            "layers": len(image.layers),
            "pinned": image.pinned,
            "containers": used.get(image.id, []),
            "wantedBy": wanted.get(name, []),
        }
        for image in images
        for name in (image.names or image.digests or ("<none>",))
    ]
    found.sort(key=lambda item: str(item["image"]))
    if call.options["format"] == "json":
        output.document(found)
        return 0
    output.table(
        ("IMAGE", "ID", "SIZE", "PINNED", "CONTAINERS", "CACHES"),
        [
            (
                str(item["image"]),
                str(item["id"]).removeprefix("sha256:")[:12],
                show_size(item["size"]),  # type: ignore[arg-type]
                str(item["pinned"]) or "-",
                str(len(item["containers"])),  # type: ignore[arg-type]
                str(len(item["wantedBy"])),  # type: ignore[arg-type]
            )
            for item in found
        ],
    )
    return 0
