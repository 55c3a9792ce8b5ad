"""config.json as a whole, with its mounts and hooks."""

from __future__ import annotations

from krun.spec.kontain import EXTENSION
from krun.spec.linux import ID_MAPPINGS, LINUX
from krun.spec.process import PROCESS
from krun.spec.shapes import (
    absolute,
    array,
    between,
    boolean,
    mapping,
    name,
    needs,
    record,
    string,
    strings,
    text,
)


def _is_version(value: str) -> bool:
    numbers = value.split(".", 2)
    if len(numbers) < 3:
        return False
    major, minor, patch = numbers
    return all(n.isascii() and n.isdigit() for n in (major, minor, patch[:1]))


version = text(_is_version, "must be a version such as 1.2.0")

MOUNT = record(
    ("destination",),
    needs("uidMappings", "gidMappings"),
    needs("gidMappings", "uidMappings"),
    destination=absolute,
    type=string,
    source=string,
    options=strings,
    uidMappings=ID_MAPPINGS,
    gidMappings=ID_MAPPINGS,
)

HOOKS = array(
    record(("path",), path=absolute, args=strings, env=strings, timeout=between(1, (1 << 31) - 1))
)

SPEC = record(
    ("ociVersion", "root"),
    ociVersion=version,
    process=PROCESS,
    root=record(("path",), path=name, readonly=boolean),
    hostname=string,
    domainname=string,
    mounts=array(MOUNT),
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
    linux=LINUX,
    kontain=EXTENSION,
)
