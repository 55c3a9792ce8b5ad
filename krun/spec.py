"""parse(doc) -> Spec: check a configuration against OCI runtime-spec 1.2, naming the JSON path.

The rules are one table of shapes; a document that keeps them stays the dict it is (see
krun.types), so nothing is converted and unknown properties survive.  The table says what
spec-schema/runtime-config.schema.json says; a test holds the two together.
"""

from __future__ import annotations

from krun.errors import BadSpec

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from krun.types import Process, Spec

    # A shape checks one value: it returns None, or raises _Violation.
    Shape = Callable[[Any], None]


class _Violation(Exception):
    """A broken rule; the path is collected, innermost first, while the stack unwinds."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text
        self.path: list[str | int] = []


def _type_name(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, int | float):
        return "a number"
    if isinstance(value, str):
        return "a string"
    return "an array" if isinstance(value, list) else "an object"


def _expected(what: str, value: object) -> _Violation:
    return _Violation(f"must be {what}, is {_type_name(value)}")


def string(value: Any) -> None:
    """Any string without a NUL."""
    if type(value) is not str:
        raise _expected("a string", value)
    if "\0" in value:
        raise _Violation("must not contain a NUL character")


def name(value: Any) -> None:
    """A string that is not empty."""
    string(value)
    if not value:
        raise _Violation("must not be empty")


def absolute(value: Any) -> None:
    """An absolute path."""
    string(value)
    if value[:1] != "/":
        raise _Violation("must be absolute")


def boolean(value: Any) -> None:
    """true or false."""
    if type(value) is not bool:
        raise _expected("a boolean", value)


def integer(value: Any) -> None:
    """A signed 64-bit integer."""
    if type(value) is not int:
        raise _expected("an integer", value)
    if not -(1 << 63) <= value < 1 << 63:
        raise _Violation("must fit in 64 bits")


def between(least: int, most: int) -> Shape:
    """An integer of a range."""

    def check(value: Any) -> None:
        if type(value) is not int:
            raise _expected("an integer", value)
        if not least <= value <= most:
            raise _Violation(f"must be {least} to {most}")

    return check


uint16 = between(0, (1 << 16) - 1)
uint32 = between(0, (1 << 32) - 1)
uint64 = between(0, (1 << 64) - 1)


def one_of(*values: str) -> Shape:
    """A string of a closed set."""

    def check(value: Any) -> None:
        if type(value) is not str:
            raise _expected("a string", value)
        if value not in values:
            raise _Violation(f"must be one of {', '.join(values)}")

    return check


def array(item: Shape, least: int = 0) -> Shape:
    """An array of items."""

    def check(value: Any) -> None:
        if type(value) is not list:
            raise _expected("an array", value)
        if len(value) < least:
            raise _Violation("must not be empty")
        index = 0
        try:
            for index, member in enumerate(value):  # noqa: B007
                item(member)
        except _Violation as violation:
            violation.path.append(index)
            raise

    return check


def mapping(item: Shape) -> Shape:
    """An object whose members are all alike."""

    def check(value: Any) -> None:
        if type(value) is not dict:
            raise _expected("an object", value)
        key = ""
        try:
            for key, member in value.items():  # noqa: B007
                item(member)
        except _Violation as violation:
            violation.path.append(key)
            raise

    return check


def record(required: tuple[str, ...] = (), **members: Shape) -> Shape:
    """An object with known members; unknown ones pass."""

    def check(value: Any) -> None:
        if type(value) is not dict:
            raise _expected("an object", value)
        for key in required:
            if key not in value:
                violation = _Violation("is required")
                violation.path.append(key)
                raise violation
        key = ""
        try:
            for key, member in value.items():
                shape = members.get(key)
                if shape is not None:
                    shape(member)
        except _Violation as violation:
            violation.path.append(key)
            raise

    return check


STRINGS = array(string)

ID_MAPPINGS = array(
    record(("containerID", "hostID", "size"), containerID=uint32, hostID=uint32, size=uint32)
)

PROCESS = record(
    ("cwd",),
    terminal=boolean,
    consoleSize=record(("height", "width"), height=uint64, width=uint64),
    user=record((), uid=uint32, gid=uint32, umask=uint32, additionalGids=array(uint32)),
    args=STRINGS,
    env=STRINGS,
    cwd=absolute,
    capabilities=record(
        (),
        bounding=STRINGS,
        effective=STRINGS,
        inheritable=STRINGS,
        permitted=STRINGS,
        ambient=STRINGS,
    ),
    rlimits=array(record(("type", "soft", "hard"), type=string, soft=uint64, hard=uint64)),
    noNewPrivileges=boolean,
    apparmorProfile=string,
    selinuxLabel=string,
    oomScoreAdj=integer,
)

HOOKS = array(record(("path",), path=absolute, args=STRINGS, env=STRINGS, timeout=integer))

SPEC = record(
    ("ociVersion",),
    ociVersion=name,
    process=PROCESS,
    root=record(("path",), path=name, readonly=boolean),
    hostname=string,
    domainname=string,
    mounts=array(
        record(
            ("destination",),
            destination=absolute,
            type=string,
            source=string,
            options=STRINGS,
            uidMappings=ID_MAPPINGS,
            gidMappings=ID_MAPPINGS,
        )
    ),
    hooks=record(
        (),
        prestart=HOOKS,
        createRuntime=HOOKS,
        createContainer=HOOKS,
        startContainer=HOOKS,
        poststart=HOOKS,
        poststop=HOOKS,
    ),
    annotations=mapping(string),
    linux=record(
        (),
        namespaces=array(
            record(
                ("type",),
                type=one_of("pid", "network", "mount", "ipc", "uts", "user", "cgroup", "time"),
                path=absolute,
            )
        ),
        uidMappings=ID_MAPPINGS,
        gidMappings=ID_MAPPINGS,
        devices=array(
            record(
                ("type", "path"),
                type=one_of("a", "b", "c", "u", "p"),
                path=absolute,
                major=integer,
                minor=integer,
                fileMode=uint32,
                uid=uint32,
                gid=uint32,
            )
        ),
        cgroupsPath=string,
        maskedPaths=array(absolute),
        readonlyPaths=array(absolute),
        sysctl=mapping(string),
    ),
)


def _json_path(path: list[str | int]) -> str:
    text = ""
    for part in reversed(path):
        if isinstance(part, int):
            text += f"[{part}]"
        elif part.isidentifier():
            text += f".{part}" if text else part
        else:
            text += f'["{part}"]'
    return text


def _check(shape: Shape, document: Any, name: str) -> None:
    try:
        shape(document)
    except _Violation as violation:
        raise BadSpec(_json_path(violation.path), violation.text, document=name) from None


def parse(document: Any) -> Spec:
    """Return document as a Spec; raises BadSpec that names the first violation's JSON path."""
    _check(SPEC, document, "config.json")
    spec: Spec = document
    return spec


def parse_process(document: Any) -> Process:
    """Return document as the process of an exec (process.json); raises BadSpec."""
    _check(PROCESS, document, "process.json")
    process: Process = document
    return process
