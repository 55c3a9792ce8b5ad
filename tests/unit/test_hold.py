"""The program that stands before the payload: its bytes are what its listing says."""

from __future__ import annotations

import subprocess
from pathlib import Path

import needs
import pytest

from krun.linux import hold


def _columns() -> list[tuple[str, str]]:
    rows = []
    for line in hold.LISTING.strip().splitlines():
        code, text = line[:18].strip(), line[18:].partition(";")[0].strip()
        rows.append((code, text))
    return rows


def test_the_code_is_the_listings_first_column() -> None:
    assert hold._CODE.hex() == "".join(code for code, _ in _columns())


@needs.mark("as")
@pytest.mark.skipif(not hold.SUPPORTED, reason="the listing is for x86_64")
def test_the_assembler_makes_the_same_code(tmp_path: Path) -> None:
    source = ".intel_syntax noprefix\n" + "\n".join(text for _, text in _columns())
    source += "\ngo: .long -1\nreport: .long -1\nfork: .long 0\nterminal: .long 0\n"
    (tmp_path / "hold.s").write_text(source)
    subprocess.run(["as", "hold.s", "-o", "hold.o"], cwd=tmp_path, check=True)
    subprocess.run(["objcopy", "-Obinary", "-j.text", "hold.o", "code"], cwd=tmp_path, check=True)
    assert (tmp_path / "code").read_bytes()[:-16] == hold._CODE
