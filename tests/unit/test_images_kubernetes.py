"""A node's labels from Kubernetes: against an HTTPS server that checks what it is given."""

from __future__ import annotations

import base64
import http.server
import json
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import needs
import pytest

from krun.errors import KrunError
from krun.images import kubernetes, node, settings

pytestmark = needs.mark("openssl")

NODE = {
    "apiVersion": "v1",
    "kind": "Node",
    "metadata": {"name": "node-1", "labels": {"zone": "a", "kubernetes.io/arch": "riscv64"}},
}
TOKEN = "s3cret-token"


class ApiServer:
    """Answers GET /api/v1/nodes/node-1 of who shows the token or a certificate of its CA."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.ca = self._certificate("ca", "/CN=test CA")
        self._certificate("server", "/CN=server", "subjectAltName=IP:127.0.0.1")
        self._certificate("client", "/CN=system:node:node-1")
        self._certificate("other-ca", "/CN=another CA")
        self.seen: list[tuple[str, str]] = []
        self.answer: tuple[int, Any] | None = None
        self.delay = 0.0
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.seen.append((self.path, self.headers.get("Authorization", "")))
                time.sleep(outer.delay)
                status, body = outer.answer or outer.judge(self)
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                with suppress(OSError):
                    self.wfile.write(data)

            def log_message(self, *words: object) -> None:
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(base / "server.crt", base / "server.key")
        context.load_verify_locations(base / "ca.crt")
        context.verify_mode = ssl.CERT_OPTIONAL
        self.http.socket = context.wrap_socket(self.http.socket, server_side=True)
        self.url = f"https://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def _certificate(self, name: str, subject: str, extension: str = "") -> bytes:
        """Make NAME.crt and NAME.key, signed by the CA but for a CA itself."""
        made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
        made += ["-subj", subject]
        made += ["-keyout", f"{self.base}/{name}.key", "-out", f"{self.base}/{name}.crt"]
        if not name.endswith("ca"):
            made += ["-CA", f"{self.base}/ca.crt", "-CAkey", f"{self.base}/ca.key"]
            made += ["-addext", "basicConstraints=critical,CA:FALSE"]
        if extension:
            made += ["-addext", extension]
        subprocess.run(made, check=True, capture_output=True)
        return (self.base / f"{name}.crt").read_bytes()

    def judge(self, request: http.server.BaseHTTPRequestHandler) -> tuple[int, Any]:
        token = request.headers.get("Authorization", "")
        peer = request.connection.getpeercert()  # type: ignore[attr-defined]
        if (
            token not in (f"Bearer {TOKEN}", "Basic " + base64.b64encode(b"ann:pw").decode())
            and not peer
        ):
            return 401, {"kind": "Status", "message": "Unauthorized"}
        if request.path != "/api/v1/nodes/node-1":
            return 404, {"kind": "Status", "message": "not found"}
        return 200, NODE


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    server = ApiServer(tmp_path_factory.mktemp("api"))
    yield server
    server.http.shutdown()
    server.http.server_close()


@pytest.fixture
def api(started: ApiServer) -> ApiServer:
    started.answer, started.delay = None, 0.0
    started.seen.clear()
    return started


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


@pytest.fixture
def write(api: ApiServer, tmp_path: Path) -> Callable[..., str]:
    def write(user: dict[str, Any], **cluster: Any) -> str:
        cluster = {"server": api.url, "certificate-authority-data": b64(api.ca), **cluster}
        path = tmp_path / "kubeconfig"
        path.write_text(
            json.dumps(
                {
                    "apiVersion": "v1",
                    "kind": "Config",
                    "current-context": "here",
                    "contexts": [{"name": "here", "context": {"cluster": "c", "user": "u"}}],
                    "clusters": [
                        {"name": "other", "cluster": {}},
                        {"name": "c", "cluster": cluster},
                    ],
                    "users": [{"name": "u", "user": user}],
                }
            )
        )
        return str(path)

    return write


Write = Callable[..., str]


def test_every_way_to_say_who_one_is(api: ApiServer, write: Write, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    plugin = tmp_path / "plugin"
    plugin.write_text(
        '#!/bin/sh\n[ "$REGION" = here ] && [ "$1" = token ] || exit 1\n'
        "echo '" + json.dumps({"kind": "ExecCredential", "status": {"token": TOKEN}}) + "'\n"
    )
    plugin.chmod(0o755)
    users = (
        {"token": TOKEN},
        {"tokenFile": str(tmp_path / "token")},
        {"username": "ann", "password": "pw"},
        {
            "client-certificate-data": b64((api.base / "client.crt").read_bytes()),
            "client-key-data": b64((api.base / "client.key").read_bytes()),
        },
        {
            "client-certificate": str(api.base / "client.crt"),
            "client-key": str(api.base / "client.key"),
        },
        {
            "exec": {
                "command": str(plugin),
                "args": ["token"],
                "env": [{"name": "REGION", "value": "here"}],
            }
        },
    )
    for user in users:
        assert node.from_kubernetes(write(user), "node-1")["zone"] == "a", user
    assert {path for path, _ in api.seen} == {"/api/v1/nodes/node-1"}
    # A file beside the kubeconfig, as relative names are meant.
    (tmp_path / "ca.crt").write_bytes(api.ca)
    named = {"certificate-authority-data": "", "certificate-authority": "ca.crt"}
    assert node.from_kubernetes(write({"token": TOKEN}, **named), "node-1")["zone"] == "a"


def test_the_labels_of_a_node(api: ApiServer, write: Write, tmp_path: Path) -> None:
    table = {"node": "node-1", "kubeconfig": write({"token": TOKEN})}
    here = node.load(settings.parse(table, "test"))
    assert here.name == "node-1"
    assert (here.labels["zone"], here.labels["kubernetes.io/arch"]) == ("a", "riscv64")
    # What a file says is on top.
    (tmp_path / "labels").write_text("zone=b\n")
    table["labels_file"] = str(tmp_path / "labels")
    assert node.load(settings.parse(table, "test")).labels["zone"] == "b"


def test_nothing_is_told_to_a_server_of_another_ca(api: ApiServer, write: Write) -> None:
    other = b64((api.base / "other-ca.crt").read_bytes())
    path = write({"token": TOKEN}, **{"certificate-authority-data": other})
    with pytest.raises(KrunError, match="its certificate is not good") as caught:
        kubernetes.node_object(path, "node-1")
    assert path in caught.value.hint
    assert api.seen == []


ANSWERS: dict[str, tuple[int, Any, str]] = {
    "takes no credentials of this user (401)": (401, {"message": "Unauthorized"}, "renew"),
    'nodes "node-1" is forbidden': (403, {"message": 'nodes "node-1" is forbidden'}, "role"),
    "has no node node-1 (404)": (404, {"message": "x"}, "--node"),
    "HTTP status 503: starting": (503, {"message": "starting"}, "see"),
    "HTTP status 302": (302, b"", "see"),
    "its answer is no Node object": (200, {"kind": "Pod"}, "check server"),
    "answer is no Node object": (200, b"<html>", "check server"),
}


@pytest.mark.parametrize("words", ANSWERS)
def test_answers_that_say_no(api: ApiServer, write: Write, words: str) -> None:
    status, body, hint = ANSWERS[words]
    api.answer = (status, body)
    with pytest.raises(KrunError) as caught:
        kubernetes.node_object(write({"token": TOKEN}), "node-1")
    assert words in caught.value.message and api.url in caught.value.message
    assert hint in caught.value.hint
    assert TOKEN not in str(caught.value) and "\n" not in str(caught.value)


def test_a_wrong_token(api: ApiServer, write: Write) -> None:
    with pytest.raises(KrunError, match="401"):
        kubernetes.node_object(write({"token": "wrong"}), "node-1")
    assert api.seen == [("/api/v1/nodes/node-1", "Bearer wrong")]


def test_a_server_that_is_silent_or_gone(
    api: ApiServer, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kubernetes, "_SECONDS", 0.3)
    api.delay = 1.0
    with pytest.raises(KrunError, match="no answer in 0 s"):
        kubernetes.node_object(write({"token": TOKEN}), "node-1")
    with pytest.raises(KrunError, match="connection refused"):
        kubernetes.node_object(write({"token": TOKEN}, server="https://127.0.0.1:9"), "node-1")


def test_bad_kubeconfigs_name_file_and_field(write: Write, tmp_path: Path) -> None:
    path = tmp_path / "bad"
    for text, words in (
        ("", "there is no current context"),
        ("[]", "there is no current context"),
        ("{current-context: x}", "contexts: has no 'x'"),
        ("{current-context: x, contexts: [{name: x, context: {cluster: y}}]}", "clusters: has no"),
        ("{", "is not YAML"),
    ):
        path.write_text(text)
        with pytest.raises(KrunError) as caught:
            kubernetes.node_object(str(path), "n")
        assert words in str(caught.value) and str(path) in str(caught.value)
    for user, cluster, words in (
        ({"token": TOKEN}, {"server": "http://x"}, "cluster.server: must be an https:// address"),
        (
            {"token": TOKEN},
            {"certificate-authority-data": "?"},
            "certificate-authority-data: is not",
        ),
        ({"tokenFile": "/none"}, {}, "tokenFile: /none: No such file"),
        ({"client-certificate": "none.crt"}, {}, "none.crt cannot be read"),
        ({"client-certificate-data": b64(b"x"), "client-key-data": b64(b"x")}, {}, "certificate"),
        ({"exec": {"command": "/none"}}, {}, "exec /none: No such file"),
        ({"exec": {"command": "/bin/false"}}, {}, "exec /bin/false: failed"),
        ({"exec": {"command": "/bin/echo"}}, {}, "its answer is no ExecCredential"),
        ({"exec": {}, "token": ""}, {}, "401"),
    ):
        with pytest.raises(KrunError) as caught:
            kubernetes.node_object(write(user, **cluster), "node-1")
        assert words in str(caught.value), user
        assert "\n" not in str(caught.value)
    with pytest.raises(KrunError, match="No such file"):
        kubernetes.node_object(str(tmp_path / "none"), "n")
