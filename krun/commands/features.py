"""krun features: what this runtime supports (runtime-spec, features.md)."""

from __future__ import annotations

import sys

import krun
from krun import jsontext, many
from krun.errors import KrunError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from krun.grammar import Call


def _own() -> dict[str, Any]:
    return {
        "app.kontain.krun.version": krun.__version__,
        "app.kontain.krun.monitors": "km,builtin",
        "app.kontain.krun.engines": "crun,native",
    }


def run(call: Call) -> int:
    """Print crun's features with krun's own annotations."""
    try:
        features: dict[str, Any] = jsontext.loads(many.crun_output(call, ["features"]))
    except (KrunError, ValueError):
        # No crun, or one before 1.8.6 that has no such verb: what the translation passes on.
        features = {"ociVersionMin": "1.0.0", "ociVersionMax": "1.2.0"}
    features["annotations"] = {**(features.get("annotations") or {}), **_own()}
    unsafe = features.get("potentiallyUnsafeConfigAnnotations") or []
    features["potentiallyUnsafeConfigAnnotations"] = [*unsafe, "app.kontain."]
    sys.stdout.write(jsontext.dumps(features, indent="  ") + "\n")
    return 0
