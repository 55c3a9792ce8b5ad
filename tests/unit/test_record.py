from __future__ import annotations

import pickle

import pytest

from krun.record import Record


class Point(Record):
    x: int
    y: int = 2


class Box(Record):
    x: int
    y: int = 2
    z: int = 3


def test_fields_defaults_and_repr() -> None:
    point = Point(1)
    assert point == (1, 2)
    assert (point.x, point.y) == (1, 2)
    assert repr(point) == "Point(x=1, y=2)"
    assert point._asdict() == {"x": 1, "y": 2}
    assert Point(y=5, x=4) == (4, 5)


def test_values_by_place_leave_the_last_defaults() -> None:
    assert Box(1) == (1, 2, 3)
    assert Box(1, 5) == (1, 5, 3)
    assert Box(1, z=5) == (1, 2, 5)


def test_replace_makes_a_copy() -> None:
    point = Point(1)
    assert point._replace(y=9) == Point(1, 9)
    assert point.y == 2
    with pytest.raises(ValueError, match="no field 'z'"):
        point._replace(z=1)


@pytest.mark.parametrize(
    "values, named", [((), {}), ((1, 2, 3), {}), ((1,), {"z": 1}), ((1, 2), {"y": 3})]
)
def test_wrong_values_are_refused(values: tuple[int, ...], named: dict[str, int]) -> None:
    with pytest.raises(TypeError):
        Point(*values, **named)


def test_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        Point(1).x = 3  # type: ignore[misc]


def test_pickles() -> None:
    assert pickle.loads(pickle.dumps(Point(3))) == Point(3)
