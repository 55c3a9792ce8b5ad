"""krun list: the containers of a state directory, whichever engine holds them."""

from __future__ import annotations

import os
import sys

from krun import engine, jsontext, many
from krun.errors import KrunError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from krun.grammar import Call

# runc's columns and their least widths (Go's tabwriter: minwidth 12, padding 3).
_COLUMNS = ("ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER")
_LEAST, _PADDING = 12, 3


def _entry(call: Call, root: str, container: str) -> dict[str, Any] | None:
    holder = engine.of(root, container)
    try:
        if holder == "native":
            from krun import native

            state: dict[str, Any] = native.state(root, container)
        else:
            if not os.path.exists(f"{root}/{container}/status"):
                return None
            state = jsontext.loads(many.crun_output(call, ["--root", root, "state", container]))
    except (KrunError, ValueError):
        # Deleted, or being made, while the list is.
        return None
    try:
        import pwd

        owner = pwd.getpwuid(os.stat(f"{root}/{container}").st_uid).pw_name
    except (KeyError, OSError):
        owner = state.get("owner", "")
    return {
        "ociVersion": state.get("ociVersion", ""),
        "id": state["id"],
        "pid": state.get("pid", 0),
        "status": state["status"],
        "bundle": state["bundle"],
        "rootfs": state.get("rootfs", ""),
        "created": state.get("created", ""),
        "annotations": state.get("annotations", {}),
        "owner": state.get("owner") or owner,
    }


def _table(entries: list[dict[str, Any]]) -> str:
    rows = [_COLUMNS] + [
        (e["id"], str(e["pid"]), e["status"], e["bundle"], e["created"], e["owner"])
        for e in entries
    ]
    widths = [
        max(_LEAST, max(len(row[column]) for row in rows) + _PADDING)
        for column in range(len(_COLUMNS) - 1)
    ]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        lines.append("".join(cells) + row[-1])
    return "\n".join(lines) + "\n"


def run(call: Call) -> int:
    """Print the containers as a table, JSON, or ids."""
    root = engine.root_of(call)
    names = many.containers(root)
    if call.options["quiet"]:
        sys.stdout.write("".join(name + "\n" for name in names))
        return 0
    entries = [entry for entry in (_entry(call, root, name) for name in names) if entry is not None]
    if call.options["format"] == "json":
        sys.stdout.write(jsontext.dumps(entries) + "\n")
    else:
        sys.stdout.write(_table(entries))
    return 0
