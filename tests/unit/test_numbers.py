"""Numbers that people write: digits of other scripts, far too many of them, signs."""

from __future__ import annotations

import pytest

from krun import reader, removal, watch
from krun.commands import exec as execution
from krun.errors import BadSpec, KrunError
from krun.plan import process

ODD = ["\u00b2", "\u0663", "9" * 5000, "-", "--1", "1-", "", " 1", "1_0"]


@pytest.mark.parametrize("text", ODD)
def test_odd_numbers_are_errors_of_ours(text: str) -> None:
    with pytest.raises(KrunError):
        removal.signal_number(f"RTMIN+{text}")
    with pytest.raises(KrunError):
        watch.changes({"memory": text}, {})
    with pytest.raises(KrunError):
        execution._user(text)
    if text not in ("", " 1"):
        with pytest.raises(BadSpec):
            process.cpu_list(text, "x")
    with pytest.raises(reader.Unrecognised):
        reader.parse(["exec", "--preserve-fds", text, "x", "y"])


def test_plain_numbers() -> None:
    assert removal.signal_number("SIGRTMIN+3") == removal.signal_number("RTMIN") + 3
    assert removal.signal_number("RTMAX-30") == removal.signal_number("RTMIN")
    with pytest.raises(KrunError):
        removal.signal_number("RTMAX-31")
    assert execution._user("5:6") == {"uid": 5, "gid": 6}
    assert execution._user("5") == {"uid": 5, "gid": 0}
    assert process.cpu_list("0-2, 7", "x") == (0, 1, 2, 7)
    with pytest.raises(BadSpec):
        process.cpu_list("0-9999999999", "x")
