"""Write the reference pages of docs/ from the JSON Schemas of spec-schema/."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from krun import schema

DOCS = Path(__file__).parent

EXTENSION_TEXT = """\
# The kontain extension

How krun runs a container is told by an object `kontain` at the top of the bundle's `config.json`:

```json
{
  "ociVersion": "1.2.0",
  "process": { "cwd": "/", "args": ["/app"] },
  "root": { "path": "rootfs" },
  "kontain": { "monitor": "km", "km": { "overcommitMemory": true, "coredump": "/cores/core" } }
}
```

Everything in it may be left out. The host's [policy](policy.md) gives the defaults, and
says what a bundle may change; a container that asks for more is refused.

## Annotations

podman, docker and Kubernetes write `config.json` themselves and leave no room for the object, so
the same properties are read from annotations, which come after the object:

```console
$ podman --runtime krun run --annotation app.kontain.km.overcommit-memory=true \\
    --annotation app.kontain.km.coredump=/cores/core docker.io/library/busybox uname -r
```

```yaml
apiVersion: v1
kind: Pod
metadata:
  name: app
  annotations:
    app.kontain.km.overcommit-memory: "true"
    app.kontain.km.copyenv: '["SECRET_", "TOKEN"]'
spec:
  runtimeClassName: kontain
  containers:
  - name: app
    image: registry.example.com/app:1
```

A pod's annotations count for each of its containers. containerd hands on those that its runtime
table lists, `pod_annotations = ["app.kontain.*"]`; CRI-O hands on all. docker has `--annotation`
from version 24 on.

| property | in an annotation |
|---|---|
| boolean | `true` or `false` |
| integer, string | as it is |
| array of strings | JSON, or the strings with blanks between them |
| object, other array | JSON |

An annotation `app.kontain.*` that is not listed below, or whose value is wrong, is an error. Two
more are not properties: `app.kontain.version=1` marks a container for `mode` `label`, and
`app.kontain.state` is where krun keeps what `exec` needs; a value from outside is dropped.

`krun validate --bundle B` names every mistake in the object and in the annotations, and
`krun translate --bundle B` prints what will run. [Networks](network.md) tells what `network` is
for.
"""

POLICY_TEXT = """\
# The policy file, property by property

[Policy](policy.md) tells what the file is for and shows one. It is `/etc/krun/policy.json`, or
the same as TOML in `/etc/krun/policy.toml`. A property that is unknown or has a wrong value is an
error: no container starts before it is mended, so that a misspelt rule is never silently absent.
"""


def resolve(node: dict[str, Any], document: dict[str, Any]) -> dict[str, Any]:
    """Return node with what its $ref names filled in; its own members win."""
    while "$ref" in node:
        reference: str = node["$ref"]
        file, _, pointer = reference.partition("#")
        document = schema.load(file.removesuffix(".schema.json")) if file else document
        target: Any = document
        for part in filter(None, pointer.split("/")):
            target = target[part]
        node = {**target, **{key: value for key, value in node.items() if key != "$ref"}}
    return node


def code(value: Any) -> str:
    """Return value as it stands in a configuration; `|` would end a table's cell."""
    text = value if isinstance(value, str) else json.dumps(value)
    return f"`{text}`".replace("|", "\\|")


def kind(node: dict[str, Any], document: dict[str, Any]) -> str:
    """Say in words what values node takes."""
    if "enum" in node:
        return ", ".join(code(value) for value in node["enum"])
    error: str = node.get("x-error", "")
    kinds = node["type"] if isinstance(node["type"], list) else [node["type"]]
    words = []
    for name in kinds:
        if name == "array" and "items" in node:
            item = resolve(node["items"], document)
            inner = "objects" if item.get("type") == "object" else "strings"
            words.append(f"array of {inner}" if "enum" not in item else "array")
        elif name == "integer" and node["maximum"] < 1 << 62:
            words.append(f"integer, {node['minimum']} to {node['maximum']}")
        elif name == "string" and error.startswith("must be "):
            rule = error.removeprefix("must be ")
            words.append("absolute path" if rule.startswith(("absolute", "at most")) else rule)
        else:
            words.append(name)
    return "; ".join(words)


def table(
    properties: dict[str, Any], document: dict[str, Any], columns: dict[str, str]
) -> Iterator[str]:
    """Yield a table of properties, then what each of them means."""
    yield "| " + " | ".join(["property", "values", "default", *columns.values()]) + " |"
    yield "|---" * (3 + len(columns)) + "|"
    nodes = {name: resolve(node, document) for name, node in properties.items() if name[0] != "$"}
    for name, node in nodes.items():
        default = code(node["default"]) if "default" in node else ""
        cells = [code(node[key]) if key in node else "" for key in columns]
        yield "| " + " | ".join([code(name), kind(node, document), default, *cells]) + " |"
    yield ""
    for name, node in nodes.items():
        text = f"**{code(name)}**: {node.get('description') or node['title'] + '.'}"
        if "items" in node:
            values = resolve(node["items"], document).get("enum")
            text += f" Values: {', '.join(code(value) for value in values)}." if values else ""
        if "examples" in node:
            text += " Example: " + ", ".join(code(example) for example in node["examples"]) + "."
        yield text.replace("\\|", "|")
        yield ""


def section(
    title: str, path: list[str], document: dict[str, Any], columns: dict[str, str]
) -> Iterator[str]:
    """Yield a section on the object at path."""
    node = document
    for name in path:
        node = resolve(node["properties"][name] if name != "[]" else node["items"], document)
    yield f"## {title}"
    yield ""
    if title != "Properties":
        yield node.get("description", "What one interface of the container is.")
        yield ""
    yield from table(node["properties"], document, columns)


def extension() -> str:
    """Return docs/extension.md."""
    document = schema.load(schema.EXTENSION)
    columns = {"x-annotation": "annotation"}
    flags = {"x-annotation": "annotation", "x-km-option": "option of km"}
    network = schema.load("network")
    lines = [
        EXTENSION_TEXT,
        *section("Properties", [], document, columns),
        *section("`km`", ["km"], document, flags),
        *section("`km.gdb`", ["km", "gdb"], document, {"x-km-option": "option of km"}),
        *section("Members of `directInvocation`", ["directInvocation", "[]"], document, {}),
        *section("`network`", [], network, {}),
        *section("Members of `network.interfaces`", ["interfaces", "[]"], network, {}),
        *section("`images`", ["images"], document, {}),
    ]
    return "\n".join(lines).rstrip() + "\n"


def policy() -> str:
    """Return docs/policy-file.md."""
    document = schema.load(schema.POLICY)
    lines = [
        POLICY_TEXT,
        *section("Properties", [], document, {}),
        *section("`defaults`", ["defaults"], document, {}),
        *section("`paths`", ["paths"], document, {}),
        *section("Members of `directInvocation`", ["directInvocation", "[]"], document, {}),
        *section("`allow`", ["allow"], document, {}),
    ]
    return "\n".join(lines).rstrip() + "\n"


PAGES = {"extension.md": extension, "policy-file.md": policy}


def main() -> int:
    """Write every page."""
    for name, page in PAGES.items():
        (DOCS / name).write_text(page())
        print(DOCS / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
