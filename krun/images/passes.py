"""Run a pass for a verb: signals, progress, and the table or document at its end."""

from __future__ import annotations

import signal
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from krun import log
from krun.errors import UsageError
from krun.images import node, output, progress
from krun.images.context import Context, open_context
from krun.images.decide import FAILED
from krun.images.objects import Document
from krun.images.reconcile import Done, reconcile

if TYPE_CHECKING:
    from krun.grammar import Call


class Terminated(KeyboardInterrupt):
    """SIGTERM came: stop as for Ctrl-C."""


@contextmanager
def interruptible() -> Iterator[None]:
    """Let SIGTERM end pulls in order, as SIGINT does."""

    def stop(number: int, frame: object) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run_pass(context: Context, form: str, only: Collection[str]) -> list[Done]:
    """Reconcile these objects, showing progress."""
    here = node.load(context.settings)
    with interruptible(), progress.choose(form) as shown:
        return reconcile(context, here, shown, only) or []


def report(done: list[Done], form: str, words: dict[str, str] | None = None) -> int:
    """Print what became of objects; return 1 if one failed."""
    words = words or {}
    if form == "json":
        output.document([_as_object(item, words) for item in done])
    elif done:
        output.table(
            ("OBJECT", "STATUS", "REASON", "PULLED", "REMOVED", "MESSAGE"),
            [
                (
                    item.key,
                    item.settled.status,
                    item.settled.reason,
                    str(item.pulled),
                    str(item.removed),
                    item.settled.message,
                )
                for item in done
            ],
        )
        for item in done:
            for name, (reason, message) in item.settled.failures.items():
                print(f"{item.key}: {name}: {reason}: {message}")
    return 1 if any(item.settled.status == FAILED for item in done) else 0


def _as_object(item: Done, words: dict[str, str]) -> dict[str, Any]:
    return {
        "object": item.key,
        "applied": words.get(item.key, ""),
        "status": item.settled.status,
        "reason": item.settled.reason,
        "message": item.settled.message,
        "pulled": item.pulled,
        "removed": item.removed,
        "failures": {
            name: {"reason": reason, "message": message}
            for name, (reason, message) in item.settled.failures.items()
        },
        "images": [{"image": name, "digest": digest} for name, digest in item.settled.images],
    }


def chosen(context: Context, call: Call) -> list[str]:
    """Return the keys that the line names: NAMEs, or --all of a namespace."""
    namespace = call.options["namespace"]
    if call.options["all"]:
        if call.arguments:
            raise UsageError("--all and names exclude each other")
        keys = context.objects.keys()
        return [key for key in keys if not namespace or key.split("/")[1:-1] == [namespace]]
    if not call.arguments:
        raise UsageError("no object named", "give names, or --all")
    return context.objects.find(call.arguments, namespace)


def mark_and_run(call: Call, mark: Callable[[Document], None]) -> int:
    """Mark the chosen objects, and make a pass for them unless only the wish is recorded.

    A damaged object is not marked, and fails alone.
    """
    context = open_context(call.options)
    keys = chosen(context, call)
    if not call.options["record_only"]:
        # A store that does not answer is found out before anything is marked.
        context.store.in_use()
    broken = {damaged.key: damaged.message for damaged in context.objects.read_all().damaged}
    for key in keys:
        if key not in broken:
            context.objects.change(key, mark)
    if call.options["record_only"]:
        for key in broken.keys() & keys:
            log.error(broken[key])
        return 1 if broken.keys() & keys else 0
    return report(run_pass(context, call.options["format"], keys), call.options["format"])


def annotate(annotation: str) -> Callable[[Document], None]:
    """Return a change that sets an annotation."""

    def mark(document: Document) -> None:
        document["metadata"].setdefault("annotations", {})[annotation] = ""

    return mark
