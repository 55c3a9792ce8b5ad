"""krun images cache refresh: pull again what is missing or has changed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from krun.images.kinds import REFRESH_ANNOTATION
from krun.images.passes import annotate, mark_and_run

if TYPE_CHECKING:
    from krun.grammar import Call


def run(call: Call) -> int:
    """Run the verb."""
    return mark_and_run(call, annotate(REFRESH_ANNOTATION))
