"""krun images warm: pull images now."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from krun.errors import KrunError, UsageError
from krun.images import output, progress
from krun.images.act import Worker
from krun.images.context import open_context
from krun.images.decide import Pull, store_name
from krun.images.passes import interruptible
from krun.images.reconcile import credentials_for, write_index
from krun.images.references import BadReference, Reference, parse
from krun.images.stores.model import PINNED_BY_USER, by_name

if TYPE_CHECKING:
    from krun.grammar import Call


def _read(path: str) -> list[Reference]:
    """Read a file of references, one a line; raises KrunError that names file and line."""
    with open(path, "rb") as file:
        data = file.read()
    try:
        lines = data.decode().splitlines()
    except UnicodeDecodeError as error:
        raise KrunError(f"{path}: is not UTF-8 at byte {error.start}") from None
    found = []
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if text:
            try:
                found.append(parse(text))
            except BadReference as error:
                raise KrunError(f"{path}:{number}: {error.message}", error.hint) from None
    return found


def _references(call: Call) -> list[Reference]:
    found = [parse(word) for word in call.arguments]
    for path in call.options["file"]:
        found += _read(path)
    if not found:
        raise UsageError("no image named", "give references, or --file FILE")
    return list(dict.fromkeys(found))


def run(call: Call) -> int:
    """Run the verb."""
    references = _references(call)
    context = open_context(call.options)
    quiet = call.options["background"]
    if quiet:
        os.nice(19)
    form = "json" if quiet else call.options["format"]
    images = context.store.images()
    table = by_name(images)
    pulls = []
    for reference in references:
        present = table.get(reference.pullable)
        if present is None:
            pulls.append(Pull(reference, ()))
        elif reference.mutable:
            pulls.append(Pull(reference, (), present.digests))
    with interruptible(), progress.choose(form) as shown:
        worker = Worker(context.settings, context.store, shown, credentials_for(context, {}))
        outcomes = worker.pull_all(pulls)
    images = context.store.images()
    table = by_name(images)
    if call.options["pin"]:
        for reference in references:
            image = table.get(reference.pullable)
            if image is not None:
                context.store.pin(image, PINNED_BY_USER)
        images = context.store.images()
    write_index(context, images)
    rows = []
    for reference in references:
        outcome = outcomes.get(store_name(reference))
        failed = outcome is not None and bool(outcome.reason)
        word = "failed" if failed else "pulled" if outcome and outcome.pulled else "present"
        image = by_name(images).get(reference.pullable)
        message = outcome.message if outcome else ""
        rows.append((str(reference), word, image.id if image else "", message))
    if call.options["format"] == "json" and not quiet:
        keys = ("image", "result", "id", "message")
        output.document([dict(zip(keys, row, strict=True)) for row in rows])
    elif not quiet:
        for name, word, _, message in rows:
            print(f"{name}: {word}{': ' + message if message else ''}")
    return 1 if any(row[1] == "failed" for row in rows) else 0
