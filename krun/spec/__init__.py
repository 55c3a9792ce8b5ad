"""parse(doc) -> Spec: check a configuration against OCI runtime-spec 1.2, naming the JSON path.

The rules are tables of shapes, one module for each document or large part of one; a document that
keeps them stays the dict it is (see krun.types), so nothing is converted and unknown properties
survive.  The tables say what spec-schema/runtime-config.schema.json says; a test holds the two
together, down to which violation comes first: an object's missing members, then its members in
the document's order.
"""

from __future__ import annotations

from krun.errors import BadSpec
from krun.spec.shapes import Violation, json_path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TypeVar

    from krun.spec.shapes import Shape
    from krun.types import Process, Resources, Spec

    Parsed = TypeVar("Parsed")


def _check(shape: Shape, document: Any, name: str) -> None:
    try:
        shape(document)
    except Violation as violation:
        raise BadSpec(json_path(violation.path[::-1]), violation.text, document=name) from None


def accept(parse: Callable[[Any], Parsed], document: Any) -> Parsed:
    """Return what parse makes of document, or of what runc and crun take it for; raises BadSpec.

    To them a member that is null is absent, and a mount's destination begins at / (config.md,
    Mounts: relative ones are deprecated).
    """
    try:
        return parse(document)
    except BadSpec as error:
        try:
            plain = _without_null(document)
        except RecursionError:
            # What is wrong is known already.
            raise error from None
        if type(plain) is dict and type(plain.get("mounts")) is list:
            plain["mounts"] = [_absolute(mount) for mount in plain["mounts"]]
        return parse(plain)


def _without_null(value: Any) -> Any:
    """Return a JSON value without the members of its objects that are null."""
    if type(value) is dict:
        return {name: _without_null(one) for name, one in value.items() if one is not None}
    return [_without_null(one) for one in value] if type(value) is list else value


def _absolute(mount: Any) -> Any:
    if type(mount) is not dict or type(mount.get("destination")) is not str:
        return mount
    return {**mount, "destination": "/" + mount["destination"].lstrip("/")}


def parse(document: Any) -> Spec:
    """Return document as a Spec; raises BadSpec that names the first violation's JSON path."""
    from krun.spec.configuration import SPEC

    _check(SPEC, document, "config.json")
    spec: Spec = document
    return spec


def parse_process(document: Any) -> Process:
    """Return document as the process of an exec (process.json); raises BadSpec."""
    from krun.spec.process import PROCESS

    _check(PROCESS, document, "process.json")
    process: Process = document
    return process


def parse_resources(document: Any) -> Resources:
    """Return document as the resources of an update (resources.json); raises BadSpec."""
    from krun.spec.linux import RESOURCES

    _check(RESOURCES, document, "resources.json")
    resources: Resources = document
    return resources


def parse_extension(document: Any, name: str = "kontain") -> dict[str, Any]:
    """Return document, a kontain object from elsewhere than config.json; raises BadSpec."""
    from krun.spec.kontain import EXTENSION

    _check(EXTENSION, document, name)
    extension: dict[str, Any] = document
    return extension


def parse_policy(document: Any, name: str = "policy.json") -> dict[str, Any]:
    """Return document, a host's policy from the file of that name; raises BadSpec."""
    from krun.spec.policy import POLICY

    _check(POLICY, document, name)
    policy: dict[str, Any] = document
    return policy
