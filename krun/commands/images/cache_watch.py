"""krun images cache watch: keep this node as the objects want it, until stopped."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

from krun import log
from krun.errors import KrunError
from krun.images import node, progress
from krun.images.context import Context, open_context
from krun.images.decide import DAMAGED
from krun.images.passes import Terminated, interruptible, report
from krun.images.quantities import parse_duration
from krun.images.reconcile import reconcile

if TYPE_CHECKING:
    from krun.grammar import Call

# How often the objects' directory is looked at: one stat(2).
_GLANCE_SECONDS = 0.5


def _wait(context: Context, seconds: float) -> None:
    """Return after these seconds, or as soon as an object was applied, marked or removed."""
    directory = f"{context.state}/objects"
    before = os.stat(directory).st_mtime_ns
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and os.stat(directory).st_mtime_ns == before:
        time.sleep(min(_GLANCE_SECONDS, max(0.0, deadline - time.monotonic())))


def _pass(context: Context, form: str, told: set[str]) -> int:
    """Make one pass and report it; a damaged object that was told already is not told again."""
    with progress.choose(form) as shown:
        done = reconcile(context, node.load(context.settings), shown) or []
    broken = {item.settled.message for item in done if item.settled.reason == DAMAGED}
    done = [item for item in done if item.settled.message not in broken & told]
    told.clear()
    told.update(broken)
    return report(done, form) if done or form == "json" else 0


def run(call: Call) -> int:
    """Run the verb."""
    interval = parse_duration(call.options["interval"], "--interval")
    context = open_context(call.options)
    form = call.options["format"]
    told: set[str] = set()
    try:
        with interruptible():
            if call.options["once"]:
                return _pass(context, form, told)
            while True:
                try:
                    _pass(context, form, told)
                except KrunError as error:
                    # The store may come back, a broken object may be mended: try again.
                    log.warning(str(error))
                log.flush()
                _wait(context, interval)
    except Terminated:
        # A service manager stopped it: that is its normal end.
        return 0
