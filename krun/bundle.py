"""load(directory) -> document: read a bundle's config.json."""

from __future__ import annotations

import os
import stat

from krun import jsontext
from krun.errors import BadSpec, KrunError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# runc and crun have no limit; a configuration a hundredth of this is a mistake.
SIZE_MAX = 64 << 20


def read_json(path: str, name: str) -> Any:
    """Return the parsed JSON file at path; `name` is what errors call it.

    Raises BadSpec for what is not JSON, KrunError for what cannot be read.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise KrunError(f"{path}: {error.strerror}".replace("No such", "no such")) from error
    try:
        status = os.fstat(fd)
        if stat.S_ISDIR(status.st_mode):
            raise KrunError(f"{path}: is a directory, a JSON file was expected")
        if status.st_size > SIZE_MAX:
            raise KrunError(f"{path}: {status.st_size >> 20} MiB is too large to be a {name}")
        parts = []
        size = 0
        while part := os.read(fd, 1 << 18):
            size += len(part)
            if size > SIZE_MAX:
                raise KrunError(f"{path}: too large to be a {name}")
            parts.append(part)
    except OSError as error:
        raise KrunError(f"{path}: {error.strerror}") from error
    finally:
        os.close(fd)
    try:
        return jsontext.loads(b"".join(parts))
    except ValueError as error:
        raise BadSpec("", str(error), document=path) from None


def config_path(directory: str, config: str | None) -> str:
    """Return the path of the configuration; `config` (crun's --config) overrides its name."""
    if config is not None:
        return config
    if not os.path.isdir(directory):
        what = "is not a directory" if os.path.exists(directory) else "no such directory"
        raise KrunError(f"bundle {directory}: {what}", "--bundle DIR names the bundle")
    return os.path.join(directory, "config.json")


def load(directory: str, config: str | None = None) -> Any:
    """Return the bundle's parsed configuration; raises KrunError or BadSpec."""
    path = config_path(directory, config)
    if config is None and not os.path.exists(path):
        raise KrunError(
            f"{path}: no such file", "krun spec writes one; --bundle DIR names the bundle"
        )
    return read_json(path, "config.json")
