"""Shapes of JSON values: functions that return None for a value that has the shape, else raise.

A table of shapes says what a document must be; see krun.spec.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    # A shape checks one value: it returns None, or raises Violation.
    Shape = Callable[[Any], None]


class Violation(Exception):
    """A broken rule; the path is collected, innermost first, while the stack unwinds."""

    def __init__(self, text: str, *path: str | int) -> None:
        super().__init__(text)
        self.text = text
        self.path = list(path)


def type_name(value: object) -> str:
    """Return what JSON calls the type of value, with its article."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, int):
        return "an integer"
    if isinstance(value, float):
        return "a number with a fraction or an exponent"
    if isinstance(value, str):
        return "a string"
    return "an array" if isinstance(value, list) else "an object"


def _expected(what: str, value: object) -> Violation:
    return Violation(f"must be {what}, is {type_name(value)}")


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def string(value: Any) -> None:
    """Text that the kernel can take: no NUL, no lone surrogate (RFC 8259 section 8.2)."""
    if type(value) is not str:
        raise _expected("a string", value)
    if "\0" in value or not (value.isascii() or _encodable(value)):
        raise Violation("must not contain NUL or a lone surrogate")


def strings(value: Any) -> None:
    """An array of strings."""
    if type(value) is not list:
        raise _expected("an array", value)
    try:
        text = "".join(value)
    except TypeError:
        pass
    else:
        if "\0" not in text and text.isascii():
            return
    _strings(value)


def some_strings(value: Any) -> None:
    """An array of at least one string."""
    if type(value) is list and not value:
        raise Violation("must not be empty")
    strings(value)


def name(value: Any) -> None:
    """A string that is not empty."""
    string(value)
    if not value:
        raise Violation("must not be empty")


def absolute(value: Any) -> None:
    """An absolute path."""
    string(value)
    if value[:1] != "/":
        raise Violation("must be absolute")


def absolute_or_empty(value: Any) -> None:
    """An absolute path, or an empty string that means none (as Go's encoders write it)."""
    string(value)
    if value and value[:1] != "/":
        raise Violation("must be absolute")


def boolean(value: Any) -> None:
    """true or false."""
    if type(value) is not bool:
        raise _expected("a boolean", value)


def between(least: int, most: int) -> Shape:
    """An integer of a range."""

    def check(value: Any) -> None:
        if type(value) is not int:
            raise _expected("an integer", value)
        if not least <= value <= most:
            raise Violation(f"must be {least} to {most}")

    return check


uint16 = between(0, (1 << 16) - 1)
uint32 = between(0, (1 << 32) - 1)
# Of a user or group: setresuid(2) and setresgid(2) take the last number for no change, which
# would leave the payload root.
identity = between(0, (1 << 32) - 2)
uint64 = between(0, (1 << 64) - 1)
int32 = between(-(1 << 31), (1 << 31) - 1)
int64 = between(-(1 << 63), (1 << 63) - 1)


def one_of(*values: str) -> Shape:
    """A string of a closed set."""
    known = frozenset(values)

    def check(value: Any) -> None:
        if type(value) is not str:
            raise _expected("a string", value)
        if value not in known:
            raise Violation(f"must be one of {', '.join(v for v in values if v)}")

    return check


def text(rule: Callable[[str], bool], message: str) -> Shape:
    """A string that keeps a rule; message says which."""

    def check(value: Any) -> None:
        string(value)
        if not rule(value):
            raise Violation(message)

    return check


def at_most(most: int, shape: Shape) -> Shape:
    """A string of a shape with at most so many characters."""

    def check(value: Any) -> None:
        shape(value)
        if len(value) > most:
            raise Violation(f"must be at most {most} characters")

    return check


def made_of(characters: str, message: str) -> Shape:
    """A string of some characters alone, possibly empty."""
    return text(lambda value: not value.strip(characters), message)


def either(**shapes: Shape) -> Shape:
    """A value of one of several JSON types, by the Python name of the type."""
    nouns = {"str": "a string", "int": "an integer", "bool": "a boolean"}
    nouns |= {"list": "an array", "dict": "an object"}
    expected = " or ".join(nouns[kind] for kind in shapes)

    def check(value: Any) -> None:
        shape = shapes.get(type(value).__name__)
        if shape is None:
            raise _expected(expected, value)
        shape(value)

    return check


def anything(value: Any) -> None:
    """Any value."""


def array(item: Shape, least: int = 0, once: str = "", values: tuple[str, ...] = ()) -> Shape:
    """An array of items, in which no member `once` has one of `values` twice."""

    def check(value: Any) -> None:
        if type(value) is not list:
            raise _expected("an array", value)
        if len(value) < least:
            raise Violation("must not be empty")
        if once:
            seen = [member.get(once) for member in value if type(member) is dict]
            for word in seen:
                if word in values and seen.count(word) > 1:
                    raise Violation(f"must not have {word} more than once")
        index = 0
        try:
            for index, member in enumerate(value):  # noqa: B007
                item(member)
        except Violation as violation:
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
            for key, member in value.items():
                string(key)
                item(member)
        except Violation as violation:
            violation.path.append(key)
            raise

    return check


def _object(
    required: tuple[str, ...], rules: tuple[Shape, ...], members: dict[str, Shape], closed: bool
) -> Shape:
    find = members.get

    def check(value: Any) -> None:
        if type(value) is not dict:
            raise _expected("an object", value)
        for key in required:
            if key not in value:
                raise Violation("is required", key)
        for rule in rules:
            rule(value)
        key = ""
        try:
            for key, member in value.items():
                shape = find(key)
                if shape is not None:
                    shape(member)
                elif closed:
                    raise Violation("is not a known property")
        except Violation as violation:
            violation.path.append(key)
            raise

    return check


def record(required: tuple[str, ...] = (), *rules: Shape, **members: Shape) -> Shape:
    """An object with known members; unknown ones pass.

    rules are checked on the whole object, before its members.
    """
    return _object(required, rules, members, closed=False)


def closed_record(required: tuple[str, ...] = (), *rules: Shape, **members: Shape) -> Shape:
    """An object with known members and no other: a misspelt one must not be lost unseen."""
    return _object(required, rules, members, closed=True)


def needs(key: str, other: str) -> Shape:
    """A rule: where key is, other is too."""

    def rule(value: Any) -> None:
        if key in value and other not in value:
            raise Violation(f"is required with {key}", other)

    return rule


def either_member(one: str, other: str, shape: Shape) -> Shape:
    """A shape whose object has exactly one of two members."""

    def check(value: Any) -> None:
        if type(value) is dict and (one in value) == (other in value):
            raise Violation(f"must have {one} or {other}, not both")
        shape(value)

    return check


def path_or(*words: str) -> Shape:
    """One of some words, or an absolute path."""
    message = f"must be {', '.join(words)} or an absolute path"
    return text(lambda value: value[:1] == "/" or value in words, message)


_strings = array(string)

cpu_list = made_of("0123456789,- ", "must be a list such as 0-3,7")


def json_path(path: list[str | int]) -> str:
    """Return a path as text, from the outermost part on: mounts[3].options, annotations["a.b"]."""
    result = ""
    for part in path:
        if isinstance(part, int):
            result += f"[{part}]"
        elif part.isascii() and part.isidentifier():
            result += f".{part}" if result else part
        else:
            from krun.jsontext import dumps

            shown = dumps(part if len(part) <= 80 else part[:77] + "...")
            result += f"[{shown.encode(errors='backslashreplace').decode()}]"
    return result
