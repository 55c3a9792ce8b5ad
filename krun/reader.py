"""parse(argv) -> Call: the small parser of plain, valid command lines.

podman, dockerd, containerd and scripts send the same few well-formed lines all day; this reads
them, and imports the table alone.  Whatever it does not recognise (help, a mistake, an unusual
spelling) raises Unrecognised, and krun.help reads the same table with click, which explains.
"""

from __future__ import annotations

from krun.grammar import (
    GLOBAL_OPTIONS,
    Call,
    Command,
    Option,
    Settings,
    command_of,
    defaults,
    members,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class Unrecognised(Exception):
    """The line is not one of the plain, valid ones; click reads it again and explains."""


Table = dict[str, tuple[Option, str]]


def _table(options: tuple[Option, ...]) -> Table:
    return {name: (option, option.key) for option in options for name in option.names}


def _convert(option: Option, text: str) -> str | int:
    if option.choices and text not in option.choices:
        raise Unrecognised
    if not option.integer:
        return text
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise Unrecognised
    return int(text)


def _read(
    words: list[str], position: int, options: tuple[Option, ...], interspersed: bool
) -> tuple[dict[str, Any], list[str], int]:
    """Read options from words[position:]; return values, positionals, where it stopped.

    Without `interspersed` the first positional ends the options.
    """
    table = _table(options)
    values = defaults(options)
    positionals: list[str] = []
    size = len(words)
    while position < size:
        word = words[position]
        if word == "--":
            if not interspersed and not positionals:
                return values, positionals, position + 1
            positionals += words[position + 1 :]
            return values, positionals, size
        if word[:1] != "-" or word == "-":
            if not interspersed:
                return values, positionals, position
            positionals.append(word)
            position += 1
            continue
        name, equals, text = word.partition("=") if word[:2] == "--" else (word, "", "")
        found = table.get(name)
        if found is None:
            raise Unrecognised
        option, key = found
        position += 1
        if not option.metavar:
            if equals:
                raise Unrecognised
            values[key] = True
            continue
        if not equals:
            if position == size:
                raise Unrecognised
            text = words[position]
            position += 1
        value = _convert(option, text)
        if option.repeat:
            values[key].append(value)
        else:
            values[key] = value
    return values, positionals, position


def _check_count(command: Command, arguments: list[str]) -> None:
    least = sum(argument.number in "1+" for argument in command.arguments)
    open_ended = any(argument.number in "+*" for argument in command.arguments)
    if len(arguments) < least or (not open_ended and len(arguments) > len(command.arguments)):
        raise Unrecognised


def parse(argv: list[str]) -> Call:
    """Read a plain, valid command line (without the program's name).

    Raises Unrecognised for every other.
    """
    values, _, position = _read(argv, 0, GLOBAL_OPTIONS, interspersed=False)
    settings = Settings(**values)
    if position == len(argv):
        raise Unrecognised
    command = command_of(argv[position])
    path = argv[position]
    position += 1
    while command is not None and command.group:
        if position == len(argv):
            raise Unrecognised
        path += " " + argv[position]
        command = command_of(argv[position], members(command))
        position += 1
    if command is None:
        raise Unrecognised
    options, arguments, stop = _read(argv, position, command.options, not command.rest)
    if command.rest:
        arguments = argv[stop:]
        # `exec ID -- COMMAND`: the mark after the id is not the command's.
        if len(arguments) > 1 and arguments[1] == "--":
            del arguments[1]
    _check_count(command, arguments)
    return Call(path, settings, options, arguments, command)
