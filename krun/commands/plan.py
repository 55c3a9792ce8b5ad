"""krun plan: print what the native engine would do, as data."""

from __future__ import annotations

import sys

from krun import jsontext, prepare
from krun.commands import translate
from krun.linux import cgroupfs
from krun.plan.build import build
from krun.plan.model import to_json

TYPE_CHECKING = False
if TYPE_CHECKING:
    from krun.grammar import Call


def run(call: Call) -> int:
    """Print the plan of a translated bundle; raises KrunError."""
    prepared = prepare.prepare(call, translate.added(call))
    settings = call.settings
    systemd = settings.systemd_cgroup or settings.cgroup_manager == "systemd"
    plan = build(prepared.translation.spec, "ID", prepared.bundle, cgroupfs.version(), systemd)
    sys.stdout.write(jsontext.dumps(to_json(plan), indent="  ") + "\n")
    return 0
