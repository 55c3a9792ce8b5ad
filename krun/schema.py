"""explain(doc) -> list[str]: every violation of a JSON Schema of spec-schema/, named by JSON path.

Slow (jsonschema takes 70 ms to import) and thorough, where krun.spec is fast and stops at the
first; both say the same about the same document, in the same words.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator, ValidationError, validators
from referencing import Registry
from referencing.jsonschema import DRAFT202012

from krun import jsontext
from krun.spec.shapes import json_path, type_name

DIRECTORY = Path(__file__).parent / "schemas"
RUNTIME_CONFIG = "runtime-config"
EXTENSION = "config-kontain"
POLICY = "policy"
STATE = "state"
STORED_STATE = "stored-state"

_NOUNS = {
    "array": "an array",
    "boolean": "a boolean",
    "integer": "an integer",
    "number": "a number",
    "object": "an object",
    "string": "a string",
}


def load(name: str) -> dict[str, Any]:
    """Return the schema of that name; raises OSError."""
    schema: dict[str, Any] = jsontext.loads((DIRECTORY / f"{name}.schema.json").read_bytes())
    return schema


def names() -> list[str]:
    """Return the names of all schemas, sorted."""
    return sorted(
        path.name.removesuffix(".schema.json") for path in DIRECTORY.glob("*.schema.json")
    )


@functools.cache
def _registry() -> Registry[Any]:
    # A member `$schema` would make jsonschema go on with its own validator behind a $ref.
    schemas = [
        {key: value for key, value in load(name).items() if key != "$schema"} for name in names()
    ]
    return Registry().with_resources(
        (schema["$id"], DRAFT202012.create_resource(schema)) for schema in schemas
    )


def plain_validator(name: str) -> Draft202012Validator:
    """Return the validator of a schema with JSON Schema's own rules and nothing else."""
    return Draft202012Validator(load(name), registry=_registry())


def _is_integer(_checker: object, value: object) -> bool:
    """Integers are those of Go and C readers: 1.0 and 1e3 are none, though JSON Schema's are."""
    return type(value) is int


# jsonschema names the object where a member is missing or too many; these name the member.


def _required(_v: Any, required: list[str], value: Any, _s: Any) -> Iterator[ValidationError]:
    if isinstance(value, dict):
        for key in required:
            if key not in value:
                yield ValidationError("is required", path=[key])


def _dependent_required(
    _v: Any, dependencies: dict[str, list[str]], value: Any, _s: Any
) -> Iterator[ValidationError]:
    if isinstance(value, dict):
        for key, others in dependencies.items():
            for other in others:
                if key in value and other not in value:
                    yield ValidationError(f"is required with {key}", path=[other])


def _additional_properties(
    validator: Any, allowed: Any, value: Any, schema: dict[str, Any]
) -> Iterator[ValidationError]:
    if not isinstance(value, dict):
        return
    for key in value:
        if key in schema.get("properties", {}):
            continue
        if allowed is False:
            yield ValidationError("is not a known property", path=[key])
        else:
            yield from validator.descend(value[key], allowed, path=key)


def _property_names(validator: Any, names: Any, value: Any, _s: Any) -> Iterator[ValidationError]:
    if isinstance(value, dict):
        for key in value:
            yield from validator.descend(key, names, path=key)


_Validator = validators.extend(  # type: ignore[no-untyped-call]
    Draft202012Validator,
    {
        "required": _required,
        "dependentRequired": _dependent_required,
        "additionalProperties": _additional_properties,
        "propertyNames": _property_names,
    },
    type_checker=Draft202012Validator.TYPE_CHECKER.redefine("integer", _is_integer),
)


def _message(error: ValidationError) -> str:
    """Say what is wrong in krun.spec's words."""
    rule: Any = error.validator_value
    schema: Any = error.schema
    match error.validator:
        case "type":
            kinds = [rule] if isinstance(rule, str) else rule
            wanted = " or ".join(_NOUNS[kind] for kind in kinds)
            return f"must be {wanted}, is {type_name(error.instance)}"
        case "enum":
            if isinstance(rule[0], str) and not isinstance(error.instance, str):
                return f"must be a string, is {type_name(error.instance)}"
            return f"must be one of {', '.join(str(value) for value in rule if value)}"
        case "minimum" | "maximum":
            return f"must be {schema['minimum']} to {schema['maximum']}"
        case "minItems" | "minLength":
            return "must not be empty"
        case "maxContains":
            (member,) = schema["contains"]["properties"].values()
            return f"must not have {member['const']} more than once"
        case "required" | "dependentRequired" | "additionalProperties":
            return error.message
        case _ if "x-error" in schema:
            return str(schema["x-error"])
    return error.message


def _in_document_order(document: Any, errors: list[ValidationError]) -> list[ValidationError]:
    """Sort as krun.spec meets them: what an object lacks first, then the document's order."""
    positions: dict[int, dict[Any, int]] = {}

    def place(error: ValidationError) -> list[int]:
        value = document
        places = []
        for part in error.absolute_path:
            if isinstance(part, int):
                places.append(part)
            else:
                order = positions.setdefault(id(value), {})
                if not order:
                    order.update((key, index) for index, key in enumerate(value))
                places.append(order.get(part, -1))
            if places[-1] == -1:
                break
            value = value[part]
        return places

    return sorted(errors, key=place)


def violations(document: Any, name: str = RUNTIME_CONFIG) -> list[tuple[str, str]]:
    """Return (JSON path, message) of every violation of the schema of that name, in order."""
    validator = _Validator(load(name), registry=_registry())
    errors = _in_document_order(document, list(validator.iter_errors(document)))
    found = [(json_path(list(error.absolute_path)), _message(error)) for error in errors]
    return list(dict.fromkeys(found))


def explain(document: Any, name: str = RUNTIME_CONFIG) -> list[str]:
    """Return "path: message" for every violation, in the document's order; [] where it is valid."""
    return [f"{path}: {text}" if path else text for path, text in violations(document, name)]
