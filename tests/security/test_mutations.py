"""The mutations of `make mutate` fit the tree, and none of the tests of escapes is without one."""

from __future__ import annotations

import re
from pathlib import Path

from security.mutations import ESCAPES, MUTATIONS, REPOSITORY


def test_each_edit_is_of_a_text_that_is_there_once() -> None:
    for mutation in MUTATIONS:
        for file, text, replacement in mutation.edits:
            assert (REPOSITORY / file).read_text().count(text) == 1, (mutation.name, file, text)
            assert text != replacement


def test_each_test_has_a_mutation() -> None:
    source = (Path(__file__).parent / "test_escapes.py").read_text()
    tests = re.findall(r"^def (test_\w+)", source, re.MULTILINE)
    claimed = {name for name in tests for one in ESCAPES if one.tests in name}
    assert set(tests) == claimed


def test_each_mutation_has_its_tests() -> None:
    for mutation in MUTATIONS:
        source = (REPOSITORY / mutation.file).read_text()
        tests = re.findall(r"^def (test_\w+)", source, re.MULTILINE)
        for words in mutation.tests.split(" or "):
            assert any(words in name for name in tests), mutation.name
