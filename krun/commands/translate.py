"""krun translate: print the configuration that the engine will get."""

from __future__ import annotations

import sys

from krun import jsontext, log, prepare
from krun.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from krun.grammar import Call


def run(call: Call) -> int:
    """Print the translation; raises KrunError."""
    annotations = {}
    for text in call.options["annotation"]:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise UsageError(f"--annotation {text}: must be KEY=VALUE")
        annotations[key] = value
    translation = prepare.prepare(call, annotations).translation
    for note in translation.notes:
        log.emit(note.level, note.text)
    sys.stdout.write(jsontext.dumps(translation.spec, indent="  ") + "\n")
    return 0
