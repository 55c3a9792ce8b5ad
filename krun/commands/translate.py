"""krun translate: print the configuration that the engine will get."""

from __future__ import annotations

import sys

from krun import jsontext, log, prepare
from krun.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from krun.grammar import Call


def added(call: Call) -> dict[str, str]:
    """Return the annotations of --annotation; raises UsageError."""
    given = {}
    for text in call.options["annotation"]:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise UsageError(f"--annotation {text}: must be KEY=VALUE")
        given[key] = value
    return given


def run(call: Call) -> int:
    """Print the translation; raises KrunError."""
    translation = prepare.prepare(call, added(call)).translation
    for note in translation.notes:
        log.emit(note.level, note.text)
    sys.stdout.write(jsontext.dumps(translation.spec, indent="  ") + "\n")
    return 0
