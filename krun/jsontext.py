"""JSON through the C scanner and encoder of CPython, without the `json` package.

`import json` brings in re and enum (6 ms); the scanner alone costs half a millisecond.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any


class _Context:
    """What the C scanner reads its options from."""

    strict = True
    object_hook = None
    object_pairs_hook = None
    parse_float = float
    parse_int = int
    memo: dict[str, str] = {}

    @staticmethod
    def parse_constant(name: str) -> Any:
        raise ValueError(f"{name} is not JSON")


def _scanner() -> Callable[[str, int], tuple[Any, int]]:
    import _json

    scan: Callable[[str, int], tuple[Any, int]] = _json.make_scanner(_Context())  # type: ignore[arg-type]
    return scan


def _where(text: str, position: int) -> str:
    line = text.count("\n", 0, position) + 1
    column = position - text.rfind("\n", 0, position)
    return f"line {line} column {column}"


def _skip_space(text: str, position: int) -> int:
    size = len(text)
    while position < size and text[position] in " \t\n\r":
        position += 1
    return position


def loads(data: str | bytes) -> Any:
    """Return the value of a JSON text (RFC 8259); bytes must be UTF-8.

    Raises ValueError that names line and column.
    """
    if isinstance(data, bytes):
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"not UTF-8 at byte {error.start}") from None
    else:
        text = data
    start = _skip_space(text, 0)
    if start == len(text):
        raise ValueError("empty, a JSON value was expected")
    try:
        value, end = _scanner()(text, start)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except (StopIteration, SystemError, ValueError):
        raise ValueError(_explain(text)) from None
    end = _skip_space(text, end)
    if end != len(text):
        raise ValueError(f"text after the value at {_where(text, end)}")
    return value


def _explain(text: str) -> str:
    """Return what is wrong with text.

    The C scanner finds its error class only where json.decoder is imported already, so the
    package is loaded to say it: a failed start may take its time.
    """
    from json import JSONDecodeError, JSONDecoder

    try:
        JSONDecoder(parse_constant=_Context.parse_constant).decode(text)
    except JSONDecodeError as error:
        if error.pos >= len(text.rstrip()):
            return f"ends too early at {_where(text, error.pos)}"
        if error.msg.startswith("Unterminated string"):
            return f"a string without an end at {_where(text, error.pos)}"
        return f"{error.msg[:1].lower()}{error.msg[1:]} at {_where(text, error.pos)}"
    except ValueError as error:
        # CPython's limit of 4,300 digits says how Python programs raise it.
        return str(error) if str(error).endswith("is not JSON") else "an integer is too long"
    return "not JSON"


def _refuse(value: object) -> Any:
    raise TypeError(f"{type(value).__name__} has no JSON form")


def dumps(value: Any, indent: str = "", sort: bool = False) -> str:
    """Return the JSON text of value; with indent, one member a line."""
    if indent:
        return _pretty(value, indent, "\n", sort)
    import _json

    encode = _json.make_encoder(
        {}, _refuse, _json.encode_basestring, None, ":", ",", sort, False, False
    )
    return "".join(encode(value, 0))


def _pretty(value: Any, indent: str, newline: str, sort: bool) -> str:
    inner = newline + indent
    if isinstance(value, dict) and value:
        keys = sorted(value) if sort else value
        body = ("," + inner).join(
            f"{dumps(key)}: {_pretty(value[key], indent, inner, sort)}" for key in keys
        )
        return f"{{{inner}{body}{newline}}}"
    if isinstance(value, list | tuple) and value:
        body = ("," + inner).join(_pretty(item, indent, inner, sort) for item in value)
        return f"[{inner}{body}{newline}]"
    return dumps(value)
