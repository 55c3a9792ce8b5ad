"""pages() -> {file name: roff}: the manual pages, from the grammar that reads the command line."""

from __future__ import annotations

from pathlib import Path

import krun
from krun import grammar
from krun.grammar import Argument, Command, Option

SECTION = 1
# A fixed day, so that one source gives one page; that of the last release or change of wording.
DATE = "2026-11-26"
_INTRODUCTION = """\
krun is an OCI runtime: podman, docker and containerd start it as they start runc or crun. It runs
the program of a container's image in a virtual machine of its own, under the Kontain monitor km or
krun's built-in one; everything else of the container is what crun or krun's native engine makes
of the bundle's config.json."""
_STATUS = (
    ("0", "The verb did what it says."),
    ("1", "krun failed; the reason is on stderr and in the file of --log."),
    ("2", "The command line is wrong."),
    ("126, 127", "run: the program cannot be executed, or is not there."),
    ("255", "exec: krun failed, or the program cannot be executed; as with runc."),
    ("any other", "run and exec: the status of the program, or 128 and the number of its signal."),
)
_FILES = (
    ("/etc/krun/policy.json, /etc/krun/policy.toml", "What the host allows, and its defaults."),
    ("/run/krun", "The containers' state; $XDG_RUNTIME_DIR/krun for an ordinary user."),
    ("/opt/kontain/bin/km", "The Kontain monitor."),
    ("/dev/kvm, /dev/kkm", "The virtualization device."),
)


def _escape(text: str) -> str:
    """Return text as roff prints it: a dot or quote that begins a line is no request."""
    text = text.replace("\\", "\\e").replace("-", "\\-").replace("'", "\\(aq").replace("`", "\\(ga")
    text = "".join(c if c.isascii() else f"\\[u{ord(c):04X}]" for c in text)
    return "\n".join("\\&" + line if line.startswith(".") else line for line in text.split("\n"))


def _bold(text: str) -> str:
    return f"\\fB{_escape(text)}\\fR"


def _italic(text: str) -> str:
    return f"\\fI{_escape(text)}\\fR"


def _sentence(text: str) -> str:
    first = text.partition(" ")[0]
    # A file's name keeps its case.
    return f"{text}." if "." in first else f"{text[:1].upper()}{text[1:]}."


def _paragraph(tag: str, text: str) -> list[str]:
    return [".TP", tag, text]


def _option(option: Option) -> list[str]:
    names = ", ".join(_bold(name) for name in option.names)
    value = "|".join(option.choices) if option.choices else option.metavar
    tag = f"{names} {_italic(value)}" if value else names
    text = _escape(_sentence(option.help))
    if option.default == ".":
        text += " The default is the current directory."
    elif option.default not in (None, "", 0):
        text += f" The default is {_bold(str(option.default))}."
    if option.repeat:
        text += " May be given more than once."
    return _paragraph(tag, text)


def _argument(argument: Argument) -> str:
    name = _italic(argument.name)
    if argument.number in "+*":
        name += " .\\|.\\|."
    return f"[{name}]" if argument.number in "?*" else name


def _head(words: list[str], summary: str) -> list[str]:
    title = "-".join(words)
    return [
        f'.TH {_escape(title.upper())} {SECTION} {DATE} "krun {krun.__version__}" "krun manual"',
        ".nh",
        ".ad l",
        ".SH NAME",
        f"{_escape(title)} \\- {_escape(summary)}",
        ".SH SYNOPSIS",
    ]


def _commands(prefix: list[str], commands: tuple[Command, ...]) -> list[str]:
    lines = [".SH COMMANDS"]
    for command in commands:
        page = f"{_bold('-'.join([*prefix, command.name]))}({SECTION})"
        lines += _paragraph(page, _escape(_sentence(command.summary)))
    return lines


def _examples(command: Command) -> list[str]:
    lines = [".SH EXAMPLES"] if command.examples else []
    for number, example in enumerate(command.examples):
        lines += [".PP"] if number else []
        lines += [".nf", ".RS", _escape(example), ".RE", ".fi"]
    return lines


def _see_also(names: list[str]) -> list[str]:
    return [".SH SEE ALSO", ", ".join(f"{_bold(name)}({SECTION})" for name in names)]


def _verb(words: list[str], command: Command) -> str:
    path = [*words, command.name]
    lines = _head(path, command.summary)
    synopsis = [_bold(" ".join(path)), *(["[options]"] if command.options else [])]
    lines.append(" ".join([*synopsis, *(_argument(argument) for argument in command.arguments)]))
    lines += [".SH DESCRIPTION", _escape(_sentence(command.summary))]
    if command.detail:
        lines += [".PP", _escape(command.detail)]
    if command.options:
        lines.append(".SH OPTIONS")
        for option in command.options:
            lines += _option(option)
    lines += [*_examples(command), *_see_also(["-".join(words)])]
    return "\n".join(lines) + "\n"


def _group(words: list[str], command: Command, members: tuple[Command, ...]) -> str:
    path = [*words, command.name]
    lines = _head(path, command.summary)
    lines.append(f"{_bold(' '.join(path))} {_italic('COMMAND')} .\\|.\\|.")
    lines += [".SH DESCRIPTION", _escape(_sentence(command.summary))]
    if command.detail:
        lines += [".PP", _escape(command.detail)]
    lines += [*_commands(path, members), *_examples(command), *_see_also(["-".join(words)])]
    return "\n".join(lines) + "\n"


def _top(commands: tuple[Command, ...]) -> str:
    lines = _head(["krun"], "run every container in a virtual machine of its own")
    lines.append(f"{_bold('krun')} [options] {_italic('COMMAND')} .\\|.\\|.")
    lines += [
        ".SH DESCRIPTION",
        _escape(_INTRODUCTION),
        ".SH OPTIONS",
        "They stand before COMMAND.",
    ]
    for option in grammar.GLOBAL_OPTIONS:
        lines += _option(option)
    lines += _paragraph(f"{_bold('--version')}, {_bold('-v')}", "Print the version and exit.")
    lines += _paragraph(
        f"{_bold('--help')}, {_bold('-h')}", "Explain krun, or a command, and exit."
    )
    lines += _commands(["krun"], commands)
    for title, rows in (("EXIT STATUS", _STATUS), ("FILES", _FILES)):
        lines.append(f".SH {title}")
        for tag, text in rows:
            lines += _paragraph(_bold(tag), _escape(text))
    lines += _see_also(["podman", "docker", "crun"])
    return "\n".join(lines) + "\n"


def _pages(words: list[str], commands: tuple[Command, ...]) -> dict[str, str]:
    pages = {}
    for command in commands:
        name = "-".join([*words, command.name])
        if command.group:
            members = grammar.members(command)
            pages[f"{name}.{SECTION}"] = _group(words, command, members)
            pages |= _pages([*words, command.name], members)
        else:
            pages[f"{name}.{SECTION}"] = _verb(words, command)
    return pages


def pages() -> dict[str, str]:
    """Return every page by its file's name: krun.1, krun-create.1, ..."""
    return {f"krun.{SECTION}": _top(grammar.COMMANDS), **_pages(["krun"], grammar.COMMANDS)}


def write(directory: Path) -> list[Path]:
    """Write every page into directory, which is made where it is not there; return the files."""
    directory.mkdir(parents=True, exist_ok=True)
    files = []
    for name, text in pages().items():
        path = directory / name
        path.write_text(text, encoding="utf-8")
        files.append(path)
    return files
