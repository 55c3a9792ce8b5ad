from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from krun import policy
from krun.errors import KrunError

SHA = "ab" * 32


def write(directory: Path, name: str, text: str) -> str:
    path = directory / name
    path.write_text(text)
    path.chmod(0o644)
    return str(path)


def load(directory: Path) -> policy.Policy:
    return policy.load(None, str(directory), str(directory / "list"))


def test_no_file_is_the_built_in_policy(tmp_path: Path) -> None:
    assert load(tmp_path) == policy.Policy()


def test_json_and_toml_say_the_same(tmp_path: Path) -> None:
    document = {
        "defaults": {"engine": "crun", "monitor": "km", "mode": "label", "km": {"verbose": True}},
        "paths": {"km": "/opt/km", "crun": "/usr/bin/crun"},
        "directInvocation": [{"path": "/bin/ping", "sha256": SHA.upper()}],
        "allow": {"gdb": True},
    }
    toml = f"""
        [defaults]
        engine = "crun"
        monitor = "km"
        mode = "label"
        km = {{ verbose = true }}
        [paths]
        km = "/opt/km"
        crun = "/usr/bin/crun"
        [[directInvocation]]
        path = "/bin/ping"
        sha256 = "{SHA}"
        [allow]
        gdb = true
    """
    write(tmp_path, "policy.json", json.dumps(document))
    first = load(tmp_path)
    os.unlink(tmp_path / "policy.json")
    write(tmp_path, "policy.toml", toml)
    second = load(tmp_path)
    assert first._replace(source="") == second._replace(source="")
    assert first.direct == (policy.Direct("/bin/ping", "", "", SHA),)
    assert (first.mode, first.km_path, first.km) == ("label", "/opt/km", {"verbose": True})


@pytest.mark.parametrize(
    "document, message",
    [
        ({"default": {}}, "default: is not a known property"),
        ({"defaults": []}, "defaults: must be an object"),
        ({"defaults": {"engine": "runc"}}, "defaults.engine: must be one of"),
        ({"defaults": {"init": "tini"}}, "defaults.init: must be auto, none"),
        ({"paths": {"km": "km"}}, "paths.km: must be absolute"),
        ({"directInvocation": {}}, "directInvocation: must be an array"),
        ({"directInvocation": [{"sha256": SHA}]}, "must have path or pattern"),
        ({"directInvocation": [{"path": "/a", "sha256": "xy"}]}, "64 hexadecimal digits"),
        ({"directInvocation": [{"pattern": "/a", "sha256": SHA}]}, "is required with pattern"),
        (
            {"directInvocation": [{"pattern": "(", "target": "/a", "sha256": SHA}]},
            "is no regular expression",
        ),
        ({"allow": {"everything": True}}, "allow.everything: is not a known property"),
    ],
)
def test_every_mistake_is_named(tmp_path: Path, document: object, message: str) -> None:
    path = write(tmp_path, "policy.json", json.dumps(document))
    with pytest.raises(KrunError) as caught:
        load(tmp_path)
    assert str(caught.value).startswith(path)
    assert message in str(caught.value)


def test_not_json_and_not_toml(tmp_path: Path) -> None:
    for name, text in (("policy.json", "{"), ("policy.toml", "= 1")):
        path = write(tmp_path, name, text)
        with pytest.raises(KrunError, match=path):
            load(tmp_path)
        os.unlink(path)


def test_two_files_are_one_too_many(tmp_path: Path) -> None:
    write(tmp_path, "policy.json", "{}")
    write(tmp_path, "policy.toml", "")
    with pytest.raises(KrunError, match="only one of them may exist"):
        load(tmp_path)


def test_a_file_that_others_can_write_is_refused(tmp_path: Path) -> None:
    os.chmod(write(tmp_path, "policy.json", "{}"), 0o666)
    with pytest.raises(KrunError, match="others than its owner can write it"):
        load(tmp_path)


def test_a_directory_is_no_policy(tmp_path: Path) -> None:
    (tmp_path / "policy.json").mkdir()
    with pytest.raises(KrunError, match=r"policy\.json: is a directory"):
        load(tmp_path)


def test_neither_a_fifo_nor_a_link_to_nothing_is_no_policy(tmp_path: Path) -> None:
    path = tmp_path / "policy.json"
    os.mkfifo(path)
    with pytest.raises(KrunError, match=r"policy\.json: is no regular file"):
        load(tmp_path)
    path.unlink()
    path.symlink_to("moved-away.json")
    with pytest.raises(KrunError, match=r"policy\.json: is a link to no file"):
        load(tmp_path)


def test_the_original_list(tmp_path: Path) -> None:
    write(tmp_path, "list", f"# tools\n\n^/bin/ping$:/bin/ping:{SHA}\nsocat:/usr/bin/socat:{SHA}\n")
    direct = load(tmp_path).direct
    assert [(d.target, d.sha256) for d in direct] == [("/bin/ping", SHA), ("/usr/bin/socat", SHA)]
    from krun.direct import matches

    assert matches(direct[0], ("/bin/ping",)) and not matches(direct[0], ("/bin/ping6",))
    assert matches(direct[1], ("/usr/local/bin/socat",))


@pytest.mark.parametrize("line", ["ping", "a:b", f"ping:bin/ping:{SHA}", "a:/b:12", f"(:/b:{SHA}"])
def test_a_bad_line_of_the_original_list(tmp_path: Path, line: str) -> None:
    path = write(tmp_path, "list", f"# one\n{line}\n")
    with pytest.raises(KrunError, match=f"{path}:2: "):
        load(tmp_path)


def test_a_named_file_must_exist(tmp_path: Path) -> None:
    with pytest.raises(KrunError, match="no such file"):
        policy.load(str(tmp_path / "none.json"))
