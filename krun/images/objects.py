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
from typing import Any

from krun.errors import KrunError, NotFound
from krun.images import kinds
from krun.images.files import locked, sync_directory, write_atomically

Document = dict[str, Any]
FINALIZER = "kubefledged.io/images"


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
        """Return one document, None if there is none."""
        try:
            with open(self._path(key), "rb") as file:
                document: Document = json.loads(file.read())
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise KrunError(
                f"{self._path(key)}: is not JSON: {error}", "remove it and apply the object again"
            ) from None
        return document

    def load_all(self) -> list[Document]:
        """Return every document, in the order of their keys."""
        names = sorted(name for name in os.listdir(self._objects) if name.endswith(".json"))
        keys = [name[: -len(".json")].replace("_", "/") for name in names if name[0] != "."]
        return [document for document in map(self.load, keys) if document is not None]

    def _save(self, document: Document) -> None:
        text = json.dumps(document, indent=1, ensure_ascii=False)
        write_atomically(self._path(key_of(document)), text.encode(), 0o644)

    def apply(self, documents: list[Document], now: float) -> list[tuple[str, str]]:
        """Store checked documents; return (key, "created", "configured" or "unchanged") each."""
        results = []
        with locked(self.lock):
            for document in documents:
                key = key_of(document)
                old = self.load(key)
                if old is None:
                    results.append((key, "created"))
                    self._save(_new(document, now))
                    continue
                if "deletionTimestamp" in old["metadata"]:
                    raise KrunError(
                        f"{key}: is being deleted", "wait, or run krun images cache delete again"
                    )
                merged = _merged(old, document)
                results.append((key, "unchanged" if merged == old else "configured"))
                if merged != old:
                    self._save(merged)
        return results

    def change(self, key: str, change: Callable[[Document], None]) -> bool:
        """Change a stored document under the lock; False if it is gone."""
        with locked(self.lock):
            document = self.load(key)
            if document is None:
                return False
            change(document)
            self._save(document)
        return True

    def remove(self, key: str) -> None:
        """Remove a document for good."""
        with locked(self.lock):
            try:
                os.unlink(self._path(key))
            except FileNotFoundError:
                return
            sync_directory(self._objects)

    def save_secret(self, document: Document) -> None:
        """Store a Secret, readable by its owner alone."""
        metadata = document["metadata"]
        namespace = metadata.get("namespace", kinds.DEFAULT_NAMESPACE)
        path = f"{self._secrets}/{namespace}_{metadata['name']}.json"
        write_atomically(path, json.dumps(document).encode(), 0o600)

    def load_secret(self, namespace: str, name: str) -> Document | None:
        """Return a Secret that was applied, None if there is none."""
        try:
            with open(f"{self._secrets}/{namespace}_{name}.json", "rb") as file:
                document: Document = json.loads(file.read())
        except FileNotFoundError:
            return None
        return document

    def find(self, words: list[str], namespace: str) -> list[str]:
        """Return the keys that NAME, KIND/NAME or KIND/NAMESPACE/NAME mean; NotFound if none.

        A bare NAME is looked for in the namespace, or in every one when that is "".
        """
        documents = {key_of(document): document for document in self.load_all()}
        found = []
        for word in words:
            parts = word.split("/")
            kind = _kind(parts[0]) if len(parts) > 1 else ""
            matches = [
                key
                for key in documents
                if key.split("/")[2] == parts[-1]
                and (not kind or key.split("/")[0] == kind)
                and (len(parts) != 3 or key.split("/")[1] == parts[1])
                and (not namespace or key.split("/")[1] == namespace)
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
