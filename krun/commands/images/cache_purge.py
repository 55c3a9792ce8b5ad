"""krun images cache purge: remove an object's images, keep the object."""

from __future__ import annotations

from typing import TYPE_CHECKING

from krun.images.kinds import PURGE_ANNOTATION
from krun.images.passes import annotate, mark_and_run

if TYPE_CHECKING:
    from krun.grammar import Call


def run(call: Call) -> int:
    """Run the verb."""
    return mark_and_run(call, annotate(PURGE_ANNOTATION))
