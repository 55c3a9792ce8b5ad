"""The mutations of `make mutate` fit the tree, and none of the tests of escapes is without one."""

from __future__ import annotations

import re
from pathlib import Path

from security.mutations import MUTATIONS, REPOSITORY


def test_each_edit_is_of_a_text_that_is_there_once() -> None:
    for mutation in MUTATIONS:
        for file, text, replacement in mutation.edits:
            assert (REPOSITORY / file).read_text().count(text) == 1, (mutation.name, file, text)
            assert text != replacement


def test_each_test_has_a_mutation() -> None:
    source = (Path(__file__).parent / "test_escapes.py").read_text()
    tests = re.findall(r"^def (test_\w+)", source, re.MULTILINE)
    claimed = {name for name in tests for one in MUTATIONS if one.tests in name}
    assert set(tests) == claimed
    for mutation in MUTATIONS:
        assert any(mutation.tests in name for name in tests), mutation.name
