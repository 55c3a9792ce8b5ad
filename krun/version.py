"""What `krun --version` prints; podman and dockerd ask for it."""

from __future__ import annotations

import krun
from krun import host

SPEC = "1.2.0"


def text() -> str:
    """Return the version in runc's form, with what tells this krun from crun's libkrun handler."""
    crun = host.first_executable(host.CRUN_PATHS)
    return "\n".join(
        [
            f"krun version {krun.__version__}",
            f"spec: {SPEC}",
            f"engines: {f'crun ({crun}), ' if crun else ''}native",
            "monitors: km, builtin",
        ]
    )
