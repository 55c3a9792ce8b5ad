"""What real clients sent (tests/data) is read: every command line and every configuration."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from krun import jsontext, reader, spec

DATA = Path(__file__).resolve().parent.parent / "data"
BUNDLES = sorted(path.parent.name for path in DATA.glob("bundles/*/config.json"))
VERBS = {
    *("create", "start", "state", "kill", "delete", "exec", "run"),
    *("pause", "resume", "update", "ps", "events"),
}


def test_there_is_something_to_read() -> None:
    assert len(BUNDLES) > 60


def test_every_command_line_is_read_by_the_small_parser() -> None:
    """click would read them too, but in ten times the time."""
    seen = set()
    for line in (DATA / "command_lines.txt").read_text().splitlines():
        if line.startswith("#"):
            continue
        argv = json.loads(line)[1:]
        if argv == ["--version"]:
            continue
        call = reader.parse(argv)
        assert call.verb == next(word for word in argv if word in VERBS)
        seen.add(call.verb)
    assert seen > {"create", "start", "kill", "delete", "exec", "update"}


@pytest.mark.parametrize("name", BUNDLES)
def test_configuration(name: str) -> None:
    text = (DATA / "bundles" / name / "config.json").read_text()
    parsed = spec.parse(jsontext.loads(text))
    assert parsed == json.loads(text), "nothing is lost or changed"
