"""krun images pin: keep images from every garbage collection."""

from __future__ import annotations

from typing import TYPE_CHECKING

from krun.errors import NotFound
from krun.images.context import Context, open_context
from krun.images.reconcile import write_index
from krun.images.references import parse
from krun.images.stores.model import PINNED_BY_USER, Image, by_name

if TYPE_CHECKING:
    from krun.grammar import Call


def named(context: Context, words: list[str]) -> list[Image]:
    """Return the store's images of these references; NotFound for the first that is not there."""
    references = [parse(word) for word in words]
    table = by_name(context.store.images())
    for reference in references:
        if reference.pullable not in table:
            raise NotFound(
                f"{reference}: not on this node", f"krun images warm --pin {reference} brings it"
            )
    return [table[reference.pullable] for reference in references]


def run(call: Call) -> int:
    """Run the verb."""
    context = open_context(call.options)
    for image in named(context, call.arguments):
        context.store.pin(image, PINNED_BY_USER)
    write_index(context, context.store.images())
    return 0
