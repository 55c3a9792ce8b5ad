"""What podman, docker, containerd and CRI-O are told: text of their configuration to text; pure.

The sole importer of tomlkit, which keeps the comments and the order of a TOML file.
"""

from __future__ import annotations

import json
import re
import tomllib
from typing import Any

from krun.errors import KrunError
from krun.install.launcher import fill, template

# What podman 4.3's own containers.conf lists, where no file says otherwise.
PODMAN_LISTS = {
    "runtime_supports_json": ("crun", "runc", "kata", "runsc", "youki", "krun"),
    "runtime_supports_kvm": ("kata", "krun"),
    "runtime_supports_nocgroups": ("crun", "krun"),
}
# containerd's CRI plugin, by the version of its configuration.
_CRI = {
    1: ("plugins", "cri"),
    2: ("plugins", "io.containerd.grpc.v1.cri"),
    3: ("plugins", "io.containerd.cri.v1.runtime"),
}


def _toml(value: object) -> str:
    """Return a TOML value: JSON's strings and arrays of strings are TOML's, too."""
    return json.dumps(value, ensure_ascii=False)


def podman_lists(texts: dict[str, str]) -> dict[str, tuple[str, ...]]:
    """Return the lists in force: `texts` are the files by name, in podman's order of reading.

    Raises KrunError for a file that is no TOML.
    """
    lists = dict(PODMAN_LISTS)
    for name, text in texts.items():
        try:
            table = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise KrunError(f"{name}: {error}", "podman cannot read it either") from None
        for key in PODMAN_LISTS:
            value = _at(table, ("engine",)).get(key)
            if isinstance(value, list):
                lists[key] = tuple(str(item) for item in value)
    return lists


def podman(runtimes: dict[str, str], lists: dict[str, tuple[str, ...]]) -> str:
    """Return the drop-in for containers.conf.d."""

    def extended(key: str) -> str:
        return _toml(list(dict.fromkeys([*lists[key], *runtimes])))

    return fill(
        template("containers.conf.in"),
        {
            "JSON": extended("runtime_supports_json"),
            "KVM": extended("runtime_supports_kvm"),
            "NOCGROUPS": extended("runtime_supports_nocgroups"),
            "RUNTIMES": "\n".join(
                f"{_toml(name)} = {_toml([path])}" for name, path in runtimes.items()
            ),
        },
    )


def crio(runtimes: dict[str, str]) -> str:
    """Return the drop-in for crio.conf.d."""
    text = template("crio.conf.in")
    parts = [fill(text, {"NAME": name, "PATH": path}) for name, path in runtimes.items()]
    return "\n".join(parts)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name is given twice")
    return table


def _read_json(text: str, name: str) -> dict[str, Any]:
    try:
        document = json.loads(text, object_pairs_hook=_unique) if text.strip() else {}
    except ValueError as error:
        raise KrunError(f"{name}: {error}", "repair it; krun leaves it as it is") from None
    if isinstance(document, dict) and document.get("runtimes", {}) is None:
        # Which dockerd takes for none.
        document["runtimes"] = {}
    if not isinstance(document, dict) or not isinstance(document.get("runtimes", {}), dict):
        raise KrunError(f"{name}: is not a configuration of dockerd", "krun leaves it as it is")
    return document


def _write_json(document: dict[str, Any], like: str) -> str:
    found = re.search(r'^([ \t]+)"', like, re.MULTILINE)
    return json.dumps(document, indent=found[1] if found else 4, ensure_ascii=False) + "\n"


def _claimed(name: str, runtime: str, other: object) -> KrunError:
    return KrunError(
        f"{name}: the runtime {runtime} is there already: {json.dumps(other)}",
        "choose another with --name, or remove that one",
    )


def docker(text: str, runtimes: dict[str, str], name: str) -> str:
    """Return daemon.json with the runtimes; the text itself where they are there.

    Raises KrunError for a file that is not dockerd's, or that has another runtime of the name.
    """
    document = _read_json(text, name)
    table = document.setdefault("runtimes", {})
    missing = False
    for runtime, path in runtimes.items():
        entry = table.get(runtime)
        if entry is None:
            table[runtime] = {"path": path}
            missing = True
        elif not isinstance(entry, dict) or entry.get("path") != path:
            raise _claimed(name, runtime, entry)
    return _write_json(document, text) if missing else text


def docker_without(text: str, runtimes: tuple[str, ...], name: str) -> str:
    """Return daemon.json without the runtimes; raises KrunError."""
    document = _read_json(text, name)
    table = document.get("runtimes", {})
    for runtime in runtimes:
        table.pop(runtime, None)
    if not table:
        document.pop("runtimes", None)
    return _write_json(document, text)


def _read_toml(text: str, name: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise KrunError(f"{name}: {error}", "repair it; krun leaves it as it is") from None


def _containerd_path(table: dict[str, Any], name: str) -> tuple[str, ...]:
    version = table.get("version", 1)
    if not isinstance(version, int) or version not in _CRI:
        raise KrunError(
            f"{name}: version {version!r} is not known to krun",
            "add the table of packaging/containerd.toml.in by hand",
        )
    return (*_CRI[version], "containerd", "runtimes")


def _at(table: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    """Return a nested table, an empty one where it is not there, or is no table."""
    for key in path:
        found = table.get(key)
        table = found if isinstance(found, dict) else {}
    return table


def _uneditable(name: str) -> KrunError:
    return KrunError(
        f"{name}: its layout cannot be edited safely",
        "add or remove the runtime's table by hand, see packaging/containerd.toml.in",
    )


def _checked(document: Any, wanted: dict[str, Any], name: str) -> str:
    """Return the text of an edited document; raises KrunError unless it says what is wanted."""
    import tomlkit

    text = tomlkit.dumps(document)
    try:
        same = tomllib.loads(text) == wanted
    except tomllib.TOMLDecodeError:
        same = False
    if not same:
        raise _uneditable(name)
    return text


def containerd(text: str, runtimes: dict[str, str], name: str) -> str:
    """Return config.toml with the runtimes; the text itself where they are there.

    A runtime takes over runc's SystemdCgroup, which has to agree with the kubelet's cgroup driver.
    The first table of runtimes replaces containerd's own, so runc is put into it.
    Raises KrunError for a file that is no TOML, or that has another runtime of the name.
    """
    import copy

    import tomlkit

    text = text if text.strip() else "version = 2\n"
    table = _read_toml(text, name)
    path = _containerd_path(table, name)
    present = _at(table, path)
    systemd = (_at(present, ("runc", "options"))).get("SystemdCgroup")
    tables: dict[str, Any] = {}
    for runtime, launcher in runtimes.items():
        entry = present.get(runtime)
        if entry is not None:
            if _at(entry, ("options",)).get("BinaryName") != launcher:
                raise _claimed(name, runtime, entry)
            continue
        new = tomlkit.parse(fill(template("containerd.toml.in"), {"PATH": launcher}))
        if systemd is not None:
            new["options"]["SystemdCgroup"] = systemd
        tables[runtime] = new
    if not tables:
        return text
    if "runc" not in present:
        tables["runc"] = tomlkit.parse('runtime_type = "io.containerd.runc.v2"\n')
    document = tomlkit.parse(text)
    wanted = copy.deepcopy(table)
    try:
        for runtime, new in tables.items():
            _add(document, wanted, path, runtime, new)
    except (ValueError, TypeError, AttributeError):
        # An inline table, or something else where a table should be.
        raise _uneditable(name) from None
    return _checked(document, wanted, name)


def _add(place: Any, wanted: Any, path: tuple[str, ...], runtime: str, new: Any) -> None:
    """Put the table `new` into a document, and into the plain tables that it should read as."""
    import tomlkit

    for key in path:
        if key not in place:
            place.add(key, tomlkit.table(is_super_table=True))
        place = place[key]
        wanted = wanted.setdefault(key, {})
    added = tomlkit.table()
    for key, value in new.items():
        added.add(key, value)
    place.add(runtime, added)
    wanted[runtime] = tomllib.loads(tomlkit.dumps(new))


def containerd_without(text: str, runtimes: tuple[str, ...], name: str) -> str:
    """Return config.toml without the runtimes; raises KrunError."""
    import tomlkit

    table = _read_toml(text, name)
    path = _containerd_path(table, name)
    document = tomlkit.parse(text)
    place: Any = document
    for key in path:
        if not isinstance(place, dict) or key not in place:
            return text
        place = place[key]
    for runtime in runtimes:
        if runtime in place:
            del place[runtime]
            del _at(table, path)[runtime]
    # The blank line before the removed table stays behind.
    return tomlkit.dumps(document).rstrip("\n") + "\n"
