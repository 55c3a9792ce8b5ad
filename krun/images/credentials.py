"""Registry credentials: auth.json, config.json, Kubernetes pull secrets and credential helpers.

Forms: containers-auth.json(5), docker's config.json, and Secrets of type
kubernetes.io/dockerconfigjson and kubernetes.io/dockercfg.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from krun.errors import KrunError
from krun.images.files import read
from krun.images.references import DEFAULT_HOST, Reference
from krun.record import Record

# docker.io's credentials are filed under this key since docker's first login command.
_DOCKER_KEYS = ("https://index.docker.io/v1/", "https://index.docker.io/v1", "index.docker.io")
_HELPER_SECONDS = 10


class BadCredentials(KrunError):
    """A credentials file or secret cannot be read."""


class Credential(Record):
    """A user's name and password, or an identity token (OAuth refresh token)."""

    username: str
    password: str
    identity_token: str = ""

    def __repr__(self) -> str:
        return f"Credential({self.username!r}, …)"

    def encoded(self) -> str:
        """Return the base64 of name:password."""
        return base64.b64encode(f"{self.username}:{self.password}".encode()).decode()


class AuthFile(Record):
    """One parsed file: `auths` by registry path, `helpers` by host, `store` for all the rest."""

    origin: str
    auths: dict[str, Credential]
    helpers: dict[str, str]
    store: str


def _credential(origin: str, key: str, entry: Any) -> Credential | None:
    if not isinstance(entry, dict):
        raise BadCredentials(f"{origin}: auths[{json.dumps(key)}]: must be an object")
    token = entry.get("identitytoken", "")
    encoded = entry.get("auth")
    if encoded:
        try:
            text = base64.b64decode(encoded, validate=True).decode()
        except (binascii.Error, UnicodeDecodeError, ValueError, TypeError):
            raise BadCredentials(
                f"{origin}: auths[{json.dumps(key)}].auth: is not base64 of NAME:PASSWORD"
            ) from None
        username, colon, password = text.partition(":")
        if not colon:
            raise BadCredentials(f"{origin}: auths[{json.dumps(key)}].auth: has no ':'")
        return Credential(username, password.rstrip("\0"), token)
    if "username" in entry and "password" in entry:
        return Credential(str(entry["username"]), str(entry["password"]), token)
    return Credential("", "", token) if token else None


def _file_key(key: str) -> str:
    """Bring a key to host or host/path: docker writes URLs, podman paths."""
    if key in _DOCKER_KEYS:
        return DEFAULT_HOST
    for scheme in ("https://", "http://"):
        key = key.removeprefix(scheme)
    for version in ("/v1/", "/v2/", "/v1", "/v2"):
        key = key.removesuffix(version)
    return key.rstrip("/")


def parse(document: Any, origin: str) -> AuthFile:
    """Read the object of an auth file; `origin` names it in errors."""
    if not isinstance(document, dict):
        raise BadCredentials(f"{origin}: must be a JSON object")
    auths: dict[str, Credential] = {}
    entries = document.get("auths", {})
    if not isinstance(entries, dict):
        raise BadCredentials(f"{origin}: auths: must be an object")
    for key, entry in entries.items():
        credential = _credential(origin, key, entry)
        if credential is not None:
            auths[_file_key(key)] = credential
    helpers = document.get("credHelpers", {})
    if not isinstance(helpers, dict):
        raise BadCredentials(f"{origin}: credHelpers: must be an object")
    return AuthFile(
        origin,
        auths,
        {_file_key(host): str(name) for host, name in helpers.items()},
        str(document.get("credsStore", "")),
    )


def read_file(path: str) -> AuthFile:
    """Read an auth file; raises BadCredentials."""
    hint = "see authfile and --authfile"
    data = read(path, "registry credentials", hint, BadCredentials)
    try:
        document = json.loads(data)
    except ValueError as error:
        raise BadCredentials(f"{path}: is not JSON: {error}") from None
    return parse(document, path)


def secret(document: Mapping[str, Any], origin: str) -> AuthFile:
    """Read a Kubernetes Secret of type dockerconfigjson or dockercfg."""
    data = document.get("data")
    data = data if isinstance(data, dict) else {}
    plain = document.get("stringData")
    plain = plain if isinstance(plain, dict) else {}
    for key in (".dockerconfigjson", ".dockercfg"):
        if key in plain:
            text: str | bytes = str(plain[key])
        elif key in data:
            try:
                text = base64.b64decode(data[key], validate=True)
            except (binascii.Error, ValueError, TypeError):
                raise BadCredentials(f"{origin}: data[{json.dumps(key)}]: is not base64") from None
        else:
            continue
        try:
            inner = json.loads(text)
        except ValueError:
            raise BadCredentials(f"{origin}: data[{json.dumps(key)}]: is not JSON") from None
        return parse({"auths": inner} if key == ".dockercfg" else inner, origin)
    raise BadCredentials(
        f'{origin}: data: has no ".dockerconfigjson"',
        "make it with kubectl create secret docker-registry … --dry-run=client -o yaml",
    )


def default_paths(environ: Mapping[str, str], uid: int) -> list[str]:
    """Return the files that podman and docker read, in podman's order."""
    if environ.get("REGISTRY_AUTH_FILE"):
        return [environ["REGISTRY_AUTH_FILE"]]
    home = environ.get("HOME", "/root")
    runtime = environ.get("XDG_RUNTIME_DIR") or f"/run/user/{uid}"
    paths = [f"{runtime}/containers/auth.json"]
    if uid == 0:
        paths.append("/run/containers/0/auth.json")
    config = environ.get("XDG_CONFIG_HOME") or f"{home}/.config"
    paths.append(f"{config}/containers/auth.json")
    paths.append(f"{environ.get('DOCKER_CONFIG') or home + '/.docker'}/config.json")
    return paths


def read_defaults(configured: str) -> list[AuthFile]:
    """Read the configured file, or podman's and docker's where they exist."""
    if configured:
        return [read_file(configured)]
    paths = default_paths(os.environ, os.geteuid())
    return [read_file(path) for path in paths if os.path.exists(path)]


def keys(reference: Reference) -> Iterable[str]:
    """Yield the keys that apply to a reference, most specific first: path by path, then host."""
    parts = reference.name.split("/")
    for size in range(len(parts), 0, -1):
        yield "/".join(parts[:size])


def _ask_helper(name: str, host: str) -> Credential | None:
    """Ask docker-credential-NAME (github.com/docker/docker-credential-helpers protocol)."""
    if not name.replace("-", "").replace("_", "").replace(".", "").isalnum():
        raise BadCredentials(f"credential helper {name!r}: is no program name")
    program = f"docker-credential-{name}"
    server = _DOCKER_KEYS[0] if host == DEFAULT_HOST else host
    try:
        answer = subprocess.run(
            [program, "get"],
            input=server.encode(),
            capture_output=True,
            timeout=_HELPER_SECONDS,
        )
    except FileNotFoundError:
        raise BadCredentials(
            f"credential helper {program}: not found", "install it or remove it from credHelpers"
        ) from None
    except subprocess.TimeoutExpired:
        raise BadCredentials(f"credential helper {program}: no answer in 10 s") from None
    if answer.returncode:
        text = (answer.stdout + answer.stderr).decode("utf-8", "replace").strip()
        if "not found" in text:
            return None
        raise BadCredentials(f"credential helper {program}: {text or 'failed'}")
    try:
        document = json.loads(answer.stdout)
        username, password = document["Username"], document["Secret"]
    except (ValueError, KeyError, TypeError):
        raise BadCredentials(f"credential helper {program}: its answer is no credential") from None
    if username == "<token>":
        return Credential("", "", password)
    return Credential(username, password)


def find(reference: Reference, files: Sequence[AuthFile]) -> Credential | None:
    """Return the credential for a reference: the first file that has one, its most specific key.

    A registry's helper wins over the same file's auths, as in docker.
    """
    for file in files:
        helper = file.helpers.get(reference.host)
        if helper:
            credential = _ask_helper(helper, reference.host)
            if credential is not None:
                return credential
        for key in keys(reference):
            if key in file.auths:
                return file.auths[key]
        if file.store:
            credential = _ask_helper(file.store, reference.host)
            if credential is not None:
                return credential
    return None
