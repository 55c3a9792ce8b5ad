"""krun validate names every violation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from krun.__main__ import main


def write(directory: Path, document: Any) -> str:
    (directory / "config.json").write_text(json.dumps(document))
    return str(directory)


MINIMAL = {"ociVersion": "1.2.0", "root": {"path": "rootfs"}}


def test_valid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", "--bundle", write(tmp_path, MINIMAL)]) == 0
    assert capsys.readouterr().out == "valid\n"


def test_text_names_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = {
        "ociVersion": 1,
        "mounts": [{"destination": "a"}],
        "annotations": {
            "app.kontain.monitor": "qemu",
            "app.kontain.km.membus-width": "64",
            "app.kontain.engine": "crun",
            "\ud800\n": "x",
        },
    }
    assert main(["validate", "--bundle", write(tmp_path, document)]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "root: is required",
        "ociVersion: must be a string, is an integer",
        "mounts[0].destination: must be absolute",
        'annotations["\\ud800\\n"]: must not contain NUL or a lone surrogate',
        'annotations["app.kontain.monitor"]: must be one of km, builtin, none, auto',
        'annotations["app.kontain.km.membus-width"]: must be 32 to 39',
    ]


def test_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = write(tmp_path, {**MINIMAL, "hostname": None})
    assert main(["validate", "--bundle", bundle, "--format", "json"]) == 1
    assert json.loads(capsys.readouterr().out) == {
        "valid": False,
        "violations": [{"path": "hostname", "message": "must be a string, is null"}],
    }
    assert main(["validate", "--bundle", write(tmp_path, MINIMAL), "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"valid": True, "violations": []}


def test_config_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other.json"
    other.write_text(json.dumps({**MINIMAL, "linux": {"namespaces": [{"type": "net"}]}}))
    assert main(["validate", "--config", str(other)]) == 1
    assert capsys.readouterr().out.startswith("linux.namespaces[0].type: must be one of pid, ")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty, a JSON value was expected"),
        (b'{"ociVersion": ', "ends too early at line 1 column"),
        (b'{"a": \xff}', "not UTF-8 at byte 6"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_not_json(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], content: bytes, message: str
) -> None:
    (tmp_path / "config.json").write_bytes(content)
    assert main(["validate", "--bundle", str(tmp_path)]) == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert message in err and err.count("\n") == 1


def test_no_bundle(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", "--bundle", str(tmp_path / "absent")]) == 1
    assert "no such directory" in capfd.readouterr().err
    assert main(["validate", "--bundle", str(tmp_path)]) == 1
    assert "config.json: no such file" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        (
            {"kontain": {"network": {"ports": ["80:80", "80:81"]}}},
            "kontain.network.ports",
        ),
        ({"annotations": {"app.kontain.network": "wifi"}}, "annotations"),
        ({"kontain": {"network": {"port": []}}}, "kontain.network.port"),
    ],
)
def test_network(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], path: str
) -> None:
    assert main(["validate", "--bundle", write(tmp_path, {**MINIMAL, **changes})]) == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(path)
