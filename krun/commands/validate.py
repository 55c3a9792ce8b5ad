"""krun validate: name every violation of a bundle's config.json."""

from __future__ import annotations

import sys

from krun import bundle, extension, jsontext
from krun.errors import BadSpec
from krun.spec.shapes import json_path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from krun.grammar import Call


def _annotation_violations(document: Any) -> list[tuple[str, str]]:
    """Return (JSON path, message) of each annotation that krun could not read."""
    annotations = document.get("annotations") if isinstance(document, dict) else None
    found = []
    for key, value in annotations.items() if isinstance(annotations, dict) else ():
        try:
            if isinstance(value, str):
                extension.from_annotations({key: value})
        except BadSpec as error:
            found.append((json_path(["annotations", key]), error.text))
    return found


def _network_violations(document: Any) -> list[tuple[str, str]]:
    """Return what is wrong with a network that no property shows alone; one at most."""
    from krun.network import reader

    try:
        reader.of(document)
    except BadSpec as error:
        return [(error.path, error.text)]
    return []


def run(call: Call) -> int:
    """Print the violations; return 1 where there are any."""
    from krun import schema

    document = bundle.load(call.options["bundle"], call.options["config"])
    found = schema.violations(document) + _annotation_violations(document)
    if not found:
        found = _network_violations(document)
    if call.options["format"] == "json":
        report = {
            "valid": not found,
            "violations": [{"path": path, "message": text} for path, text in found],
        }
        sys.stdout.write(jsontext.dumps(report, indent="  ") + "\n")
    else:
        for path, text in found:
            sys.stdout.write(f"{path}: {text}\n" if path else f"{text}\n")
        if not found:
            sys.stdout.write("valid\n")
    return 1 if found else 0
