"""Read manifests from files and directories, YAML or JSON; sole importer of ruamel.yaml."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from krun.errors import KrunError

_SUFFIXES = (".yaml", ".yml", ".json")
# More than any manifest of caches; keeps a wrong file from filling memory.
_LIMIT = 64 << 20


def load(paths: Sequence[str]) -> list[tuple[str, list[Any]]]:
    """Return the documents of each file; a directory gives its *.yaml, *.yml and *.json.

    "-" is standard input.  Raises KrunError that names file and line.
    """
    found: list[tuple[str, list[Any]]] = []
    for path in paths:
        if path != "-" and os.path.isdir(path):
            names = sorted(name for name in os.listdir(path) if name.endswith(_SUFFIXES))
            if not names:
                raise KrunError(f"{path}: no *.yaml, *.yml or *.json in it")
            found += [(f"{path}/{name}", _read(f"{path}/{name}")) for name in names]
        else:
            found.append((path, _read(path)))
    return found


def _read(path: str) -> list[Any]:
    if path == "-":
        data = sys.stdin.buffer.read(_LIMIT + 1)
    else:
        with open(path, "rb") as file:
            data = file.read(_LIMIT + 1)
    if len(data) > _LIMIT:
        raise KrunError(f"{path}: larger than 64 MiB, that is no manifest")
    documents = parse(data, path)
    if not documents:
        raise KrunError(f"{path}: there is no object in it")
    return documents


def parse(data: bytes, path: str) -> list[Any]:
    """Return the documents of a text that are not empty."""
    if path.endswith(".json"):
        try:
            return [json.loads(data)]
        except (ValueError, RecursionError) as error:
            raise KrunError(f"{path}: is not JSON: {error}") from None
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise KrunError(f"{path}: is not UTF-8 at byte {error.start}") from None
    # Aliases that unfold a hundred million times are a known attack on YAML readers.
    if text.count("*") > 10_000 and text.count("&") > 5:
        raise KrunError(f"{path}: too many aliases")
    reader = YAML(typ="safe", pure=True)
    try:
        documents = list(reader.load_all(io.StringIO(text)))
    except (YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise KrunError(f"{path}: is not YAML{where}: {problem}") from None
    return [document for document in documents if document is not None]


def dump(document: Any) -> str:
    """Return a document as YAML."""
    from ruamel.yaml import YAML

    writer = YAML()
    writer.default_flow_style = False
    text = io.StringIO()
    writer.dump(document, text)
    return text.getvalue()
