"""The objects of this node on disk: documents as applied, with the status that krun keeps.

STATE/objects/KIND_NAMESPACE_NAME.json and STATE/secrets/NAMESPACE_NAME.json; neither names nor
namespaces hold a "_" or "/", so file names are unambiguous.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable
from datetime import datetime
from typing import Any

from krun.errors import KrunError, NotFound
from krun.images import decide, kinds, schedule
from krun.images.credentials import BadCredentials
from krun.images.files import locked, sync_directory, write_all, write_atomically
from krun.record import Record

Document = dict[str, Any]
FINALIZER = "kubefledged.io/images"
_WAY_OUT = "apply the object again, or delete it with --keep-images"


class DamagedObject(KrunError):
    """A stored object cannot be used; the message names its file."""


class Damaged(Record):
    """A stored object that cannot be used: `key` by its file's name, `message` names the file."""

    key: str
    message: str


class Stored(Record):
    """All stored objects by key: as documents, as what they say, and those that say nothing."""

    documents: dict[str, Document]
    caches: dict[str, kinds.CacheObject]
    damaged: list[Damaged]


def timestamp(moment: float) -> str:
    """Return RFC 3339 in UTC, as Kubernetes writes times."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(moment))


def key_of(document: Document) -> str:
    """Return KIND/NAMESPACE/NAME of a stored document."""
    metadata = document["metadata"]
    return f"{document['kind']}/{metadata['namespace']}/{metadata['name']}"


class Objects:
    """The objects under one state directory."""

    def __init__(self, state: str) -> None:
        self.state = state
        self._objects = f"{state}/objects"
        self._secrets = f"{state}/secrets"
        os.makedirs(self._objects, mode=0o755, exist_ok=True)
        os.makedirs(self._secrets, mode=0o700, exist_ok=True)

    @property
    def lock(self) -> str:
        """The lock file of short changes to objects."""
        return f"{self.state}/objects.lock"

    @property
    def reconcile_lock(self) -> str:
        """The lock file that a reconciler holds while it acts."""
        return f"{self.state}/reconcile.lock"

    def _path(self, key: str) -> str:
        return f"{self._objects}/{key.replace('/', '_')}.json"

    def load(self, key: str) -> Document | None:
        """Return one document, None if there is none; raises DamagedObject."""
        path = self._path(key)
        try:
            with open(path, "rb") as file:
                document = json.loads(file.read())
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _damaged(path, str(error.strerror)) from error
        except (ValueError, RecursionError) as error:
            raise _damaged(path, f"is not JSON: {error}") from None
        _check_form(document, key, path)
        return document  # type: ignore[no-any-return]

    def read(self, key: str) -> tuple[Document, kinds.CacheObject] | None:
        """Return one object and what it says, None if there is none; raises DamagedObject."""
        document = self.load(key)
        if document is None:
            return None
        path = self._path(key)
        try:
            cache = kinds.read(document, path)
            if cache.schedule:
                where = f"{path}: metadata.annotations.{kinds.SCHEDULE_ANNOTATION}"
                schedule.parse(cache.schedule, where)
        except KrunError as error:
            raise DamagedObject(error.message, error.hint or _WAY_OUT) from error
        return document, cache

    def read_all(self) -> Stored:
        """Return every object, in the order of their keys; one that is damaged fails alone."""
        stored = Stored({}, {}, [])
        for key in self.keys():
            try:
                found = self.read(key)
            except DamagedObject as error:
                stored.damaged.append(Damaged(key, str(error)))
                continue
            if found is not None:
                stored.documents[key], stored.caches[key] = found
        return stored

    def keys(self) -> list[str]:
        """Return the keys of all objects, of damaged ones too, in order."""
        names = sorted(name for name in os.listdir(self._objects) if name.endswith(".json"))
        return [name[: -len(".json")].replace("_", "/") for name in names if name[0] != "."]

    def apply(
        self, documents: list[Document], secrets: list[Document], now: float
    ) -> list[tuple[str, str]]:
        """Store checked documents and Secrets, all of them or, on an error, none.

        Returns (key, "created", "configured" or "unchanged") for each document; a damaged object
        is replaced.  Raises KrunError, OSError.
        """
        results = []
        files = [(self._secret_path(*_owner(secret)), json.dumps(secret).encode(), 0o600)
                 for secret in secrets]  # fmt: skip
        with locked(self.lock):
            self._sweep()
            for document in documents:
                key = key_of(document)
                try:
                    found = self.read(key)
                    stored = _merged(found[0], document) if found else _new(document, now)
                    word = "configured" if found else "created"
                except DamagedObject:
                    found, stored, word = None, _new(document, now), "configured"
                if found and found[0] == stored:
                    results.append((key, "unchanged"))
                else:
                    results.append((key, word))
                    files.append((self._path(key), _text(stored), 0o644))
            write_all(files)
        return results

    def _sweep(self) -> None:
        """Remove what a krun that was killed while it wrote left; only under the lock."""
        for directory in (self._objects, self._secrets):
            for name in os.listdir(directory):
                if name.startswith(".") and name.endswith(".tmp"):
                    os.unlink(f"{directory}/{name}")

    def change(self, key: str, change: Callable[[Document], None]) -> bool:
        """Change a stored document under the lock; False if it is gone; raises DamagedObject."""
        with locked(self.lock):
            document = self.load(key)
            if document is None:
                return False
            change(document)
            write_atomically(self._path(key), _text(document), 0o644)
        return True

    def remove(self, key: str) -> None:
        """Remove a document for good."""
        with locked(self.lock):
            try:
                os.unlink(self._path(key))
            except FileNotFoundError:
                return
            sync_directory(self._objects)

    def _secret_path(self, namespace: str, name: str) -> str:
        return f"{self._secrets}/{namespace}_{name}.json"

    def load_secret(self, namespace: str, name: str) -> Document | None:
        """Return a Secret that was applied, None if there is none; raises BadCredentials."""
        path = self._secret_path(namespace, name)
        try:
            with open(path, "rb") as file:
                document = json.loads(file.read())
        except FileNotFoundError:
            return None
        except (ValueError, RecursionError) as error:
            raise BadCredentials(
                f"{path}: is not JSON: {error}", "apply the Secret again"
            ) from None
        if not isinstance(document, dict):
            raise BadCredentials(f"{path}: is no Secret", "apply the Secret again")
        return document

    def find(self, words: list[str], namespace: str) -> list[str]:
        """Return the keys that NAME, KIND/NAME or KIND/NAMESPACE/NAME mean; NotFound if none.

        A bare NAME is looked for in the namespace, or in every one when that is "".
        """
        known = [key.split("/") for key in self.keys()]
        found = []
        for word in words:
            parts = word.split("/")
            kind = _kind(parts[0]) if len(parts) > 1 else ""
            matches = [
                "/".join(key)
                for key in known
                if key[-1] == parts[-1]
                and (not kind or key[0] == kind)
                and (len(parts) != 3 or key[1:-1] == [parts[1]])
                and (not namespace or key[1:-1] == [namespace])
            ]
            if not matches:
                raise NotFound(f"no ImageCache or ImageWarm {word}", "see krun images cache get")
            if len(matches) > 1:
                raise KrunError(
                    f"{word} is ambiguous: {', '.join(matches)}", "name it KIND/NAMESPACE/NAME"
                )
            found += matches
        return found


def _kind(word: str) -> str:
    """Return the kind of a word as kubectl takes it: any case, plural, short name."""
    table = {"ic": kinds.IMAGE_CACHE, "iw": kinds.IMAGE_WARM}
    for kind in (kinds.IMAGE_CACHE, kinds.IMAGE_WARM):
        table[kind.lower()] = table[kind.lower() + "s"] = kind
    if word.lower() not in table:
        raise NotFound(f"{word!r} is no kind", "kinds are ImageCache (ic) and ImageWarm (iw)")
    return table[word.lower()]


def _owner(secret: Document) -> tuple[str, str]:
    metadata = secret["metadata"]
    return metadata.get("namespace", kinds.DEFAULT_NAMESPACE), metadata["name"]


def _text(document: Document) -> bytes:
    return json.dumps(document, indent=1, ensure_ascii=False).encode()


def _damaged(path: str, fault: str) -> DamagedObject:
    return DamagedObject(f"{path}: {fault}", _WAY_OUT)


def _is_time(value: Any) -> bool:
    try:
        datetime.fromisoformat(value)
    except (TypeError, ValueError):
        return False
    return True


# What krun itself keeps in a stored object: path, whether it must be there, and its form.
_FORM: tuple[tuple[str, bool, Callable[[Any], bool]], ...] = (
    ("metadata.generation", True, lambda value: isinstance(value, int)),
    ("metadata.creationTimestamp", True, _is_time),
    ("status.status", False, lambda value: isinstance(value, str)),
    ("status.reason", False, lambda value: isinstance(value, str)),
    ("status.lastRefreshTime", False, _is_time),
    ("status.failures", False, lambda value: isinstance(value, dict)),
    ("status.images", False, lambda value: isinstance(value, list) and all(map(_is_image, value))),
    ("status.conditions", False, lambda value: isinstance(value, list)
     and all(isinstance(item, dict) and "lastTransitionTime" in item for item in value)),
)  # fmt: skip


def _is_image(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("image"), str)


def _check_form(document: Any, key: str, path: str) -> None:
    """Raise DamagedObject unless a stored document has the form that krun writes."""
    members = document if isinstance(document, dict) else {}
    for field in ("metadata", "spec"):
        if not isinstance(members.get(field), dict):
            raise _damaged(path, f"{field}: must be an object")
    if not isinstance(members.get("status", {}), dict):
        raise _damaged(path, "status: must be an object")
    metadata = members["metadata"]
    if f"{members.get('kind')}/{metadata.get('namespace')}/{metadata.get('name')}" != key:
        raise _damaged(path, f"kind and metadata: are not those of {key}")
    for where, needed, fits in _FORM:
        parent, _, field = where.partition(".")
        values = members.get(parent, {})
        if (needed or field in values) and not fits(values.get(field)):
            raise _damaged(path, f"{where}: is not what krun writes")


def shown(damaged: Damaged) -> Document:
    """Return a damaged object as people and programs see it: failed, with its file named."""
    kind, namespace, name = _parts(damaged.key)
    return {
        "apiVersion": kinds.VERSIONS.get(kind, ("",))[0],
        "kind": kind,
        "metadata": {"namespace": namespace, "name": name},
        "status": {
            "status": decide.FAILED,
            "reason": decide.DAMAGED,
            "message": damaged.message,
            "failures": {},
        },
    }


def _parts(key: str) -> tuple[str, str, str]:
    """Return kind, namespace and name; a file of another name has none of the first two."""
    parts = key.split("/")
    return (parts[0], parts[1], parts[2]) if len(parts) == 3 else ("", "", key)


def _new(document: Document, now: float) -> Document:
    metadata = dict(document["metadata"])
    metadata.setdefault("namespace", kinds.DEFAULT_NAMESPACE)
    metadata["uid"] = str(uuid.uuid4())
    metadata["generation"] = 1
    metadata["creationTimestamp"] = timestamp(now)
    metadata["finalizers"] = [FINALIZER]
    return {
        "apiVersion": document["apiVersion"],
        "kind": document["kind"],
        "metadata": metadata,
        "spec": document["spec"],
        "status": {},
    }


def _merged(old: Document, new: Document) -> Document:
    """Return the old document with the new one's labels, annotations, version and spec."""
    metadata = dict(old["metadata"])
    if "deletionTimestamp" in metadata:
        raise KrunError(
            f"{key_of(old)}: is being deleted", "wait, or run krun images cache delete again"
        )
    for field in ("labels", "annotations"):
        if new["metadata"].get(field):
            metadata[field] = {**(metadata.get(field) or {}), **new["metadata"][field]}
    if old["spec"] != new["spec"]:
        metadata["generation"] = metadata["generation"] + 1
    return {
        **old,
        "apiVersion": new["apiVersion"],
        "metadata": metadata,
        "spec": new["spec"],
    }
