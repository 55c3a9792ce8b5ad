"""krun images cache describe: everything of an object."""

from __future__ import annotations

from typing import TYPE_CHECKING

from krun.images import documents, output
from krun.images.context import open_context
from krun.images.objects import shown

if TYPE_CHECKING:
    from krun.grammar import Call


def run(call: Call) -> int:
    """Run the verb: YAML for people, JSON for programs."""
    context = open_context(call.options)
    keys = context.objects.find(call.arguments, call.options["namespace"])
    stored = context.objects.read_all()
    known = {**stored.documents, **{item.key: shown(item) for item in stored.damaged}}
    found = [known[key] for key in keys if key in known]
    if call.options["format"] == "json":
        output.document(found[0] if len(found) == 1 else found)
    else:
        print("---\n".join(documents.dump(item) for item in found), end="")
    return 0
