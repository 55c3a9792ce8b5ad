"""Examples of the schemas, and documents generated from them, for the tests of what reads them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from krun import schema
from krun.errors import BadSpec

TOP = Path(__file__).parents[1]
GOOD = sorted((TOP / "spec-schema/good").glob("*.json"))
BUNDLES = sorted((TOP / "tests/data/bundles").glob("*/config.json"))


def name_of(path: Path) -> str:
    """Return the schema that an example is of."""
    return path.name.split(".")[0]


def read(path: Path) -> Any:
    """Return a parsed file."""
    return json.loads(path.read_text())


# Values at the edges of the rules, besides those hypothesis thinks of.
EDGES: list[Any] = [
    *[None, True, False, 0, 1, -1, 5, 6, 7, 8, 31, 32, 39, 40, 0o777, 0o1000, 1000, 1001, -1001],
    *[65535, 65536, 2**31 - 1, 2**31, -(2**31) - 1, 2**32 - 1, 2**32, 2**63 - 1, 2**63],
    *[-(2**63), -(2**63) - 1, 2**64 - 1, 2**64, 999_999_999, 10**9, 0.0, 1.0, 1.5, 1e300, -0.0],
    *["", "/", "/a", "a", "a\0", "\0", "\ud800", "/\udfff", "a\n", "/\n", "\n", "é", "/é", "none"],
    *["none\n", "auto\n", "stderr\n", "512M", "512M\n", "512MB", "0512", "0", "M", "1" * 19, "٣"],
    *["2MB", "2MB\n", "02MB", "MB", "٣MB", "rwm", "rwmx", "rw\n", "0-3,7", "0-3\n", "1.2", "1.2.3"],
    *["1.2.x", "1..2", "1.2.3-dev", "1.2.3\n", "1.2.٣", "-", "--", "-x", "--x", "---x", "-é", "-1"],
    *["A=B", "f" * 64, "F" * 64 + "\n", "f" * 63, "g" * 64, "/" + "x" * 106, "/" + "x" * 107],
    *[[], {}, [[]], [{}], [None], ["a", 1], ["a", "\0"], ["a", "\ud800"], [""], {"": ""}],
    *["pid", "c", "p", "a", "RLIMIT_CPU", [{"type": "pid"}] * 2, [{"type": []}], {"type": {}}],
    *[{"a\0": "b"}, {"a": 1}, {"a": "b", "c": None}, {"path": "/x"}, {"pattern": "x"}],
]
DOCUMENTS = {
    name: [read(path) for path in GOOD if name_of(path) == name] + more
    for name, more in (
        (schema.RUNTIME_CONFIG, [read(path) for path in BUNDLES[::17]]),
        (schema.EXTENSION, []),
        (schema.POLICY, []),
    )
}
WORDS = sorted(
    {
        key
        for name in DOCUMENTS
        for key in json.dumps(schema.load(name)).replace('"', " ").split()
        if key.isalpha()
    }
)

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
values = st.sampled_from(EDGES) | st.recursive(
    scalars | st.sampled_from(EDGES),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(WORDS) | st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


def with_names(*names: str) -> st.SearchStrategy[Any]:
    """Any JSON whose objects have members of these names."""
    return st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=8),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(names), inner, max_size=4)
        ),
        max_leaves=12,
    )


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path]
    members: Any = ()
    if isinstance(value, dict):
        members = value.items()
    elif isinstance(value, list):
        members = enumerate(value)
    for key, member in members:
        found += places(member, (*path, key))
    return found


@st.composite
def mutants(draw: st.DrawFn, name: str) -> Any:
    """A good document, changed in up to three places: replaced, removed, added, doubled."""
    document = copy.deepcopy(draw(st.sampled_from(DOCUMENTS[name])))
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(places(document)))
        if not path:
            continue
        parent = document
        for key in path[:-1]:
            parent = parent[key]
        key = path[-1]
        change = draw(st.sampled_from(("replace", "replace", "remove", "add", "double")))
        if change == "replace":
            parent[key] = copy.deepcopy(draw(values))
        elif change == "remove":
            del parent[key]
        elif change == "double" and isinstance(parent, list):
            parent.append(copy.deepcopy(parent[key]))
        elif isinstance(parent, dict):
            parent[draw(st.sampled_from(WORDS))] = copy.deepcopy(draw(values))
        else:
            parent.insert(0, copy.deepcopy(draw(values)))
    return document


@st.composite
def valid_mutants(draw: st.DrawFn, parse: Any) -> Any:
    """A configuration that parse takes, with odd values where the specification allows any."""
    document = copy.deepcopy(draw(st.sampled_from(DOCUMENTS[schema.RUNTIME_CONFIG])))
    for _ in range(draw(st.integers(1, 8))):
        path = draw(st.sampled_from(places(document)[1:]))
        before = copy.deepcopy(document)
        parent = document
        for key in path[:-1]:
            parent = parent[key]
        if draw(st.integers(0, 3)):
            parent[path[-1]] = copy.deepcopy(draw(st.sampled_from(EDGES)))
        else:
            del parent[path[-1]]
        try:
            parse(document)
        except BadSpec:
            document = before
    return document
