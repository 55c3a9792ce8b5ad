"""Ask Kubernetes for a node's labels, with a kubeconfig such as the kubelet has.

Read from: kubeconfig (v1) and client authentication (v1) of Kubernetes' config API reference, and
the API's GET /api/v1/nodes/{name}.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import subprocess
from contextlib import ExitStack
from typing import Any
from urllib.parse import quote

import requests

from krun.errors import KrunError
from krun.images import documents

_SECONDS = 15.0
_PLUGIN_SECONDS = 30.0
# What a credential plugin answers, and what a kubeconfig has for it.
_PLUGIN_DATA = (
    ("clientCertificateData", "client-certificate-data"),
    ("clientKeyData", "client-key-data"),
)


class _Config:
    """The cluster and the user of a kubeconfig's current context."""

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            with open(path, "rb") as file:
                found = documents.parse(file.read(), path)
        except OSError as error:
            raise self.wrong("", str(error.strerror)) from error
        self._document = found[0] if found and isinstance(found[0], dict) else {}
        context = self._entry("contexts", "context", self._document.get("current-context"))
        self.cluster = self._entry("clusters", "cluster", context.get("cluster"))
        self.user = self._entry("users", "user", context.get("user"))
        self.server = str(self.cluster.get("server", "")).rstrip("/")
        if not self.server.startswith("https://"):
            raise self.wrong("clusters[].cluster.server", "must be an https:// address")

    def wrong(self, field: str, text: str) -> KrunError:
        where = f"kubeconfig {self.path}: {field}" if field else f"kubeconfig {self.path}"
        return KrunError(f"{where}: {text}", "give labels in a file with --labels")

    def _entry(self, field: str, member: str, name: Any) -> dict[str, Any]:
        """Return what a list of {name, MEMBER} has under a name."""
        entries = self._document.get(field)
        for entry in entries if isinstance(entries, list) else ():
            if isinstance(entry, dict) and entry.get("name") == name:
                value = entry.get(member) or {}
                if isinstance(value, dict):
                    return value
        raise self.wrong(field, f"has no {name!r}" if name else "there is no current context")

    def file(self, table: dict[str, Any], field: str, stack: ExitStack) -> str:
        """Return the path of a file that is named, or whose content is there; "" for neither."""
        data = table.get(f"{field}-data")
        if data:
            try:
                content = base64.b64decode(data, validate=True)
            except (binascii.Error, TypeError, ValueError):
                raise self.wrong(f"{field}-data", "is not base64") from None
            descriptor = os.memfd_create(field, os.MFD_CLOEXEC)
            stack.callback(os.close, descriptor)
            os.write(descriptor, content)
            return f"/proc/self/fd/{descriptor}"
        name = table.get(field)
        if not name:
            return ""
        path = os.path.join(os.path.dirname(os.path.abspath(self.path)), str(name))
        if not os.access(path, os.R_OK):
            raise self.wrong(field, f"{path} cannot be read")
        return path


def _ask_plugin(config: _Config, plugin: Any) -> dict[str, Any]:
    """Run a credential plugin and return its ExecCredential's status."""
    if not isinstance(plugin, dict) or not plugin.get("command"):
        raise config.wrong("users[].user.exec", "names no command")
    argv = [str(word) for word in (plugin["command"], *(plugin.get("args") or ()))]
    pairs = [pair for pair in plugin.get("env") or () if isinstance(pair, dict)]
    given = {str(pair.get("name")): str(pair.get("value")) for pair in pairs}
    query: dict[str, Any] = {
        "apiVersion": plugin.get("apiVersion"),
        "kind": "ExecCredential",
        "spec": {},
    }
    environ = {**os.environ, **given, "KUBERNETES_EXEC_INFO": json.dumps(query)}
    try:
        answer = subprocess.run(
            argv,
            capture_output=True,
            stdin=subprocess.DEVNULL,
            env=environ,
            timeout=_PLUGIN_SECONDS,
        )
        if answer.returncode:
            lines = answer.stderr.decode("utf-8", "replace").strip().splitlines()
            raise config.wrong(f"exec {argv[0]}", lines[-1] if lines else "failed")
        return dict(json.loads(answer.stdout)["status"])
    except subprocess.TimeoutExpired:
        raise config.wrong(f"exec {argv[0]}", f"no answer in {_PLUGIN_SECONDS:.0f} s") from None
    except OSError as error:
        raise config.wrong(f"exec {argv[0]}", str(error.strerror)) from error
    except (ValueError, KeyError, TypeError):
        raise config.wrong(f"exec {argv[0]}", "its answer is no ExecCredential") from None


def _authorization(config: _Config, user: dict[str, Any]) -> str:
    """Return the Authorization header, "" for a user that has a certificate instead."""
    token = user.get("token")
    if not token and user.get("tokenFile"):
        try:
            with open(str(user["tokenFile"]), encoding="utf-8") as file:
                token = file.read().strip()
        except OSError as error:
            raise config.wrong(f"tokenFile: {user['tokenFile']}", str(error.strerror)) from error
    if token:
        return f"Bearer {token}"
    if user.get("username"):
        pair = f"{user['username']}:{user.get('password', '')}"
        return f"Basic {base64.b64encode(pair.encode()).decode()}"
    return ""


def node_object(kubeconfig: str, name: str) -> Any:
    """Return the Node object of that name; raises KrunError that names cause and way out."""
    config = _Config(kubeconfig)
    user = config.user
    if user.get("exec"):
        found = _ask_plugin(config, user["exec"])
        user = {"token": found.get("token")}
        for given, field in _PLUGIN_DATA:
            if found.get(given):
                user[field] = base64.b64encode(str(found[given]).encode()).decode()
    header = _authorization(config, user)

    def authorize(request: requests.PreparedRequest) -> requests.PreparedRequest:
        # Set here, so that no ~/.netrc takes its place.
        if header:
            request.headers["Authorization"] = header
        return request

    with ExitStack() as stack:
        verify: bool | str = config.file(config.cluster, "certificate-authority", stack) or True
        if config.cluster.get("insecure-skip-tls-verify") is True:
            verify = False
        certificate = config.file(user, "client-certificate", stack)
        key = config.file(user, "client-key", stack)
        try:
            answer = requests.get(
                f"{config.server}/api/v1/nodes/{quote(name, safe='')}",
                headers={"Accept": "application/json"},
                auth=authorize,
                verify=verify,
                cert=(certificate, key) if certificate and key else None,
                timeout=_SECONDS,
                allow_redirects=False,
            )
        except requests.Timeout:
            raise _failed(
                config, f"no answer in {_SECONDS:.0f} s", "is the API server up?"
            ) from None
        except requests.RequestException as error:
            raise _unreachable(config, str(error)) from error
        except OSError as error:
            raise config.wrong("certificates", str(error)) from error
    return _checked(config, name, answer)


def _failed(config: _Config, text: str, hint: str) -> KrunError:
    return KrunError(f"Kubernetes at {config.server}: {text}", hint)


def _unreachable(config: _Config, text: str) -> KrunError:
    lowered = text.lower()
    for words, cause, hint in (
        ("pem lib", "the client's certificate or key cannot be read", "check client-certificate"),
        ("certificate", "its certificate is not good", "check certificate-authority in kubeconfig"),
        ("refused", "connection refused", "is the API server up?"),
        ("resolution", "its name has no address", "check clusters[].cluster.server"),
        ("not known", "its name has no address", "check clusters[].cluster.server"),
    ):
        if words in lowered:
            return _failed(config, cause, f"{hint} ({config.path})")
    return _failed(config, text.splitlines()[0][:200], f"check {config.path}")


def _checked(config: _Config, name: str, answer: requests.Response) -> Any:
    status = answer.status_code
    try:
        document = answer.json()
    except ValueError:
        document = None
    said = document.get("message") if isinstance(document, dict) else None
    if status == 401:
        raise _failed(
            config, "takes no credentials of this user (401)", f"renew those of {config.path}"
        )
    if status == 403:
        raise _failed(
            config,
            f"does not let this user see node {name} (403): {said or 'forbidden'}",
            "give it a role with the verb get on nodes",
        )
    if status == 404:
        raise _failed(config, f"has no node {name} (404)", "name this node with --node")
    if status != 200:
        raise _failed(
            config, f"HTTP status {status}: {said or answer.reason}", f"see {config.path}"
        )
    if not isinstance(document, dict) or document.get("kind") != "Node":
        raise _failed(config, "its answer is no Node object", f"check server in {config.path}")
    return document
