"""krun images unpin: undo pin."""

from __future__ import annotations

from typing import TYPE_CHECKING

from krun.commands.images.pin import named
from krun.images.context import open_context
from krun.images.reconcile import write_index

if TYPE_CHECKING:
    from krun.grammar import Call


def run(call: Call) -> int:
    """Run the verb."""
    context = open_context(call.options)
    for image in named(context, call.arguments):
        context.store.unpin(image)
    write_index(context, context.store.images())
    return 0
