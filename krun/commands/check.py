"""krun check: can this machine run containers in VMs, and what is missing?"""

from __future__ import annotations

import sys

from krun import checks, inspection, jsontext

TYPE_CHECKING = False
if TYPE_CHECKING:
    from krun.checks import Finding
    from krun.grammar import Call

_STYLES = {checks.OK: "green", checks.WARNING: "yellow", checks.FAILURE: "red"}


def _as_json(findings: list[Finding]) -> str:
    document = {
        "canRun": checks.can_run(findings),
        "checks": [
            {
                "name": finding.name,
                "status": finding.status,
                "found": finding.found,
                "wayOut": finding.way_out,
            }
            for finding in findings
        ],
    }
    return jsontext.dumps(document, indent="  ")


def _print_table(findings: list[Finding]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("CHECK", "STATUS", "FOUND"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        found = Text(finding.found)
        if finding.way_out:
            found.append(f"\n→ {finding.way_out}")
        table.add_row(finding.name, Text(finding.status, _STYLES[finding.status]), found)
    # A pipe has no width; its reader may be anything.
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    if checks.can_run(findings):
        console.print("\ncontainers can run in VMs on this machine")
    else:
        console.print("\ncontainers cannot run in VMs on this machine")


def run(call: Call) -> int:
    """Print what was found; the status is 1 when containers cannot run."""
    findings = checks.judge(inspection.inspect(call.settings.policy))
    if call.options["format"] == "json":
        sys.stdout.write(_as_json(findings) + "\n")
    else:
        _print_table(findings)
    return 0 if checks.can_run(findings) else 1
