"""The package of cgroup files: the names that it has from its modules."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from krun.linux import cgroupfs


def test_types_and_loading_know_the_same_names() -> None:
    tree = ast.parse(Path(str(cgroupfs.__file__)).read_text())
    seen = {
        (node.module.removeprefix("krun.linux.cgroupfs."), one.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(cgroupfs.__name__)
        for one in node.names
    }
    assert seen == {(part, name) for part, names in cgroupfs._PARTS.items() for name in names}
    for part, name in seen:
        assert getattr(cgroupfs, name) is getattr(getattr(cgroupfs, part), name)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'thaw'"):
        _ = cgroupfs.thaw
