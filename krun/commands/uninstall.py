"""krun uninstall: undo krun install; what it replaced or edited is as it was before."""

from __future__ import annotations

import os

from krun import log
from krun.errors import KrunError
from krun.install import manifest

TYPE_CHECKING = False
if TYPE_CHECKING:
    from krun.grammar import Call


def run(call: Call) -> int:
    """Uninstall; raises KrunError, OSError."""
    prefix = manifest.prefix(call.options["prefix"])
    destdir = os.path.abspath(call.options["destdir"]) if call.options["destdir"] else ""
    base = f"{prefix}/lib/krun"
    if not os.path.exists(f"{destdir}{base}/{manifest.NAME}"):
        raise KrunError(f"{destdir}{base}/{manifest.NAME}: no such file", "nothing is installed")
    paths = [f"{base}/x", *manifest.load(base, destdir)["entries"]]
    manifest.check_writable(paths, destdir)
    undone, left = manifest.undo(base, destdir)
    for path in undone:
        print("restored" if os.path.lexists(destdir + path) else "removed", path)
    for path in left:
        log.warning(f"{path}: was changed after krun wrote it; it is left as it is")
    return 0
