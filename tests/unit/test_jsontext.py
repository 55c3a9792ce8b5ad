from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from krun import jsontext

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=("Cs",))),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(VALUES)
def test_reads_and_writes_what_the_json_package_does(value: object) -> None:
    assert jsontext.loads(json.dumps(value)) == value
    assert json.loads(jsontext.dumps(value)) == value
    assert json.loads(jsontext.dumps(value, indent="  ")) == value
    assert jsontext.loads(jsontext.dumps(value).encode()) == value


@given(st.text() | st.binary())
def test_anything_else_is_a_value_error(data: str | bytes) -> None:
    try:
        value = jsontext.loads(data)
    except ValueError:
        return
    assert value == json.loads(data)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "empty, a JSON value was expected"),
        ('{"a":', "ends too early at line 1 column 6"),
        ('{"a" 1}', "expecting ':' delimiter at line 1 column 6"),
        ('{"a":1,\n "b": tru}', "expecting value at line 2 column 7"),
        ("[1] x", "text after the value at line 1 column 5"),
        ('{"a":NaN}', "NaN is not JSON"),
        ('{"a": "b', "a string without an end at line 1 column 7"),
        ('{"a": ' + "9" * 5000 + "}", "an integer is too long"),
        ("[" * 100_000, "nested too deeply"),
        (b"\xff", "not UTF-8 at byte 0"),
    ],
)
def test_says_what_is_wrong_and_where(text: str | bytes, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        jsontext.loads(text)
    assert str(caught.value) == message


def test_refuses_what_has_no_json_form() -> None:
    with pytest.raises(TypeError, match="set has no JSON form"):
        jsontext.dumps({"a": {1}})
