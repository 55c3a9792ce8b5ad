"""The grammar as a click group: help, errors with suggestions, completion, man pages.

The sole importer of click.  It reads the same table as reader.parse and gives the same Call.
"""

from __future__ import annotations

import sys
from difflib import get_close_matches
from typing import Any

import click
from click.shell_completion import CompletionItem

from krun import grammar, log, version
from krun.errors import KrunError, UsageError

_RUNS = """krun runs containers whose payload is in a virtual machine of its own.

It is an OCI runtime: podman, docker and containerd call it as they call runc or crun.
"""


SHELLS = ("bash", "zsh", "fish")


class _Stop(Exception):
    """Click has read a call; carries it out of the nest of commands."""

    def __init__(self, call: grammar.Call) -> None:
        super().__init__()
        self.call = call


def _containers(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[Any]:
    """Complete container ids of the state directory."""
    from krun import host, many

    top = context
    while top.parent is not None:
        top = top.parent
    root = top.params.get("root") or host.default_root()
    try:
        names = many.containers(root)
    except OSError:
        return []
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]


def _signals(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[Any]:
    """Complete a signal's name, with SIG or without as it was begun."""
    from signal import Signals

    cut = 0 if incomplete.startswith("SIG") else 3
    names = [one.name[cut:] for one in Signals if one.name.startswith("SIG")]
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]


def _shells(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[Any]:
    """Complete the shells that there are scripts for."""
    return [CompletionItem(name) for name in SHELLS if name.startswith(incomplete)]


# What completes an argument, by its name in the grammar.
_COMPLETIONS = {"ID": _containers, "SIGNAL": _signals, "SHELL": _shells}


def _parameter(option: grammar.Option) -> click.Option:
    names = [*option.names, option.key]
    if not option.metavar:
        return click.Option(names, is_flag=True, default=False, help=option.help)
    kind: click.ParamType[Any]
    if option.choices:
        kind = click.Choice(option.choices)
    elif option.integer:
        kind = click.IntRange(min=0)
    elif option.metavar in ("DIR", "FILE", "SOCKET", "PATH"):
        kind = click.Path(file_okay=option.metavar != "DIR")
    else:
        kind = click.STRING
    shown = option.default not in (None, "", 0)
    return click.Option(
        names,
        type=kind,
        metavar=None if option.choices else option.metavar,
        default=() if option.repeat else option.default,
        multiple=option.repeat,
        show_default=shown and not option.repeat,
        help=option.help,
    )


def _argument(argument: grammar.Argument) -> click.Argument:
    many = argument.number in "+*"
    name = argument.name + ("..." if many else "")
    return click.Argument(
        [argument.name.lower()],
        required=argument.number in "1+",
        nargs=-1 if many else 1,
        type=click.UNPROCESSED if many else click.STRING,
        metavar=f"[{name}]" if argument.number in "?*" else name,
        shell_complete=_COMPLETIONS.get(argument.name),
    )


def _examples(command: grammar.Command) -> str:
    if not command.examples:
        return ""
    lines = "\n".join(f"  {example}" for example in command.examples)
    return f"\b\nExamples:\n{lines}"


class _Named(click.Command):
    """A command whose help begins with a section NAME, as that of runc does."""

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the help page."""
        formatter.write(f"NAME:\n   {ctx.command_path} - {self.short_help}\n\n")
        super().format_help(ctx, formatter)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Read the words; click does not always say whose an option without its value was."""
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            error.ctx = error.ctx or ctx
            raise


class _Verb(_Named):
    """A verb whose callback is to hand out the Call."""

    def __init__(self, command: grammar.Command, path: str) -> None:
        self.entry = command
        self.path = path
        super().__init__(
            command.name,
            params=[
                *(_parameter(option) for option in command.options),
                *(_argument(argument) for argument in command.arguments),
            ],
            help=f"{command.summary[:1].upper()}{command.summary[1:]}.\n\n{command.detail}",
            short_help=command.summary,
            epilog=_examples(command),
            callback=self._called,
            context_settings={"allow_interspersed_args": not command.rest},
        )

    def _called(self, **values: Any) -> None:
        arguments: list[str] = []
        for argument in self.entry.arguments:
            value = values.pop(argument.name.lower())
            if isinstance(value, tuple):
                arguments += value
            elif value is not None:
                arguments.append(value)
        if self.entry.rest and len(arguments) > 1 and arguments[1] == "--":
            del arguments[1]
        options = {key: list(v) if isinstance(v, tuple) else v for key, v in values.items()}
        top = click.get_current_context().find_root().params
        settings = grammar.Settings(**top)
        raise _Stop(grammar.Call(self.path, settings, options, arguments, self.entry))


class _Group(_Named, click.Group):
    """A group that suggests the nearest verb."""

    def __init__(self, commands: tuple[grammar.Command, ...], path: str, **rest: Any) -> None:
        super().__init__(**rest)
        self.entries = commands
        self.path = path

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the verbs in the table's order."""
        return [command.name for command in self.entries]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a verb, or the group of that name."""
        command = grammar.command_of(cmd_name, self.entries)
        if command is None:
            return None
        path = f"{self.path} {cmd_name}".strip()
        if command.group:
            return _Group(
                grammar.members(command),
                path,
                name=command.name,
                help=f"{command.summary[:1].upper()}{command.summary[1:]}.\n\n{command.detail}",
                short_help=command.summary,
                epilog=_examples(command),
            )
        return _Verb(command, path)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        """Find the verb; suggest one where the word is none."""
        if args and not args[0].startswith("-") and self.get_command(ctx, args[0]) is None:
            if ctx.resilient_parsing:
                # A shell asks for completions: there are none.
                return None, None, args
            near = get_close_matches(args[0], self.list_commands(ctx), n=2)
            hint = f", did you mean {' or '.join(near)}?" if near else ""
            # runc's words.
            raise click.UsageError(f"No help topic for {args[0]!r}{hint}", ctx)
        return super().resolve_command(ctx, args)


def _print_version(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value and not context.resilient_parsing:
        click.echo(version.text())
        context.exit()


def group() -> click.Group:
    """Return the whole command line."""
    show_version = click.Option(
        ["--version", "-v"],
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=_print_version,
        help="Print the version and exit.",
    )
    return _Group(
        grammar.COMMANDS,
        "",
        name="krun",
        help=_RUNS,
        short_help="Open Container Initiative runtime, payloads in virtual machines",
        params=[*(_parameter(option) for option in grammar.GLOBAL_OPTIONS), show_version],
        context_settings={"help_option_names": ["--help", "-h"], "max_content_width": 100},
        epilog="krun VERB --help tells more; krun check tells whether this machine is ready.",
    )


def _plain(argv: list[str]) -> list[str]:
    """Write options that only Go's flag package and runc know as click reads them.

    These are -long for --long, -x=VALUE for -x VALUE, --flag=true or =false, and the verb help.
    """
    words, position = _plain_options(argv, 0, grammar.GLOBAL_OPTIONS, interspersed=False)
    commands: tuple[grammar.Command, ...] = grammar.COMMANDS
    while position < len(argv):
        if argv[position] in ("help", "h"):
            return [*words, *argv[position + 1 :], "--help"]
        command = grammar.command_of(argv[position], commands)
        if command is None:
            break
        words.append(argv[position])
        position += 1
        if not command.group:
            rest, position = _plain_options(argv, position, command.options, not command.rest)
            words += rest
            break
        commands = grammar.members(command)
    return words + argv[position:]


def _plain_options(
    argv: list[str], position: int, options: tuple[grammar.Option, ...], interspersed: bool
) -> tuple[list[str], int]:
    """Return the options rewritten, and where they end: as grammar reads them."""
    table = {name: option for option in options for name in option.names}
    words: list[str] = []
    while position < len(argv) and argv[position] != "--":
        word = argv[position]
        if word[:1] != "-" or word == "-":
            if not interspersed:
                break
            words.append(word)
            position += 1
            continue
        position += 1
        name, equals, value = word.partition("=")
        if name[:2] != "--" and len(name) > 2 and f"-{name}" in table:
            name = f"-{name}"
        option = table.get(name)
        if option is None:
            words.append(word)
        elif option.metavar:
            if not equals and position < len(argv):
                words += [name, argv[position]]
                position += 1
            else:
                words += [name, value] if equals and name[:2] != "--" else [name + equals + value]
        elif equals and value in _TRUE:
            words.append(name)
        elif not equals or value not in _FALSE:
            words.append(name + equals + value)
    return words, position


# What Go's strconv.ParseBool takes.
_TRUE = ("1", "t", "T", "TRUE", "true", "True")
_FALSE = ("0", "f", "F", "FALSE", "false", "False")


def _configure_log(argv: list[str]) -> None:
    """Take --log and --log-format from a line that could not be read as a whole."""
    values = {"--log": None, "--log-format": "text"}
    for position, word in enumerate(argv):
        name, equals, value = word.partition("=")
        if name in values:
            if equals:
                values[name] = value
            elif position + 1 < len(argv):
                values[name] = argv[position + 1]
    try:
        log.configure(values["--log"], values["--log-format"] or "text", None, False)
    except KrunError:
        # The mistake in the line comes first.
        return


def completion_script(shell: str) -> str | None:
    """Return the completion script for bash, zsh or fish; None for another shell."""
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    if kind is None:
        return None
    text = kind(group(), {}, "krun", "_KRUN_COMPLETE").source()
    # Click's fish script cuts a summary at its first comma.
    return text.replace('string split ","', 'string split -m 1 ","')


def read(argv: list[str]) -> grammar.Call | int:
    """Read a command line with click; return the Call, or the exit status of what was printed."""
    tool = group()
    try:
        # With _KRUN_COMPLETE set, a shell asks for completions, and click answers.
        tool.main(
            args=_plain(argv),
            prog_name="krun",
            standalone_mode=False,
            complete_var="_KRUN_COMPLETE",
        )
    except _Stop as stop:
        return stop.call
    except click.UsageError as error:
        if isinstance(error, click.exceptions.NoArgsIsHelpError):
            click.echo(error.ctx.get_help() if error.ctx else "", err=not argv)
            return UsageError.exit_code if argv else 0
        _configure_log(argv)
        where = error.ctx.command_path if error.ctx else "krun"
        log.error(f"{error.format_message()} ({where} --help tells more)")
        return UsageError.exit_code
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except SystemExit as stop:
        # The end of a completion; the warm start would print its traceback.
        return int(stop.code or 0)
    except click.Abort:
        return 130
    sys.stdout.flush()
    return 0
