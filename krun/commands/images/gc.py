"""krun images gc: drop least recently used images until the store fits a quota."""

from __future__ import annotations

from typing import TYPE_CHECKING

from krun import log
from krun.errors import UsageError
from krun.images import kinds, ledger, node, output, progress
from krun.images.act import Worker
from krun.images.collection import plan
from krun.images.context import Context, open_context
from krun.images.decide import Removal, store_name
from krun.images.files import locked
from krun.images.passes import interruptible
from krun.images.quantities import parse_size, show_size
from krun.images.reconcile import credentials_for, read_objects, write_index
from krun.images.stores.model import Image

if TYPE_CHECKING:
    from krun.grammar import Call


def _images(context: Context) -> list[Image]:
    """Return the store's images with their layers: dockerd tells those one image at a time."""
    images = context.store.images()
    if context.store.name != "docker":
        return images
    from krun.images.stores.docker import Docker

    assert isinstance(context.store, Docker)
    return [image._replace(layers=context.store.layers(image.id)) for image in images]


def run(call: Call) -> int:
    """Run the verb."""
    if call.options["quota"] is None:
        raise UsageError("--quota is missing", "for example --quota 20GiB")
    quota = parse_size(call.options["quota"], "--quota")
    context = open_context(call.options)
    here = node.load(context.settings)
    form = call.options["format"]
    with locked(context.objects.reconcile_lock), interruptible(), progress.choose(form) as shown:
        wanted = {
            store_name(reference)
            for cache in read_objects(context).caches.values()
            for reference in kinds.wanted_here(cache, here.name, here.labels)
        }
        todo = plan(
            _images(context),
            quota,
            used=context.store.in_use(),
            wanted=wanted,
            last_used=ledger.last_used(context.state),
        )
        failed = []
        if not call.options["dry_run"]:
            worker = Worker(context.settings, context.store, shown, credentials_for(context, {}))
            removals = [
                Removal(name, ())
                for image in todo.drops
                for name in (image.names or image.digests or (image.id,))
            ]
            outcomes, _ = worker.remove_all(removals)
            failed = [outcome for outcome in outcomes.values() if outcome.reason]
            write_index(context, context.store.images())
    dropped = [(image.names or image.digests or (image.id,))[0] for image in todo.drops]
    if form == "json":
        output.document(
            {"dropped": dropped, "before": todo.before, "after": todo.after, "quota": quota}
        )
    else:
        for name in dropped:
            print(name)
        print(f"{show_size(todo.before)} before, {show_size(todo.after)} after")
    if todo.after > quota:
        log.warning(
            f"{show_size(todo.after - quota)} over the quota: "
            "what is left is pinned, in use or wanted by a cache"
        )
    return 1 if failed else 0
