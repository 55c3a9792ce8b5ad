"""The manual pages: complete, and clean in man(1) itself."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from needs import need

from krun import grammar, man

PAGES = man.pages()


def commands(
    table: tuple[grammar.Command, ...] = grammar.COMMANDS, words: tuple[str, ...] = ("krun",)
) -> Iterator[tuple[str, grammar.Command]]:
    for command in table:
        path = (*words, command.name)
        yield "-".join(path), command
        if command.group:
            yield from commands(grammar.members(command), path)


ALL = list(commands())


def render(name: str, directory: Path) -> str:
    """Return the page as man(1) shows it; a warning of groff fails."""
    need("man")
    path = directory / name
    path.write_text(PAGES[name])
    done = subprocess.run(
        ["man", "--warnings=w", "--local-file", str(path)],
        env={"PATH": "/usr/bin:/bin", "MANWIDTH": "100", "LANG": "C.UTF-8", "MAN_KEEP_STDERR": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    return re.sub(r".\x08|\x1b\[[0-9;]*m", "", done.stdout)


def test_every_command_has_a_page() -> None:
    assert PAGES.keys() == {"krun.1", *(f"{name}.1" for name, _ in ALL)}


@pytest.mark.parametrize(("name", "command"), ALL, ids=[name for name, _ in ALL])
def test_page(name: str, command: grammar.Command, tmp_path: Path) -> None:
    text = render(f"{name}.1", tmp_path)
    assert f"{name.upper()}(1)" in text
    assert f"{name} - {command.summary}" in " ".join(text.split())
    for option in command.options:
        for spelling in option.names:
            assert re.search(rf"^ +.*{re.escape(spelling)}\b", text, re.MULTILINE), spelling
    for example in command.examples:
        assert example in text
    for title in ("NAME", "SYNOPSIS", "DESCRIPTION", "SEE ALSO"):
        assert f"\n{title}\n" in text


@pytest.mark.parametrize("name", PAGES)
def test_every_formatter_reads_the_page(name: str) -> None:
    """groff takes bytes beyond ASCII for Latin-1; mandoc has no use for .PP after a heading."""
    assert PAGES[name].isascii()
    assert not re.search(r"^\.SH .*\n\.PP", PAGES[name], re.MULTILINE)
    assert re.match(r"\.TH \S+ 1 \d{4}-\d\d-\d\d ", PAGES[name])
    assert "default is \\fB.\\fR" not in PAGES[name]


def test_top_page(tmp_path: Path) -> None:
    text = render("krun.1", tmp_path)
    for command in grammar.COMMANDS:
        assert f"krun-{command.name}(1)" in text
    for option in grammar.GLOBAL_OPTIONS:
        assert option.names[0] in text
    assert "\nEXIT STATUS\n" in text and "/etc/krun/policy.json" in text


def test_text_that_roff_would_take_for_its_own() -> None:
    command = grammar.Command("x", ".dot 'quote' \\back -dash", examples=(".sh 'a' \\n --b",))
    page = man._verb(["krun"], command)
    assert not re.search(r"^\.(dot|sh)", page, re.MULTILINE)
    assert "\\&.sh \\(aqa\\(aq \\en \\-\\-b" in page


def test_group_names_its_members() -> None:
    family = grammar.Command("family", "do several things", group="krun.network.grammar")
    pages = man._pages(["krun"], (family,))
    assert pages.keys() == {"krun-family.1"} | {
        f"krun-family-{command.name}.1" for command in grammar.members(family)
    }
    assert "krun\\-family\\-create\\fR(1)" in pages["krun-family.1"]
    assert "krun family create" in pages["krun-family-create.1"]


def test_write(tmp_path: Path) -> None:
    files = man.write(tmp_path / "share" / "man1")
    assert {path.name: path.read_text() for path in files} == PAGES
