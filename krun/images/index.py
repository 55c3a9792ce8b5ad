"""The images that krun knows to be on the node, in a form that a hook searches in a millisecond.

STATE/index.tsv has one line an image name: NAME, id, digest, who pinned it, separated by tabs,
with a line break before the first.  Written by every pass over the store, read by the hooks;
imports nothing but os.
"""

from __future__ import annotations

from krun.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

NAME = "index.tsv"
TAB = "\t"


class Known(Record):
    """One line: `id` of the configuration, `digest` of the manifest or "", `pinned` by whom."""

    name: str
    id: str
    digest: str
    pinned: str


def text_of(lines: Iterable[Known]) -> str:
    """Return the file's text."""
    return "\n" + "".join(f"{TAB.join(line)}\n" for line in sorted(lines))


def find(state: str, name: str) -> Known | None:
    """Return what is known of an image name; raises FileNotFoundError before any pass."""
    with open(f"{state}/{NAME}", "rb") as file:
        data = file.read()
    start = data.find(f"\n{name}\t".encode())
    if start < 0:
        return None
    line = data[start + 1 : data.find(b"\n", start + 1)].decode()
    fields = line.split("\t")
    return Known(*fields) if len(fields) == 4 else None
