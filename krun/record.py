"""Record: an immutable, named tuple that costs nothing to import.

`typing.NamedTuple` imports typing (11 ms on a cold two-core machine) and compiles each class with
eval; `collections.namedtuple` imports collections (3 ms).  A container's life is four to six
starts of the interpreter, so records are made here from annotations alone.
"""

from __future__ import annotations

__all__ = ["Record"]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NamedTuple as Record
else:
    from _collections import _tuplegetter

    class _RecordType(type):
        """Turn annotated class attributes into tuple fields."""

        def __new__(mcs, name, bases, body):
            annotations = body.get("__annotations__")
            if not bases or not annotations:
                return super().__new__(mcs, name, bases, {**body, "__slots__": ()})
            fields = tuple(annotations)
            defaults = {field: body[field] for field in fields if field in body}
            body["_rest"] = tuple(defaults.values())
            for index, field in enumerate(fields):
                body[field] = _tuplegetter(index, field)
            body["__slots__"] = ()
            body["_fields"] = body["__match_args__"] = fields
            body["_field_defaults"] = defaults
            return super().__new__(mcs, name, bases, body)

    class Record(tuple, metaclass=_RecordType):
        """Base of all records: `class Mount(Record): destination: str; flags: int = 0`."""

        def __new__(cls, *values, **named):
            fields = cls._fields
            if len(values) != len(fields):
                given = len(values)
                if given > len(fields):
                    raise TypeError(f"{cls.__name__} takes {len(fields)} values, {given} given")
                # The usual call; the loop below takes half as long again.
                if not named and given + len(cls._rest) >= len(fields):
                    return tuple.__new__(cls, values + cls._rest[given - len(fields) :])
                defaults = cls._field_defaults
                rest = []
                for field in fields[given:]:
                    if field in named:
                        rest.append(named.pop(field))
                    elif field in defaults:
                        rest.append(defaults[field])
                    else:
                        raise TypeError(f"{cls.__name__}: {field} is missing")
                values += tuple(rest)
            if named:
                raise TypeError(f"{cls.__name__}: no field {next(iter(named))!r}, or given twice")
            return tuple.__new__(cls, values)

        def _replace(self, **changes):
            """Return a copy with some fields changed."""
            fields = self._fields
            unknown = set(changes).difference(fields)
            if unknown:
                raise ValueError(f"{type(self).__name__} has no field {sorted(unknown)[0]!r}")
            return type(self)(*[changes.get(f, v) for f, v in zip(fields, self, strict=True)])

        def _asdict(self):
            """Return the fields as a dict, in order."""
            return dict(zip(self._fields, self, strict=True))

        def __getnewargs__(self):
            return tuple(self)

        def __repr__(self):
            pairs = ", ".join(f"{f}={v!r}" for f, v in zip(self._fields, self, strict=True))
            return f"{type(self).__name__}({pairs})"
