"""The reference pages say what the schemas say, and the schemas what krun does."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from krun import extension, grammar, help, schema
from krun.monitor import km

TOP = Path(__file__).parents[2]


def load_generator() -> Any:
    spec = importlib.util.spec_from_file_location("generate", TOP / "docs/generate.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GENERATE = load_generator()


@pytest.mark.parametrize("name", GENERATE.PAGES)
def test_page_is_up_to_date(name: str) -> None:
    text = (TOP / "docs" / name).read_text()
    assert text == GENERATE.PAGES[name](), "make docs writes it"


DOCUMENTS = [TOP / "README.md", TOP / "CHANGELOG.md", *sorted((TOP / "docs").rglob("*.md"))]


def headings(path: Path) -> set[str]:
    """The anchors of a document, as web sites of repositories make them."""
    titles = re.findall(r"^#+ (.+)$", path.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    # Code is no text with links.
    text = re.sub(r"^```.*?^```|`[^`]+`", "", path.read_text(), flags=re.M | re.S)
    for file, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", text):
        target = path.parent / file if file else path
        assert target.exists(), file
        assert not anchor or anchor in headings(target), (file, anchor)


def commands() -> Iterator[tuple[str, str]]:
    """Yield each command line of krun that stands on a line of its own, with its document."""
    line = re.compile(
        r"^(?:    |[#$] )(?:sudo )?(?:\.venv/bin/)?(krun [a-z-].*?)(?: +[#>].*)?$", re.M
    )
    for path in DOCUMENTS:
        for found in line.findall(path.read_text()):
            for command in re.split(r" \| (?=krun )", found):
                yield path.name, command.partition(" | ")[0]


COMMANDS = list(commands())


def test_there_are_commands() -> None:
    assert len(COMMANDS) > 25
    assert len({name for name, _ in COMMANDS}) > 4


@pytest.mark.parametrize(("name", "command"), COMMANDS)
def test_command_is_read(name: str, command: str) -> None:
    assert isinstance(help.read(shlex.split(command)[1:]), grammar.Call)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_verbs_and_options_in_the_text_are_there(path: Path) -> None:
    """`krun verb --option` in a sentence, perhaps without what the verb needs."""
    for text in re.findall(r"`krun ([a-z][^`]*)`", " ".join(path.read_text().split())):
        if text == "version":  # What --version prints.
            continue
        table: tuple[grammar.Command, ...] = grammar.COMMANDS
        known: set[str] = set()
        for word in text.split():
            if word.startswith("-"):
                assert word.partition("=")[0] in known, text
                continue
            # Several verbs at once: ls|inspect.
            found = [one for one in table if one.name in word.split("|")]
            if table:
                assert len(found) == word.count("|") + 1, text
                known = {name for one in found for option in one.options for name in option.names}
                table = grammar.members(found[0]) if found[0].group else ()


def test_architecture_names_every_module() -> None:
    text = (TOP / "docs/architecture.md").read_text()
    tree = text.partition("## The tree")[2].partition("\n## ")[0]
    named = {name.removeprefix("krun/").rstrip("/") for name in re.findall(r"`([\w./]+)`", tree)}
    there = {
        path.name
        for path in (TOP / "krun").iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert there - {"__init__.py"} <= named
    assert {name for name in named if name.endswith(".py") and "/" not in name} <= there


def properties(node: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[Any]:
    for name, member in node.get("properties", {}).items():
        yield (*path, name), member
        if name != "gdb":
            yield from properties(member, (*path, name))


EXTENSION = dict(properties(schema.load(schema.EXTENSION)))
ANNOTATED = {path: node for path, node in EXTENSION.items() if "x-annotation" in node}
KM = {path[1]: node for path, node in EXTENSION.items() if path[0] == "km" and len(path) == 2}


def test_every_property_explains_itself() -> None:
    for name in (schema.EXTENSION, schema.POLICY):
        for path, node in properties(schema.load(name)):
            if "$ref" not in node and path[-1] != "$schema":
                assert node["title"] and node["description"], path


def test_examples_and_defaults_are_valid() -> None:
    for path, node in EXTENSION.items():
        values = [*node.get("examples", []), *([node["default"]] if "default" in node else [])]
        for value in values:
            document = value
            for name in reversed(path):
                document = {name: document}
            assert schema.explain(document, schema.EXTENSION) == []


def test_all_but_image_settings_have_annotations() -> None:
    assert EXTENSION.keys() - ANNOTATED.keys() == {("images", "check"), ("images", "prefetch")}
    names = [node["x-annotation"] for node in ANNOTATED.values()]
    assert len(set(names)) == len(names)


def spellings(value: Any) -> list[str]:
    """The ways that docs/extension.md allows a value to be written in an annotation."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return [json.dumps(value), " ".join(value)]
    return [json.dumps(value)]


@pytest.mark.parametrize(
    ("path", "value"),
    [(path, value) for path, node in ANNOTATED.items() for value in node["examples"]],
    ids=str,
)
def test_annotation_is_read_as_documented(path: tuple[str, ...], value: Any) -> None:
    name = ANNOTATED[path]["x-annotation"]
    for text in spellings(value):
        found: Any = extension.from_annotations({name: text})
        for member in path:
            found = found[member]
        assert found == value or (path == ("memory",) and str(value) == found)


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name, node in KM.items() for value in node["examples"]],
    ids=str,
)
def test_km_option_is_given_as_documented(name: str, value: Any) -> None:
    words = km.flags({name: value}, "/dev/kvm" if name == "device" else "")
    if name == "extraArgs":
        assert words[-len(value) :] == value
        return
    given = {word.partition("=")[0] for word in words}
    assert given & set(KM[name]["x-km-option"].split(", ")), words


def test_no_option_of_km_is_missing() -> None:
    documented = {
        option
        for node in (*KM.values(), *KM["gdb"]["properties"].values())
        for option in node.get("x-km-option", "").split(", ")
    }
    assert {flag.option for flag in km.FLAGS} <= documented
