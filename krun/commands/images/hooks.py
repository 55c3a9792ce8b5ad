"""krun images hooks: install or remove the OCI hooks of the image part."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from krun.images import placement

if TYPE_CHECKING:
    from krun.grammar import Call


def run(call: Call) -> int:
    """Run the verb; prints the files that it wrote or removed."""
    options = call.options
    prefix = os.path.abspath(options["prefix"])
    if options["remove"]:
        changed = placement.remove(prefix, options["hooks_dir"])
    else:
        pairs = (
            ("--state", options["state"]),
            ("--policy", options["policy"]),
            ("--config", options["config"]),
            ("--mode", options["mode"]),
        )
        given = [f"{name}={value}" for name, value in pairs if value]
        changed = placement.install(prefix, options["hooks_dir"], given)
    for path in changed:
        print(path)
    return 0
