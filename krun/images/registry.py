"""Ask a registry what a name leads to: digest, layers and sizes (distribution-spec, pull)."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tomllib
import warnings
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlencode

import requests
import urllib3

from krun.errors import KrunError
from krun.images.credentials import Credential
from krun.images.references import DEFAULT_HOST, Reference
from krun.images.stores.model import Layer, Manifest
from krun.record import Record

_INDEXES = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
_MANIFESTS = (
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)
_ACCEPT = ", ".join(_INDEXES + _MANIFESTS)
_SECONDS = (5.0, 30.0)
# A manifest larger than this is refused by registries too (distribution-spec: 4 MiB).
_LIMIT = 4 << 20
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm", "i686": "386"}


class RegistryFailed(KrunError):
    """The registry did not answer the question; `status` is its HTTP status, 0 for none."""

    def __init__(self, message: str, status: int = 0, hint: str = "") -> None:
        super().__init__(message, hint)
        self.status = status


class Access(Record):
    """How to reach one registry: `certificates` is a directory with *.crt, or ""."""

    scheme: str
    insecure: bool
    certificates: str


def certificates_of(host: str, directories: Sequence[str]) -> str:
    """Return the certs.d directory of a host (containers-certs.d(5)), "" if there is none."""
    for directory in directories:
        path = f"{directory}/{host}"
        try:
            if any(name.endswith(".crt") for name in os.listdir(path)):
                return path
        except OSError:
            continue
    return ""


def _is_loopback(host: str) -> bool:
    name = host.rsplit(":", 1)[0] if not host.startswith("[") else host.partition("]")[0][1:]
    return name in ("localhost", "::1") or name.startswith("127.")


def _certificate_file(directory: str) -> str:
    names = sorted(name for name in os.listdir(directory) if name.endswith(".crt"))
    return f"{directory}/{'ca.crt' if 'ca.crt' in names else names[0]}"


class Registry:
    """Questions to registries, with their schemes, tokens and connections kept between them."""

    def __init__(self, insecure_hosts: Sequence[str], certs_directories: Sequence[str]) -> None:
        self._insecure = frozenset(insecure_hosts)
        self._directories = certs_directories
        self._access: dict[str, Access] = {}
        self._tokens: dict[tuple[str, str, Credential | None], str] = {}
        self._http = requests.Session()
        # Proxies still come from the environment; ~/.netrc must not lend its passwords.
        self._http.auth = _no_netrc

    def access(self, host: str) -> Access:
        """Find out how a host is reached: plain HTTP only where it is insecure or loopback."""
        known = self._access.get(host)
        if known is not None:
            return known
        certificates = certificates_of(host, self._directories)
        insecure = host in self._insecure
        access = Access("https", insecure, certificates)
        if insecure or _is_loopback(host):
            try:
                with warnings.catch_warnings():
                    # Only the scheme is asked for here; nothing is sent or believed.
                    warnings.simplefilter("ignore", urllib3.exceptions.InsecureRequestWarning)
                    self._http.get(f"https://{_endpoint(host)}/v2/", timeout=_SECONDS, verify=False)
            except requests.exceptions.SSLError:
                access = access._replace(scheme="http")
            except requests.RequestException:
                if self._speaks_http(host):
                    access = access._replace(scheme="http")
                else:
                    # Nobody answers: nothing was learnt, ask again next time.
                    return access
        self._access[host] = access
        return access

    def _speaks_http(self, host: str) -> bool:
        try:
            self._http.get(f"http://{_endpoint(host)}/v2/", timeout=_SECONDS, stream=True).close()
        except requests.RequestException:
            return False
        return True

    def _get(
        self,
        reference: Reference,
        path: str,
        credential: Credential | None,
        method: str = "GET",
    ) -> requests.Response:
        access = self.access(reference.host)
        verify: bool | str = not access.insecure
        if verify and access.certificates:
            verify = _certificate_file(access.certificates)
        url = f"{access.scheme}://{_endpoint(reference.host)}/v2/{reference.path}/{path}"
        key = (reference.host, reference.path, credential)
        headers = {"Accept": _ACCEPT}
        if key in self._tokens:
            headers["Authorization"] = self._tokens[key]
        try:
            answer = self._http.request(
                method, url, headers=headers, timeout=_SECONDS, verify=verify
            )
            challenge = answer.headers.get("WWW-Authenticate", "")
            if answer.status_code == 401 and challenge:
                authorization = self._authorize(challenge, reference, credential, verify)
                if authorization:
                    self._tokens[key] = headers["Authorization"] = authorization
                    answer = self._http.request(
                        method, url, headers=headers, timeout=_SECONDS, verify=verify
                    )
        except requests.RequestException as error:
            raise RegistryFailed(f"registry {reference.host}: {_cause(error)}") from error
        if answer.status_code in (401, 403):
            raise RegistryFailed(
                f"registry {reference.host}: {reference.path}: access denied",
                answer.status_code,
                "check the registry credentials",
            )
        if answer.status_code == 404:
            raise RegistryFailed(f"registry {reference.host}: {reference} is not there", 404)
        if answer.status_code != 200:
            raise RegistryFailed(
                f"registry {reference.host}: HTTP status {answer.status_code}", answer.status_code
            )
        return answer

    def authorization(self, reference: Reference, credential: Credential | None) -> str:
        """Return the Authorization header that opens a repository, "" where none is needed.

        Raises RegistryFailed.
        """
        if credential is None:
            return ""
        self._get(reference, f"manifests/{reference.digest or reference.tag}", credential, "HEAD")
        return self._tokens.get((reference.host, reference.path, credential), "")

    def _authorize(
        self,
        challenge: str,
        reference: Reference,
        credential: Credential | None,
        verify: bool | str,
    ) -> str:
        """Answer a challenge (RFC 7235; distribution's token authentication)."""
        scheme, _, rest = challenge.partition(" ")
        if scheme.lower() == "basic":
            return f"Basic {credential.encoded()}" if credential else ""
        if scheme.lower() != "bearer":
            return ""
        fields = requests.utils.parse_dict_header(rest)  # type: ignore[no-untyped-call]
        realm = fields.get("realm", "")
        if not realm.startswith(("https://", "http://")):
            return ""
        scope = f"repository:{reference.path}:pull"
        query = {"scope": scope}
        if fields.get("service"):
            query["service"] = fields["service"]
        if credential and credential.identity_token:
            answer = self._http.post(
                realm,
                data={
                    **query,
                    "grant_type": "refresh_token",
                    "client_id": "krun",
                    "refresh_token": credential.identity_token,
                },
                timeout=_SECONDS,
                verify=verify,
            )
        else:
            headers = {"Authorization": f"Basic {credential.encoded()}"} if credential else {}
            answer = self._http.get(
                f"{realm}?{urlencode(query)}", headers=headers, timeout=_SECONDS, verify=verify
            )
        if answer.status_code != 200:
            return ""
        try:
            body = answer.json()
        except ValueError:
            return ""
        token = body.get("token") or body.get("access_token") or ""
        return f"Bearer {token}" if token else ""

    def _manifest(
        self, reference: Reference, version: str, credential: Credential | None
    ) -> tuple[str, dict[str, Any]]:
        """Return digest and object of a manifest, its content checked against the digest."""
        answer = self._get(reference, f"manifests/{version}", credential)
        body = answer.content
        if len(body) > _LIMIT:
            raise RegistryFailed(f"registry {reference.host}: {reference}: manifest over 4 MiB")
        digest = "sha256:" + hashlib.sha256(body).hexdigest()
        if version.startswith("sha256:") and version != digest:
            raise RegistryFailed(f"registry {reference.host}: {reference}: content is {digest}")
        try:
            document = json.loads(body)
        except ValueError:
            document = None
        if not isinstance(document, dict):
            raise RegistryFailed(f"registry {reference.host}: {reference}: manifest is not JSON")
        return digest, document

    def digest(self, reference: Reference, credential: Credential | None) -> str:
        """Return the digest that a name leads to, "" if the registry does not say."""
        answer = self._get(reference, f"manifests/{reference.tag}", credential, "HEAD")
        return answer.headers.get("Docker-Content-Digest", "")

    def resolve(
        self, reference: Reference, credential: Credential | None, diff_ids: bool = False
    ) -> Manifest:
        """Return what a reference leads to on this platform; raises RegistryFailed.

        With `diff_ids` the image's configuration is read too.
        """
        digest, document = self._manifest(reference, reference.digest or reference.tag, credential)
        own = digest
        if "manifests" in document:
            own = _for_platform(document, reference)
            own, document = self._manifest(reference, own, credential)
        try:
            config = str(document["config"]["digest"])
            pairs = [(str(layer["digest"]), int(layer["size"])) for layer in document["layers"]]
        except (KeyError, TypeError, ValueError):
            raise RegistryFailed(
                f"registry {reference.host}: {reference}: not an image manifest (schema 2 or OCI)"
            ) from None
        contents = [""] * len(pairs)
        if diff_ids:
            try:
                blob = self._get(reference, f"blobs/{config}", credential).json()
                found = [str(diff_id) for diff_id in blob["rootfs"]["diff_ids"]]
            except (ValueError, KeyError, TypeError):
                found = []
            if len(found) == len(pairs):
                contents = found
        layers = tuple(
            Layer(blob_digest, content, size)
            for (blob_digest, size), content in zip(pairs, contents, strict=True)
        )
        return Manifest(digest, own, config, layers)


def _no_netrc(request: requests.PreparedRequest) -> requests.PreparedRequest:
    return request


def _endpoint(host: str) -> str:
    return "registry-1.docker.io" if host == DEFAULT_HOST else host


def _cause(error: BaseException) -> str:
    """Return the innermost reason of a connection's failure, on one line."""
    text = str(error)
    for words in (
        "Connection refused",
        "Name or service not known",
        "Temporary failure in name resolution",
        "Network is unreachable",
        "Connection reset by peer",
        "certificate verify failed",
        "timed out",
    ):
        if words in text:
            return words
    return text.splitlines()[0] if text else type(error).__name__


def _for_platform(index: dict[str, Any], reference: Reference) -> str:
    """Return the digest of the index's manifest for this machine."""
    architecture = _ARCHITECTURES.get(platform.machine(), platform.machine())
    for entry in index["manifests"]:
        wanted = entry.get("platform") or {}
        if wanted.get("os") == "linux" and wanted.get("architecture") == architecture:
            return str(entry["digest"])
    raise RegistryFailed(
        f"registry {reference.host}: {reference}: has no image for linux/{architecture}"
    )


def hosts_toml(host: str, access: Access, authorization: str) -> str:
    """Return containerd's hosts.toml that reaches a registry so (containerd docs/hosts.md)."""
    server = f"{access.scheme}://{_endpoint(host)}"
    lines = [
        f"server = {json.dumps(server)}",
        f"[host.{json.dumps(server)}]",
        'capabilities = ["pull", "resolve"]',
    ]
    if access.certificates:
        lines.append(f"ca = {json.dumps(_certificate_file(access.certificates))}")
    if access.insecure:
        lines.append("skip_verify = true")
    if authorization:
        lines.append(f"[host.{json.dumps(server)}.header]")
        lines.append(f"authorization = [{json.dumps(authorization)}]")
    text = "\n".join(lines) + "\n"
    tomllib.loads(text)
    return text
