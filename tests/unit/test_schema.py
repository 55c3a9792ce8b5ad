"""spec-schema/, krun.spec and krun.schema say the same about every document."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from documents import BUNDLES, DOCUMENTS, EDGES, GOOD, TOP, mutants, name_of, places, read, values
from hypothesis import HealthCheck, given, settings
from jsonschema import Draft202012Validator

from krun import schema, spec
from krun.errors import BadSpec

BAD = sorted((TOP / "spec-schema/bad").glob("*.*.json"))
EXPECTED = json.loads((TOP / "spec-schema/bad/expected.json").read_text())
FAST = {
    schema.RUNTIME_CONFIG: spec.parse,
    schema.EXTENSION: spec.parse_extension,
    schema.POLICY: spec.parse_policy,
}


def first_violation(document: Any, name: str = schema.RUNTIME_CONFIG) -> tuple[str, str] | None:
    """Return what krun.spec finds; anything but BadSpec fails the test."""
    try:
        assert FAST[name](document) is document
    except BadSpec as error:
        return error.path, error.text
    return None


def test_examples_cover_every_schema() -> None:
    ours = {"runtime-config", "config-kontain", "policy", "state", "stored-state"}
    assert ours <= set(schema.names())
    assert ours <= {name_of(path) for path in GOOD}
    assert ours <= {name_of(path) for path in BAD}


@pytest.mark.parametrize("name", schema.names())
def test_schema_is_a_schema(name: str) -> None:
    document = schema.load(name)
    Draft202012Validator.check_schema(document)
    assert document["$id"].endswith(f"/{name}.schema.json")


@pytest.mark.parametrize("path", GOOD, ids=lambda path: path.stem)
def test_good_example(path: Path) -> None:
    document, name = read(path), name_of(path)
    assert schema.explain(document, name) == []
    schema.plain_validator(name).validate(document)
    if name in FAST:
        assert first_violation(document, name) is None


@pytest.mark.parametrize("path", BAD, ids=lambda path: path.stem)
def test_bad_example(path: Path) -> None:
    document, name = read(path), name_of(path)
    found = schema.violations(document, name)
    assert found[0][0] == EXPECTED[path.name]
    assert all(text for _, text in found)
    if name in FAST and not found[0][0].startswith("network."):
        assert first_violation(document, name) == found[0]


def test_every_bad_example_has_its_path() -> None:
    written = {path.name for path in BAD if name_of(path) in FAST}
    assert written <= EXPECTED.keys() <= {path.name for path in BAD}


@pytest.mark.parametrize("path", BUNDLES, ids=lambda path: path.parent.name)
def test_recorded_bundle_is_valid(path: Path) -> None:
    document = read(path)
    assert schema.explain(document) == []
    assert first_violation(document) is None


@pytest.mark.parametrize("kind", ["processes", "resources"])
def test_recorded_parts_are_valid(kind: str) -> None:
    parse = {"processes": spec.parse_process, "resources": spec.parse_resources}[kind]
    paths = sorted((TOP / "tests/data" / kind).glob("*.json"))
    assert paths
    for path in paths:
        document = read(path)
        assert parse(document) is document


def test_full_example_uses_every_property() -> None:
    """Each property of the schemas is in an example, so that the tests reach it."""
    used: set[str] = set()

    def collect(value: Any) -> None:
        if isinstance(value, dict):
            used.update(value)
            value = list(value.values())
        if isinstance(value, list):
            for member in value:
                collect(member)

    for path in GOOD:
        collect(read(path))
    declared: set[str] = set()

    def declarations(node: Any) -> None:
        if isinstance(node, dict):
            properties = node.get("properties", {})
            declared.update(key for key, value in properties.items() if isinstance(value, dict))
            node = list(node.values())
        if isinstance(node, list):
            for member in node:
                declarations(member)

    for name in ("runtime-config", "config-kontain", "policy", "state", "stored-state"):
        declarations(schema.load(name))
    assert declared - used == {"commandLine"}  # Windows


def test_all_violations_in_the_documents_order() -> None:
    document = {
        "linux": {"namespaces": [{"type": "pid"}, {"type": "pid"}, {"type": "x"}]},
        "mounts": [{"source": 1}, {"destination": "a"}],
        "ociVersion": "1.2.0",
    }
    assert schema.explain(document) == [
        "root: is required",
        "linux.namespaces: must not have pid more than once",
        "linux.namespaces[2].type: must be one of "
        "pid, network, mount, ipc, uts, user, cgroup, time",
        "mounts[0].destination: is required",
        "mounts[0].source: must be a string, is an integer",
        "mounts[1].destination: must be absolute",
    ]


def test_message_stays_one_line() -> None:
    document = {"ociVersion": "1.2.0", "root": {"path": "r"}, "annotations": {"a\n" * 99: 1}}
    (line,) = schema.explain(document)
    assert "\n" not in line and len(line) < 200
    assert first_violation(document) == tuple(line.split(": ", 1))


def has_whole_float(value: Any) -> bool:
    if isinstance(value, dict):
        return any(has_whole_float(member) for member in value.values())
    if isinstance(value, list):
        return any(has_whole_float(member) for member in value)
    return isinstance(value, float) and value.is_integer()


def has_network(document: Any, name: str) -> bool:
    """Whether krun.network.reader has a word in the document, which krun.spec leaves it."""
    extension = document.get("kontain") if name == schema.RUNTIME_CONFIG else document
    return isinstance(extension, dict) and isinstance(extension.get("network"), dict | str)


def agree(document: Any, name: str) -> None:
    if isinstance(document, dict) and name != schema.POLICY and has_network(document, name):
        extension = document["kontain"] if name == schema.RUNTIME_CONFIG else document
        extension["network"] = {}
    found = schema.violations(document, name)
    assert first_violation(document, name) == (found[0] if found else None)
    # JSON Schema takes 1.0 for an integer; the Go and C readers of config.json do not, nor krun.
    if not has_whole_float(document):
        assert schema.plain_validator(name).is_valid(document) == (not found)


GENERATED = settings(
    max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)


@GENERATED
@given(mutants(schema.RUNTIME_CONFIG))
def test_agreement_on_configurations(document: Any) -> None:
    agree(document, schema.RUNTIME_CONFIG)


@GENERATED
@given(mutants(schema.EXTENSION))
def test_agreement_on_extensions(document: Any) -> None:
    agree(document, schema.EXTENSION)


@GENERATED
@given(mutants(schema.POLICY))
def test_agreement_on_policies(document: Any) -> None:
    agree(document, schema.POLICY)


@pytest.mark.parametrize("name", FAST)
def test_agreement_with_every_edge_everywhere(name: str) -> None:
    """Each place of the fullest example takes each edge value once."""
    base = max(DOCUMENTS[name], key=lambda document: len(json.dumps(document)))
    if name == schema.RUNTIME_CONFIG:
        base = next(read(path) for path in GOOD if path.name == "runtime-config.full.json")
    for path in places(base)[1:]:
        parent = base
        for key in path[:-1]:
            parent = parent[key]
        kept = parent[path[-1]]
        seen = 0
        for edge in EDGES:
            parent[path[-1]] = edge
            if first_violation(base, name):
                seen += 1
        parent[path[-1]] = kept
        # Unknown members are free, and krun.network.reader knows the inside of network.
        free = {"vendorSpecific", "x-unknown"} & set(path) or path[0] == "network" != path[-1]
        assert seen or free, path


@given(values)
def test_any_value_at_all(document: Any) -> None:
    for parse in (*FAST.values(), spec.parse_process, spec.parse_resources):
        try:
            parse(document)
        except BadSpec:
            pass


def test_what_is_wrong_beside_deep_nesting_is_named() -> None:
    nested: list[object] = []
    for _ in range(5000):
        nested = [nested]
    document = {"ociVersion": "1.0.2", "unknown": nested}
    with pytest.raises(BadSpec, match="root: is required"):
        spec.accept(spec.parse, document)
