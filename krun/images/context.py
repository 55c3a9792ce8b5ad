"""What every verb of `krun images` works with: settings, state, node and store."""

from __future__ import annotations

import os
from typing import Any

from krun.errors import UsageError
from krun.images import settings as images_settings
from krun.images.credentials import AuthFile, BadCredentials, read_defaults, secret
from krun.images.documents import parse as parse_documents
from krun.images.objects import Objects
from krun.images.settings import Settings
from krun.images.stores.choose import open_store
from krun.images.stores.model import Store
from krun.record import Record

# Options of the command line that stand for a setting.
_OPTIONS = (
    ("store", "store"),
    ("state", "state_directory"),
    ("node", "node"),
    ("labels", "labels_file"),
    ("secrets", "secrets_directory"),
    ("authfile", "authfile"),
    ("parallel", "parallel_pulls"),
    ("layers", "layers_at_once"),
    ("retries", "retries"),
)


class Context(Record):
    """Settings, the state directory's objects, and the store."""

    settings: Settings
    state: str
    objects: Objects
    store: Store


def settings_of(options: dict[str, Any]) -> Settings:
    """Return the settings file's settings, with the command line's on top."""
    settings = images_settings.load(options.get("config") or "")
    table = {field: options[name] for name, field in _OPTIONS if options.get(name) is not None}
    if options.get("parallel") == 0:
        raise UsageError("--parallel: must be 1 or more")
    if options.get("timeout"):
        from krun.images.quantities import parse_duration

        table["timeout"] = parse_duration(options["timeout"], "--timeout")
    return settings._replace(**table)


def open_context(options: dict[str, Any]) -> Context:
    """Return the context that the options name; nothing is asked of the store yet."""
    settings = settings_of(options)
    state = images_settings.state_directory(settings)
    os.makedirs(state, mode=0o755, exist_ok=True)
    return Context(settings, state, Objects(state), open_store(settings))


def find_secret(context: Context, namespace: str, name: str) -> AuthFile | None:
    """Return a pull secret: as applied, or from the secrets directory; None if there is none."""
    document = context.objects.load_secret(namespace, name)
    if document is not None:
        return secret(document, f"Secret {namespace}/{name}")
    base = context.settings.secrets_directory
    for path in (f"{base}/{namespace}/{name}", f"{base}/{name}"):
        for suffix in (".yaml", ".yml", ".json") if base else ():
            try:
                with open(path + suffix, "rb") as file:
                    data = file.read()
            except FileNotFoundError:
                continue
            found = parse_documents(data, path + suffix)
            if not found or not isinstance(found[0], dict):
                raise BadCredentials(f"{path + suffix}: is no Secret")
            return secret(found[0], path + suffix)
    return None


def default_credentials(context: Context) -> list[AuthFile]:
    """Return the node's own credential files."""
    return read_defaults(context.settings.authfile)
