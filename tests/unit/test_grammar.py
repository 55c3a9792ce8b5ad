"""The two readers of the command line, reader.parse and the click group, give the same Call."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from krun import grammar, help, reader
from krun.__main__ import main

DATA = Path(__file__).parents[1] / "data"
LINES = [
    json.loads(line)[1:]
    for line in (DATA / "command_lines.txt").read_text().splitlines()
    if line.startswith("[")
]
# What clients ask crun and runc once in a while; the answer of click is all they need.
ASKED = [line for line in LINES if line[-1:] in (["--version"], ["--help"])]
CALLED = [line for line in LINES if line not in ASKED]


def leaves(
    commands: tuple[grammar.Command, ...] = grammar.COMMANDS, words: tuple[str, ...] = ()
) -> list[tuple[list[str], grammar.Command]]:
    """Return every verb with the words that name it; the verbs of groups have several."""
    found = []
    for command in commands:
        path = (*words, command.name)
        if command.group:
            found += leaves(grammar.members(command), path)
        else:
            found.append(([*path], command))
    return found


VERBS = leaves()
GENERATED = settings(max_examples=300, deadline=None, derandomize=True)


def fast(argv: list[str]) -> grammar.Call | None:
    try:
        return reader.parse(list(argv))
    except reader.Unrecognised:
        return None


def slow(argv: list[str]) -> grammar.Call | int:
    """Read with click; what it prints is not looked at here."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return help.read(list(argv))


def test_corpus_is_large() -> None:
    assert len(CALLED) > 200
    assert {line[0] for line in CALLED if line[0][0] != "-"} >= {"create", "start", "state"}


def test_every_recorded_line_is_read_without_click() -> None:
    """Else each call of podman, dockerd or containerd would pay 27 ms for importing click."""
    unread = [line for line in CALLED if fast(line) is None]
    assert unread == []


def test_recorded_lines_read_the_same() -> None:
    seen = set()
    for line in CALLED:
        call = slow(line)
        assert call == fast(line)
        assert isinstance(call, grammar.Call)
        seen.add(call.verb)
    assert seen >= {"create", "start", "state", "kill", "delete", "exec", "pause", "resume"}


@pytest.mark.parametrize(("verb", "command"), VERBS, ids=[" ".join(words) for words, _ in VERBS])
def test_every_option_in_every_spelling(verb: list[str], command: grammar.Command) -> None:
    arguments = [a.name.lower() for a in command.arguments if a.number in "1+"]
    for option in (*command.options, *grammar.GLOBAL_OPTIONS):
        value = option.choices[-1] if option.choices else "7" if option.integer else "v"
        for name in option.names:
            if not option.metavar:
                spellings = [[name]]
            elif name.startswith("--"):
                spellings = [[name, value], [f"{name}={value}"]]
            else:
                spellings = [[name, value]]
            for words in spellings:
                if option in command.options:
                    argv = [*verb, *words, *arguments]
                else:
                    argv = [*words, *verb, *arguments]
                call = fast(argv)
                assert call is not None, argv
                assert slow(argv) == call
                assert call.verb == " ".join(verb)
                values = call.options if option in command.options else call.settings._asdict()
                expected = int(value) if option.integer else value
                if not option.metavar:
                    expected = True
                assert values[option.key] == ([expected] if option.repeat else expected)


texts = st.sampled_from(["a", "c1", "-", "--", "-x", "--root", "a=b", "=", "", "é ü", "1:2", "0"])
texts |= st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=6)


@st.composite
def options_of(draw: st.DrawFn, options: tuple[grammar.Option, ...]) -> list[str]:
    words: list[str] = []
    for option in draw(st.lists(st.sampled_from(options), max_size=4)) if options else ():
        name = draw(st.sampled_from(option.names))
        if not option.metavar:
            words.append(name)
            continue
        if option.choices:
            value = draw(st.sampled_from(option.choices))
        elif option.integer:
            value = str(draw(st.integers(0, 10**6)))
        else:
            value = draw(texts)
        if name.startswith("--") and draw(st.booleans()):
            words.append(f"{name}={value}")
        else:
            words += [name, value]
    return words


plain = texts.filter(lambda text: not text.startswith("-"))


@st.composite
def valid_lines(draw: st.DrawFn) -> list[str]:
    """A line such as a client or a script would write."""
    verb, command = draw(st.sampled_from(VERBS))
    words = draw(options_of(grammar.GLOBAL_OPTIONS))
    words += [*verb, *draw(options_of(command.options))]
    if draw(st.booleans()) and command.arguments:
        words.append("--")
    for argument in command.arguments:
        if argument.number == "1":
            words.append(draw(plain))
        elif argument.number == "?":
            words += draw(st.lists(plain, max_size=1))
        elif command.rest:
            # Behind the container's id all words are the command's, dashes and all.
            words += draw(st.lists(texts, max_size=4))
        else:
            words += draw(st.lists(plain, min_size=argument.number == "+", max_size=4))
    if not command.rest and "--" not in words:
        words += draw(options_of(command.options))
    return words


@GENERATED
@given(valid_lines())
def test_valid_lines_read_the_same(line: list[str]) -> None:
    call = fast(line)
    assert call is not None
    assert slow(line) == call


WORDS = [
    *(name for _, c in VERBS for o in c.options for name in o.names),
    *(name for o in grammar.GLOBAL_OPTIONS for name in o.names),
    *(f"{name}=x" for o in grammar.GLOBAL_OPTIONS for name in o.names),
    *(word for words, _ in VERBS for word in words),
    *[
        "--help",
        "-h",
        "--version",
        "-v",
        "--",
        "-",
        "--quiet=true",
        "--force=false",
        "-fr",
        "--roo",
    ],
]


@GENERATED
@given(st.lists(st.sampled_from(WORDS) | texts, max_size=8))
def test_what_the_small_parser_takes_click_reads_the_same(line: list[str]) -> None:
    """Any words at all: the small parser gives up, or agrees."""
    call = fast(line)
    if call is not None:
        assert slow(line) == call


@pytest.mark.parametrize(
    ("line", "status", "text"),
    [
        (["creat"], 2, "did you mean create?"),
        (["create", "--bundel", "b", "x"], 2, "--bundle"),
        (["create"], 2, "Missing argument 'ID'"),
        (["start", "a", "b"], 2, "unexpected extra argument"),
        (["list", "--format", "yaml"], 2, "'yaml' is not one of 'table', 'json'"),
        (["exec", "--preserve-fds", "x", "c"], 2, "'x' is not a valid integer"),
        (["--engine", "runc", "list"], 2, "'runc' is not one of"),
        (["run", "--bundle"], 2, "requires an argument"),
    ],
)
def test_mistakes_are_explained(
    line: list[str], status: int, text: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert fast(line) is None
    assert help.read(line) == status
    error = capfd.readouterr().err
    assert text in error and "--help tells more" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("command", grammar.COMMANDS, ids=lambda command: command.name)
def test_help_of_every_verb(command: grammar.Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert help.read([command.name, "--help"]) == 0
    out = capsys.readouterr().out
    for option in command.options:
        assert option.names[0] in out
    for example in command.examples:
        assert example in out
    assert help.read(["--help"]) == 0
    assert f"  {command.name} " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "quiet"), [(["list", "--quiet=true"], True), (["list", "--quiet=false"], False)]
)
def test_flags_in_gos_spelling(line: list[str], quiet: bool) -> None:
    call = help.read(line)
    assert isinstance(call, grammar.Call)
    assert call.options["quiet"] is quiet


@pytest.mark.parametrize(
    ("written", "plain"),
    [
        ("kill -all c", "kill --all c"),
        ("-debug -log-format json -root=/r list", "--debug --log-format json --root /r list"),
        ("create -bundle b -b=/x -pid-file=p c", "create --bundle /x --pid-file p c"),
        ("delete -f=1 -regex=t c", "delete --force --regex c"),
        ("delete --force=F --regex=False c", "delete c"),
        ("exec -u=1:2 -e=A=b c prog -all -b=1", "exec --user 1:2 --env A=b c prog -all -b=1"),
        ("exec -tty=true c -- prog --tty=false", "exec --tty c prog --tty=false"),
        ("list -f=json --quiet=TRUE", "list --format json --quiet"),
        ("kill --all=false -- -x", "kill -- -x"),
        ("network ls -format=json", "network ls --format json"),
    ],
)
def test_options_as_go_writes_them(written: str, plain: str) -> None:
    assert slow(written.split()) == slow(plain.split())


def test_a_value_is_not_an_option() -> None:
    """What follows an option that takes a value stays as it is."""
    assert slow(["create", "--bundle", "-all", "c"]).options["bundle"] == "-all"


@pytest.mark.parametrize("line", ["kill -al c", "kill --all=2 c", "list -format", "start -all c"])
def test_near_misses_stay_mistakes(line: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert help.read(line.split()) == 2
    assert "--help tells more" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("line", "where"), [("run --bundle", "krun run"), ("spec -b", "krun spec"), ("--log", "krun")]
)
def test_a_missing_value_is_the_verbs(
    line: str, where: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert help.read(line.split()) == 2
    assert f"({where} --help tells more)" in capfd.readouterr().err


@pytest.mark.parametrize("verb", ["help", "h"])
def test_help_is_a_verb_too(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    shown = []
    for line in ([verb, "start"], ["start", "--help"], [verb], ["--help"]):
        assert main(line) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] != shown[2] == shown[3]
    for line in (["--mode", "label", verb, "start"], ["network", verb, "ls"]):
        assert main(line) == 0
        shown.append(capsys.readouterr().out)
    assert shown[4] == shown[0]
    assert "krun network ls - " in shown[5]
    assert main(["-V"]) == 0
    assert capsys.readouterr().out.startswith("krun version ")
