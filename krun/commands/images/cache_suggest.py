"""krun images cache suggest: an ImageCache of the images that this node uses."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from krun.errors import NotFound
from krun.images import documents, ledger, settings
from krun.images.context import settings_of
from krun.images.quantities import parse_duration
from krun.images.suggestion import suggest

if TYPE_CHECKING:
    from krun.grammar import Call


def run(call: Call) -> int:
    """Run the verb."""
    options = call.options
    state = settings.state_directory(settings_of(options))
    since = options["since"]
    found = suggest(
        ledger.read(state),
        name=options["name"],
        namespace=options["namespace"],
        of_namespace=options["of_namespace"] or "",
        annotated=options["annotated"],
        since=time.time() - parse_duration(since, "--since") if since else 0.0,
        least=options["least"],
        by_digest=options["by_digest"],
    )
    if found is None:
        raise NotFound(
            f"no start in the ledger {state}/{ledger.NAME} matches",
            "install the krun-image-record hook, see docs/images.md",
        )
    print(documents.dump(found), end="")
    return 0
