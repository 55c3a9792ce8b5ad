"""The numbers of update, as runc reads them."""

from __future__ import annotations

import re

import pytest

from krun.errors import KrunError
from krun.watch import changes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("100", 100),
        ("100b", 100),
        ("1k", 1024),
        ("100M", 100 << 20),
        ("100MB", 100 << 20),
        ("100MiB", 100 << 20),
        ("1.5g", 3 << 29),
        ("2T", 2 << 40),
        ("1p", 1 << 50),
        ("-1", -1),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert changes({"memory": text}, {}) == {"memory": {"limit": size}}


@pytest.mark.parametrize(
    "text", ["", "x", "1x", "b", "1..5k", ".5k", "1.k", "1e3", "٣", "1.5.5", "k"]
)
def test_no_sizes(text: str) -> None:
    with pytest.raises(KrunError, match=f"^--memory {re.escape(text)}: must be a number"):
        changes({"memory": text}, {})


def test_counts_have_no_unit() -> None:
    assert changes({"pids_limit": "-1"}, {}) == {"pids": {"limit": -1}}
    with pytest.raises(KrunError, match="--pids-limit 5k: must be a number"):
        changes({"pids_limit": "5k"}, {})
