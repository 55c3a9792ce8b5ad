"""apply() and undo(): files put on a machine, and taken away so that it is as it was.

`<prefix>/lib/krun/manifest.json` lists what was put where, the digest of what was written, and the
backup of what was there before.  It is written first: an install that is killed can be repeated,
or undone.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
from typing import Any

from krun.errors import KrunError, UsageError
from krun.install import clients, launcher
from krun.record import Record

NAME = "manifest.json"
BACKUPS = "backup"
FORMAT = 1

# How the runtimes are taken out of a file that others have edited since.
_WITHOUT = {"docker": clients.docker_without, "containerd": clients.containerd_without}


def prefix(text: str) -> str:
    """Return the directory that --prefix names; raises UsageError."""
    if not text:
        # A variable that was not set would mean the current directory.
        raise UsageError("--prefix: must name a directory")
    return os.path.abspath(os.path.expanduser(text))


class Item(Record):
    """One path to put: a file's `data`, or a link's target; `path` is without the destdir.

    `edit` names the client whose file it is, when `data` is that file with `runtimes` added.
    """

    path: str
    data: bytes = b""
    target: str = ""
    mode: int = 0o644
    edit: str = ""
    runtimes: tuple[str, ...] = ()


def write_file(path: str, data: bytes, mode: int, owner: tuple[int, int] | None = None) -> None:
    """Write a file whole or not at all; raises OSError."""
    temporary = f"{path}.krun-{os.getpid()}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(temporary, flags, 0o600)
    try:
        with open(fd, "wb") as file:
            file.write(data)
            file.flush()
            if owner is not None and os.geteuid() == 0:
                os.fchown(fd, *owner)
            os.fchmod(fd, mode)
            os.fsync(fd)
        os.rename(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _write_link(path: str, target: str) -> None:
    temporary = f"{path}.krun-{os.getpid()}"
    os.symlink(target, temporary)
    os.rename(temporary, path)


def _state(path: str) -> dict[str, Any] | None:
    """Return what is at a path, in the form in which the manifest describes it."""
    try:
        status = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    if stat.S_ISLNK(status.st_mode):
        return {"link": os.readlink(path)}
    if not stat.S_ISREG(status.st_mode):
        raise KrunError(f"{path}: is neither a file nor a link", "krun does not replace it")
    with open(path, "rb") as file:
        digest = hashlib.sha256(file.read()).hexdigest()
    return {
        "sha256": digest,
        "mode": stat.S_IMODE(status.st_mode),
        "uid": status.st_uid,
        "gid": status.st_gid,
        "mtime": status.st_mtime_ns,
    }


def _wanted(item: Item) -> dict[str, Any]:
    if item.target:
        return {"link": item.target}
    return {"sha256": hashlib.sha256(item.data).hexdigest()}


def _is(state: dict[str, Any] | None, written: dict[str, Any]) -> bool:
    return state is not None and all(state.get(key) == value for key, value in written.items())


def load(base: str, destdir: str = "") -> dict[str, Any]:
    """Return the manifest in `base`, an empty one where there is none; raises KrunError."""
    path = f"{destdir}{base}/{NAME}"
    try:
        with open(path, encoding="utf-8") as file:
            document = json.load(file)
    except FileNotFoundError:
        return {"format": FORMAT, "entries": {}, "directories": []}
    except ValueError as error:
        raise KrunError(f"{path}: {error}", "it was not written by krun install") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise KrunError(f"{path}: is no manifest of this version of krun")
    if not _whole(document):
        raise KrunError(f"{path}: is damaged", "it was not written by krun install")
    return document


def _whole(document: dict[str, Any]) -> bool:
    """Return whether a manifest has all that undo() reads."""
    entries, directories = document.get("entries"), document.get("directories")
    return (
        isinstance(entries, dict)
        and isinstance(directories, list)
        and all(isinstance(one, str) for one in directories)
        and all(
            isinstance(entry, dict) and "before" in entry and "written" in entry
            for entry in entries.values()
        )
    )


def save(base: str, destdir: str, document: dict[str, Any]) -> None:
    """Write the manifest; raises OSError."""
    text = json.dumps(document, indent=1) + "\n"
    write_file(f"{destdir}{base}/{NAME}", text.encode(), 0o644)


def _missing_directories(path: str, destdir: str) -> list[str]:
    """Return the directories, without the destdir, that must be made for a path; outer first."""
    missing = []
    directory = os.path.dirname(path)
    while directory not in ("", "/") and not os.path.isdir(f"{destdir}{directory}"):
        missing.append(directory)
        directory = os.path.dirname(directory)
    return missing[::-1]


def check_writable(paths: list[str], destdir: str) -> None:
    """Raise KrunError for the first path that this user cannot write."""
    for path in paths:
        directory = os.path.dirname(f"{destdir}{path}")
        while not os.path.lexists(directory):
            directory = os.path.dirname(directory)
        if not os.path.isdir(directory):
            raise KrunError(f"{directory}: is not a directory")
        if os.statvfs(directory).f_flag & os.ST_RDONLY:
            text = f"{directory}: read-only file system"
            raise KrunError(text, "remount it, or install with another --prefix")
        if not os.access(directory, os.W_OK | os.X_OK):
            raise KrunError(
                f"{directory}: permission denied",
                "run it as root, or with --prefix ~/.local",
            )


def _backup(real: str, state: dict[str, Any], backups: str) -> dict[str, Any]:
    """Keep what is at a path and return how to restore it."""
    if "link" in state:
        return state
    with open(real, "rb") as file:
        data = file.read()
    return _keep(data, state, backups)


def _is_launcher(path: str) -> bool:
    """Return whether a file is a launcher of krun's (whose manifest was lost)."""
    with open(path, "rb") as file:
        return launcher.MARK in file.read(512)


def _keep(data: bytes, state: dict[str, Any], backups: str) -> dict[str, Any]:
    digest = hashlib.sha256(data).hexdigest()
    os.makedirs(backups, mode=0o700, exist_ok=True)
    if not os.path.exists(f"{backups}/{digest}"):
        write_file(f"{backups}/{digest}", data, 0o600)
    return {**state, "sha256": digest}


def _entry(item: Item, old: dict[str, Any] | None, destdir: str, base: str) -> dict[str, Any]:
    """Return the manifest's entry for an item: what will be there, and what was there before."""
    real = f"{destdir}{item.path}"
    backups = f"{destdir}{base}/{BACKUPS}"
    state = _state(real)
    entry: dict[str, Any] = {"written": _wanted(item), "before": None}
    if item.edit:
        entry |= {"edit": item.edit, "runtimes": sorted(item.runtimes)}
    if old is None:
        if state is not None and not _is_launcher(real):
            entry["before"] = _backup(real, state, backups)
        return entry
    if item.edit:
        entry["runtimes"] = sorted({*old.get("runtimes", ()), *item.runtimes})
    if state is None or not item.edit or _is(state, old["written"]):
        entry["before"] = old["before"]
        return entry
    # Others changed the file since: what they have without krun is what is to come back.
    with open(real, encoding="utf-8") as file:
        text = _WITHOUT[item.edit](file.read(), tuple(old["runtimes"]), item.path)
    entry["before"] = _keep(text.encode(), state, backups)
    return entry


def begin(base: str, destdir: str) -> None:
    """Make `base` with a manifest that tells which directories were made for it."""
    document = load(base, destdir)
    for path in _missing_directories(f"{base}/{NAME}", destdir):
        if path not in document["directories"]:
            document["directories"].append(path)
    os.makedirs(f"{destdir}{base}", exist_ok=True)
    save(base, destdir, document)


def apply(items: list[Item], base: str, destdir: str) -> list[str]:
    """Put the items on the machine and record them in `base`; return the paths that changed.

    Raises KrunError, OSError.
    """
    document = load(base, destdir)
    entries = document["entries"]
    made = document["directories"]
    changed = []
    for item in items:
        new = [path for path in _missing_directories(item.path, destdir) if path not in made]
        made += new
        entries[item.path] = _entry(item, entries.get(item.path), destdir, base)
    save(base, destdir, document)
    for item in items:
        real = f"{destdir}{item.path}"
        state = _state(real)
        wanted = _wanted(item)
        if not item.target and not item.edit:
            wanted["mode"] = item.mode
        if _is(state, wanted):
            continue
        changed.append(item.path)
        os.makedirs(os.path.dirname(real), exist_ok=True)
        if item.target:
            _write_link(real, item.target)
        elif state is not None and item.edit and "mode" in state:
            write_file(real, item.data, state["mode"], (state["uid"], state["gid"]))
        else:
            write_file(real, item.data, item.mode)
    return changed


def _restore(real: str, before: dict[str, Any] | None, backups: str) -> None:
    if before is None:
        os.unlink(real)
    elif "link" in before:
        _write_link(real, before["link"])
    else:
        with open(f"{backups}/{before['sha256']}", "rb") as file:
            data = file.read()
        write_file(real, data, before["mode"], (before["uid"], before["gid"]))
        os.utime(real, ns=(before["mtime"], before["mtime"]))


def _take_out(path: str, real: str, entry: dict[str, Any], state: dict[str, Any]) -> None:
    """Remove the runtimes from a file that others changed after krun did."""
    with open(real, encoding="utf-8") as file:
        text = file.read()
    rest = _WITHOUT[entry["edit"]](text, tuple(entry["runtimes"]), path)
    if rest != text:
        write_file(real, rest.encode(), state["mode"], (state["uid"], state["gid"]))


def undo(base: str, destdir: str) -> tuple[list[str], list[str]]:
    """Take away what apply() put; return the paths undone, and those left since others own them.

    Raises KrunError, OSError; it can be run again after a failure.
    """
    document = load(base, destdir)
    backups = f"{destdir}{base}/{BACKUPS}"
    undone, left = [], []
    for path, entry in reversed(document["entries"].items()):
        real = f"{destdir}{path}"
        state = _state(real)
        before = entry["before"]
        if state is None:
            # Someone removed what krun wrote; what it replaced comes back all the same.
            if before is not None and not entry.get("edit"):
                os.makedirs(os.path.dirname(real), exist_ok=True)
                _restore(real, before, backups)
                undone.append(path)
        elif _is(state, entry["written"]):
            _restore(real, before, backups)
            undone.append(path)
        elif before is not None and _is(state, {k: before[k] for k in before if k != "mtime"}):
            pass
        elif entry.get("edit"):
            _take_out(path, real, entry, state)
            undone.append(path)
        else:
            left.append(path)
    shutil.rmtree(f"{destdir}{base}")
    for directory in reversed(document["directories"]):
        try:
            os.rmdir(f"{destdir}{directory}")
        except OSError:
            # Not empty, or gone: others use it.
            pass
    return undone, left
