"""load() -> Policy: what the host's owner allows, from /etc/krun/policy.json or policy.toml.

A bundle and its annotations can choose within the policy, and tighten it; they never loosen it.
"""

from __future__ import annotations

import os

from krun import host, jsontext
from krun.errors import BadSpec, KrunError
from krun.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

DIRECTORY = "/etc/krun"
# The allow list of the original krun: lines of regex:path:sha256.
ORIGINAL_LIST = "/var/lib/krun/config"

# What files of unmapped owners show in a user namespace (user_namespaces(7)).
OVERFLOW_UID = 65534

MONITORS = ("auto", "km", "builtin", "none")
ENGINES = ("auto", "crun", "native")


class Direct(Record):
    """One program that may run without a VM.

    `path` or `pattern` (a regular expression for the whole of it) is the program as asked for,
    `target` the file that runs instead (the same, when empty), `sha256` the file's digest.
    """

    path: str
    pattern: str
    target: str
    sha256: str
    trust_image_libraries: bool = False


class Policy(Record):
    """The host's rules; the defaults are those of a host without a policy file."""

    engine: str = "auto"
    monitor: str = "auto"
    init: str = "auto"
    mode: str = "all"
    sandbox: str = "vm"
    exec_outside_vm: bool = True
    crun: str = ""
    km_path: str = ""
    init_path: str = ""
    km: dict[str, Any] = {}
    direct: tuple[Direct, ...] = ()
    allow: dict[str, Any] = {}
    images: dict[str, Any] = {}
    source: str = ""


class _Reader:
    """Typed access to the policy document; names file and JSON path in errors."""

    def __init__(self, name: str) -> None:
        self.name = name

    def bad(self, path: str, text: str) -> BadSpec:
        return BadSpec(path, text, document=self.name)

    def take(self, table: dict[str, Any], path: str, known: tuple[str, ...]) -> None:
        """Refuse unknown keys: a misspelt rule must not be silently absent."""
        if not isinstance(table, dict):
            raise self.bad(path, "must be an object")
        for key in table:
            if key not in known:
                where = f"{path}.{key}" if path else key
                raise self.bad(where, f"is not known here; known: {', '.join(known)}")

    def text(self, table: dict[str, Any], path: str, key: str, values: tuple[str, ...] = ()) -> str:
        """Return a string member, an empty one when absent."""
        value = table.get(key, "")
        where = f"{path}.{key}" if path else key
        if not isinstance(value, str):
            raise self.bad(where, "must be a string")
        if values and key in table and value not in values:
            raise self.bad(where, f"must be one of {', '.join(values)}")
        return value

    def absolute(self, table: dict[str, Any], path: str, key: str) -> str:
        """Return an absolute path, an empty string when absent."""
        value = self.text(table, path, key)
        if key in table and not value.startswith("/"):
            raise self.bad(f"{path}.{key}" if path else key, "must be absolute")
        return value

    def boolean(self, table: dict[str, Any], path: str, key: str, default: bool) -> bool:
        """Return a boolean member."""
        value = table.get(key, default)
        if not isinstance(value, bool):
            raise self.bad(f"{path}.{key}" if path else key, "must be a boolean")
        return value

    def table(self, table: dict[str, Any], path: str, key: str) -> dict[str, Any]:
        """Return an object member, an empty one when absent."""
        value = table.get(key, {})
        if not isinstance(value, dict):
            raise self.bad(f"{path}.{key}" if path else key, "must be an object")
        return value


def _direct(reader: _Reader, value: Any, path: str) -> Direct:
    reader.take(value, path, ("path", "pattern", "target", "sha256", "trustImageLibraries"))
    entry = Direct(
        reader.absolute(value, path, "path"),
        reader.text(value, path, "pattern"),
        reader.absolute(value, path, "target"),
        reader.text(value, path, "sha256").lower(),
        reader.boolean(value, path, "trustImageLibraries", False),
    )
    if bool(entry.path) == bool(entry.pattern):
        raise reader.bad(path, "needs either path or pattern")
    if entry.pattern and not entry.target:
        raise reader.bad(f"{path}.target", "is required with pattern")
    if len(entry.sha256) != 64 or entry.sha256.strip("0123456789abcdef"):
        raise reader.bad(f"{path}.sha256", "must be 64 hexadecimal digits")
    if entry.pattern:
        import re

        try:
            re.compile(entry.pattern)
        except re.error as error:
            raise reader.bad(f"{path}.pattern", f"is no regular expression: {error}") from error
    return entry


def parse(document: Any, name: str) -> Policy:
    """Return the policy of a parsed file; raises BadSpec that names the file and JSON path."""
    reader = _Reader(name)
    top = ("defaults", "paths", "directInvocation", "allow", "images")
    reader.take(document, "", (*top, "$schema"))
    defaults = reader.table(document, "", "defaults")
    reader.take(
        defaults,
        "defaults",
        ("engine", "monitor", "init", "mode", "sandbox", "execOutsideVM", "km"),
    )
    paths = reader.table(document, "", "paths")
    reader.take(paths, "paths", ("crun", "km", "init"))
    allow = reader.table(document, "", "allow")
    reader.take(
        allow,
        "allow",
        (
            "annotations",
            "extension",
            "monitor",
            "engine",
            "km",
            "init",
            "monitorPaths",
            "extraArgs",
            "gdb",
            "network",
        ),
    )
    entries = document.get("directInvocation", [])
    if not isinstance(entries, list):
        raise reader.bad("directInvocation", "must be an array")
    init = reader.text(defaults, "defaults", "init") or "auto"
    if init not in ("auto", "none") and not init.startswith("/"):
        raise reader.bad("defaults.init", "must be auto, none or an absolute path")
    base = Policy()
    return Policy(
        engine=reader.text(defaults, "defaults", "engine", ENGINES) or base.engine,
        monitor=reader.text(defaults, "defaults", "monitor", MONITORS) or base.monitor,
        init=init,
        mode=reader.text(defaults, "defaults", "mode", ("all", "label")) or base.mode,
        sandbox=reader.text(defaults, "defaults", "sandbox", ("vm", "native")) or base.sandbox,
        exec_outside_vm=reader.boolean(defaults, "defaults", "execOutsideVM", True),
        crun=reader.absolute(paths, "paths", "crun"),
        km_path=reader.absolute(paths, "paths", "km"),
        init_path=reader.absolute(paths, "paths", "init") or (init if init[0] == "/" else ""),
        km=reader.table(defaults, "defaults", "km"),
        direct=tuple(
            _direct(reader, entry, f"directInvocation[{index}]")
            for index, entry in enumerate(entries)
        ),
        allow=allow,
        images=reader.table(document, "", "images"),
        source=name,
    )


def parse_original(text: str, name: str) -> tuple[Direct, ...]:
    """Return the entries of the original krun's list: regex:path:sha256 lines, # comments.

    Raises KrunError that names file and line.
    """
    import re

    entries = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        pattern, _, rest = line.strip().partition(":")
        target, _, sha256 = rest.rpartition(":")
        sha256 = sha256.strip().lower()
        where = f"{name}:{number}"
        if not target.startswith("/"):
            raise KrunError(f"{where}: must be regex:/path:sha256")
        if len(sha256) != 64 or sha256.strip("0123456789abcdef"):
            raise KrunError(f"{where}: the SHA-256 must be 64 hexadecimal digits")
        try:
            re.compile(pattern)
        except re.error as error:
            raise KrunError(f"{where}: {pattern} is no regular expression: {error}") from error
        # The original searched anywhere in the path.
        entries.append(Direct("", f".*(?:{pattern}).*", target, sha256))
    return tuple(entries)


def _read(path: str) -> str | None:
    """Return the text of a file that only root can write, None when there is none."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return None
    with open(fd, encoding="utf-8", errors="strict") as file:
        status = os.fstat(fd)
        owners: tuple[int, ...] = (0, os.geteuid())
        if host.in_user_namespace():
            # The host's root has no number in here: its files show the overflow uid.
            owners = (*owners, OVERFLOW_UID)
        if status.st_mode & 0o022 or status.st_uid not in owners:
            raise KrunError(
                f"{path}: others than its owner can write it, or its owner is not root",
                f"chown root {path} && chmod go-w {path}",
            )
        try:
            return file.read()
        except UnicodeDecodeError as error:
            raise KrunError(f"{path}: not UTF-8 at byte {error.start}") from None


def _document(path: str, text: str) -> Any:
    if path.endswith(".toml"):
        import tomllib

        try:
            return tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise KrunError(f"{path}: {error}") from None
    try:
        return jsontext.loads(text)
    except ValueError as error:
        raise KrunError(f"{path}: {error}") from None


def load(
    file: str | None = None, directory: str = DIRECTORY, original_list: str = ORIGINAL_LIST
) -> Policy:
    """Return the host's policy: `file`, or what is found, or the built-in one.

    Raises KrunError for a file that is wrong, not safe, named but missing, or there twice.
    """
    if file is not None:
        text = _read(file)
        if text is None:
            raise KrunError(f"--policy {file}: no such file")
        return parse(_document(file, text), file)
    found = []
    for name in ("policy.json", "policy.toml"):
        path = f"{directory}/{name}"
        text = _read(path)
        if text is not None:
            found.append((path, text))
    if len(found) > 1:
        raise KrunError(f"{found[0][0]} and {found[1][0]}: only one of them may exist")
    policy = parse(_document(*found[0]), found[0][0]) if found else Policy()
    original = _read(original_list)
    if original is not None:
        policy = policy._replace(direct=policy.direct + parse_original(original, original_list))
    return policy
