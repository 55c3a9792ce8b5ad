"""km's command line: settings -> flags, and flags an image gives -> settings.  Pure.

Facts of km that the table rests on: options end at the first word that is none, or at `--`; a
bad option ends km with status 1 before the payload is looked at.
"""

from __future__ import annotations

from krun.errors import BadSpec
from krun.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# The greatest argument or environment string that km passes on whole, and the greatest sum.
STRING_MAX = 4096
STRINGS_MAX = 128 * 1024
# km's own descriptors end at 736, one more is needed for each payload thread.
NOFILE_LEAST = 737
NOFILE_WANTED = 1024
# km, one vCPU, and the task that KVM's huge-page recovery adds to the process.
PIDS_LEAST = 3
# Environment variables of these prefixes steer km itself.
RESERVED_ENV = ("KM_", "SNAP_LISTEN")


class Flag(Record):
    """One km option: its name in the extension, on km's command line, and its kind.

    Kinds: "flag" (present or not), "text" (--flag=value), "word" (--flag value),
    "negated" (present when false), "verbose" (flag or text), "port" (flag or text).
    """

    name: str
    option: str
    kind: str
    short: str = ""


FLAGS = (
    Flag("verbose", "--verbose", "verbose", "-V"),
    Flag("membusWidth", "--membus-width", "text", "-P"),
    Flag("enable1gPages", "--enable-1g-pages", "flag"),
    Flag("enable1gPages", "--disable-1g-pages", "negated"),
    Flag("overcommitMemory", "--overcommit-memory", "flag"),
    Flag("coredump", "--coredump", "text", "-C"),
    Flag("coreOnErr", "--core-on-err", "flag"),
    Flag("dumpShutdown", "--dump-shutdown", "flag"),
    Flag("snapshot", "--snapshot", "text"),
    Flag("mgtpipe", "--mgtpipe", "word"),
    Flag("hcallStats", "--hcall-stats", "flag", "-S"),
    Flag("vendorId", "--vendorid", "flag"),
    Flag("killUnimplementedSyscalls", "--kill-unimpl-scall", "flag"),
    Flag("gdbPort", "--gdb-server-port", "port", "-g"),
    Flag("gdbListen", "--gdb-listen", "flag"),
    Flag("gdbDynlink", "--gdb-dynlink", "flag"),
)
# What only the host's policy may allow: a gdb server listens on every address of the network
# namespace, and free arguments could be any of the options above.
HOST_ONLY = ("gdb", "extraArgs")


def _flatten(options: dict[str, Any]) -> dict[str, Any]:
    flat = {key: value for key, value in options.items() if key not in ("gdb", "device")}
    gdb = options.get("gdb")
    if isinstance(gdb, dict):
        flat["gdbPort"] = gdb.get("port", True)
        flat["gdbListen"] = gdb.get("listen", False)
        flat["gdbDynlink"] = gdb.get("dynlink", False)
    elif gdb:
        flat["gdbPort"] = gdb
    return flat


def flags(options: dict[str, Any], device: str = "") -> list[str]:
    """Return km's flags for the extension's `km` object.

    Its own log goes to stderr unless told otherwise: with stderr a pipe, as it is under podman
    and docker, km would write its reasons to a file inside the container.
    """
    flat = _flatten(options)
    words = [f"--km-log-to={flat.get('log') or 'stderr'}"]
    if device:
        words.append(f"--virt-device={device}")
    for flag in FLAGS:
        value = flat.get(flag.name)
        if value is None:
            continue
        if flag.kind == "negated":
            if value is False:
                words.append(flag.option)
        elif value is True:
            words.append(flag.option)
        elif value is False:
            continue
        elif flag.name == "coredump" and value == "none":
            words.append(f"{flag.option}=/dev/null")
        elif flag.kind == "word":
            words += [flag.option, str(value)]
        else:
            words.append(f"{flag.option}={value}")
    leave_out = flat.get("copyenv")
    if leave_out:
        words += ["--copyenv", "=".join(leave_out)]
    words += flat.get("extraArgs") or []
    return words


def argv(program: str, flags: list[str], payload: list[str]) -> list[str]:
    """Return km's argument vector; `--` keeps a payload that begins with - from being read."""
    return [program, *flags, "--", *payload]


# What else an image may write behind `km`: (long option, short option, takes a value).
_ALSO = (
    ("--km-log-to", "-k", "log"),
    ("--log-to", "", "payloadLog"),
    ("--putenv", "-e", "putenv"),
    ("--copyenv", "", "copyenv"),
)


def _image_options() -> dict[str, tuple[str, bool]]:
    """Return option -> (member of the extension, takes a value)."""
    table = {option: (name, True) for option, _, name in _ALSO}
    table.update({short: (name, True) for _, short, name in _ALSO if short})
    for flag in FLAGS:
        name = "gdb" if flag.name.startswith("gdb") else flag.name
        for option in (flag.option, flag.short):
            if option:
                table[option] = (name, flag.kind in ("text", "word"))
    return table


def split(words: list[str]) -> tuple[list[str], list[str], list[str]]:
    """Split the words behind `km` of an image's entrypoint.

    Returns km's options, the members of the extension they stand for (the host's policy has a
    say in each), and the payload.  Raises BadSpec for what is not an option written out in full:
    km reads abbreviations and bundles of letters, behind which anything can hide.
    """
    table = _image_options()
    options: list[str] = []
    members: list[str] = []
    position = 0
    while position < len(words):
        word = words[position]
        if word == "--":
            return options, members, words[position + 1 :]
        if word[:1] != "-" or word == "-":
            break
        position += 1
        name, equals, _ = word.partition("=")
        if word[:2] != "--":
            name, equals = word[:2], word[2:]
        member, takes_value = table.get(name, ("", False))
        optional = member in ("verbose", "gdb")
        if not member or (equals and not takes_value and not optional):
            raise BadSpec(
                "process.args",
                f"km option {word} is not the image's to give",
                "options are written out in full; the device is krun's to choose",
            )
        options.append(word)
        members.append(member)
        if takes_value and not equals:
            options += words[position : position + 1]
            position += 1
    return options, members, words[position:]
