"""A program file made of segments (elf(5))."""

from __future__ import annotations

import os
import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from krun.install.memory import Segment

_PAGE = 4096
_BLOCK = 1 << 16


def elf(segments: Sequence[Segment], entry: int) -> tuple[bytes, list[int]]:
    """Return an executable's headers, and where in the file each segment's content belongs."""
    count = len(segments) + 1
    place = -(-(64 + 56 * count) // _PAGE) * _PAGE
    places = []
    headers = []
    for segment in segments:
        size = len(segment.content)
        # PT_LOAD: file offset, virtual and physical address, sizes, alignment.
        fields = (1, segment.flags, place, segment.start, segment.start, size, size, _PAGE)
        headers.append(struct.pack("<IIQQQQQQ", *fields))
        places.append(place)
        place += size
    # PT_GNU_STACK: readable, writable, not executable.
    headers.append(struct.pack("<IIQQQQQQ", 0x6474E551, 6, 0, 0, 0, 0, 0, 16))
    head = b"\x7fELF\x02\x01\x01" + bytes(9)
    # ET_EXEC, EM_X86_64
    head += struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, entry, 64, 0, 0, 64, 56, count, 0, 0, 0)
    return head + b"".join(headers), places


def filled(content: bytearray) -> list[tuple[int, int]]:
    """Return where content is not zeros, in stretches of whole blocks; the rest becomes holes."""
    found: list[tuple[int, int]] = []
    for first in range(0, len(content), _BLOCK):
        last = min(first + _BLOCK, len(content))
        if content.count(0, first, last) == last - first:
            continue
        start = found.pop()[0] if found and found[-1][1] == first else first
        found.append((start, last))
    return found


def write(path: Path, segments: Sequence[Segment], entry: int) -> None:
    head, places = elf(segments, entry)
    with path.open("wb") as file:
        file.write(head)
        for segment, place in zip(segments, places, strict=True):
            content = segment.content
            for first, last in filled(content):
                file.seek(place + first)
                # In one piece: the page cache keeps it in large folios, which are mapped at once.
                file.write(memoryview(content)[first:last])
            end = place + len(content)
        file.truncate(end)
        file.flush()
        os.fsync(file.fileno())
    path.chmod(0o755)
