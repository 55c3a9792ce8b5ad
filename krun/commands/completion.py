"""krun completion: print the completion script of a shell."""

from __future__ import annotations

import sys

from krun.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from krun.grammar import Call


def run(call: Call) -> int:
    """Print the script; raises UsageError for another shell."""
    from krun import help as reader

    shell = call.arguments[0]
    text = reader.completion_script(shell)
    if text is None:
        raise UsageError(f"completion: {shell}: no such shell", "bash, zsh or fish")
    sys.stdout.write(text)
    return 0
