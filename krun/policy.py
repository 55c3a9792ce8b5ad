"""load() -> Policy: what the host's owner allows, from /etc/krun/policy.json or policy.toml.

A bundle and its annotations can choose within the policy, and tighten it; they never loosen it.
"""

from __future__ import annotations

import os
import stat

from krun import host, jsontext, spec
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
    network: Any = None
    source: str = ""


def _direct(entry: dict[str, Any]) -> Direct:
    return Direct(
        entry.get("path", ""),
        entry.get("pattern", ""),
        entry.get("target", ""),
        entry["sha256"].lower(),
        entry.get("trustImageLibraries", False),
    )


def parse(document: Any, name: str) -> Policy:
    """Return the policy of a parsed file; raises BadSpec that names the file and JSON path."""
    table = spec.parse_policy(document, name)
    defaults = table.get("defaults", {})
    paths = table.get("paths", {})
    entries = table.get("directInvocation", [])
    for index, entry in enumerate(entries):
        if "pattern" in entry:
            import re

            try:
                re.compile(entry["pattern"])
            except re.error as error:
                where = f"directInvocation[{index}].pattern"
                raise BadSpec(where, f"is no regular expression: {error}", document=name) from error
    base = Policy()
    init = defaults.get("init", base.init)
    return Policy(
        engine=defaults.get("engine", base.engine),
        monitor=defaults.get("monitor", base.monitor),
        init=init,
        mode=defaults.get("mode", base.mode),
        sandbox=defaults.get("sandbox", base.sandbox),
        exec_outside_vm=defaults.get("execOutsideVM", base.exec_outside_vm),
        crun=paths.get("crun", ""),
        km_path=paths.get("km", ""),
        init_path=paths.get("init", "") or (init if init.startswith("/") else ""),
        km=defaults.get("km", {}),
        direct=tuple(_direct(entry) for entry in entries),
        allow=table.get("allow", {}),
        images=table.get("images", {}),
        network=defaults.get("network"),
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
        # A FIFO would wait for its writer.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError):
        if os.path.islink(path):
            # Without it the host's rules would be the built-in ones, unnoticed.
            raise KrunError(f"{path}: is a link to no file", "remove or repair it") from None
        return None
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode):
        os.close(fd)
        kind = "a directory" if stat.S_ISDIR(mode) else "no regular file"
        raise KrunError(f"{path}: is {kind}, a policy file was expected")
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
