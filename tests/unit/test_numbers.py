"""Numbers that people write: digits of other scripts, far too many of them, signs."""

from __future__ import annotations

import pytest

from krun import reader, signals, watch
from krun.commands import exec as execution
from krun.errors import BadSpec, KrunError
from krun.plan import process

ODD = ["\u00b2", "\u0663", "9" * 5000, "-", "--1", "1-", "", " 1", "1_0"]


@pytest.mark.parametrize("text", ODD)
def test_odd_numbers_are_errors_of_ours(text: str) -> None:
    with pytest.raises(KrunError):
        signals.number_of(f"RTMIN+{text}")
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
    assert signals.number_of("SIGRTMIN+3") == signals.number_of("RTMIN") + 3
    assert signals.number_of("RTMAX-30") == signals.number_of("RTMIN")
    with pytest.raises(KrunError):
        signals.number_of("RTMAX-31")
    assert execution._user("5:6") == {"uid": 5, "gid": 6}
    assert execution._user("5") == {"uid": 5, "gid": 0}
    assert process.cpu_list("0-2, 7", "x") == (0, 1, 2, 7)
    with pytest.raises(BadSpec):
        process.cpu_list("0-9999999999", "x")


@pytest.mark.parametrize(
    ("text", "word"),
    [
        *(("KILL", "KILL"), ("SIGTERM", "SIGTERM"), ("9", "9"), ("0", "0"), ("64", "64")),
        *(("sigcont", "18"), ("007", "7"), ("POLL", "29"), ("SIGRTMIN+3", "37")),
    ],
)
def test_signals_are_words_that_crun_knows(text: str, word: str) -> None:
    assert signals.for_crun(text) == word


@pytest.mark.parametrize("text", ["SIGFOO", "65", "-1", "", "SIG", "SIG9", "_DFL", "TERM "])
def test_signals_that_are_none(text: str) -> None:
    with pytest.raises(KrunError):
        signals.for_crun(text)
