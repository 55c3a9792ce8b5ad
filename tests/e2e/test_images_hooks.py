"""The image hooks, run by podman, by dockerd and by containerd through a real runtime."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import images_parts as parts
import needs
import pytest

pytestmark = needs.mark(*parts.STORES, "runc", root=parts.ROOT)

ROOT = Path(__file__).resolve().parent.parent.parent
HOOKS = ROOT / "hooks"
HEAVY = {"argparse", "collections", "ctypes", "enum", "json", "logging", "pathlib", "re",
         "subprocess", "typing"}  # fmt: skip


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[parts.Registry]:
    with parts.registry(tmp_path_factory.mktemp("registry") / "r") as registry:
        registry.push("app/sh", "1", [parts.busybox_layer()], config={"Cmd": ["/bin/true"]})
        registry.push("app/next", "1", [parts.layer("next")])
        yield registry


class Node:
    """A podman with the hooks.d files of this tree, and krun's state beside it."""

    def __init__(self, table: dict[str, Any], base: Path, image: str) -> None:
        self.base, self.image = base, image
        self.state, self.policy = base / "state", base / "policy.json"
        self.config = base / "images.toml"
        podman = "".join(f"{key} = {json.dumps(value)}\n" for key, value in table.items())
        self.config.write_text(
            f'store = "podman"\nstate_directory = "{self.state}"\ndisk_reserve = "0"\n'
            f"[podman]\n{podman}"
        )
        self.krun = base / "krun"
        self.krun.write_text(f'#!/bin/sh\ncd {ROOT}\nexec {sys.executable} -m krun "$@"\n')
        self.krun.chmod(0o755)
        self.argv = ["podman", f"--root={table['root']}", f"--runroot={table['runroot']}",
                     *table["options"]]  # fmt: skip
        self.hooks()

    def hooks(self, *options: str) -> None:
        """Install the hooks.d files with this tree's programs and these options."""
        folder = self.base / "hooks.d"
        folder.mkdir(exist_ok=True)
        for file in (HOOKS / "hooks.d").glob("*.json"):
            document = json.loads(file.read_text())
            name = Path(document["hook"]["path"]).name
            document["hook"]["path"] = str(HOOKS / name)
            document["hook"]["args"] += [
                f"--state={self.state}", f"--policy={self.policy}", f"--krun={self.krun}",
                f"--config={self.config}", *options,
            ]  # fmt: skip
            (folder / file.name).write_text(json.dumps(document))

    def run(self, *annotations: str) -> subprocess.CompletedProcess[str]:
        words = [f"--annotation={annotation}" for annotation in annotations]
        return subprocess.run(
            [*self.argv, f"--hooks-dir={self.base}/hooks.d", "--runtime=runc", "run", "--rm",
             "--network=none", "--ulimit=nofile=1024:1024", "--ulimit=nproc=1024:1024",
             "--pull=never", *words, self.image],
            capture_output=True, text=True,
        )  # fmt: skip

    def images(self, *words: str) -> str:
        return subprocess.run(
            [str(self.krun), "images", *words, f"--config={self.config}"],
            check=True, capture_output=True, text=True,
        ).stdout  # fmt: skip

    def ledger(self) -> list[dict[str, Any]]:
        path = self.state / "ledger.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture(scope="module")
def table(served: parts.Registry) -> Iterator[dict[str, Any]]:
    with parts.podman() as table:
        subprocess.run(
            ["podman", f"--root={table['root']}", f"--runroot={table['runroot']}", "pull", "-q",
             "--tls-verify=false", f"{served.host}/app/sh:1"],
            check=True, capture_output=True,
        )  # fmt: skip
        yield table


@pytest.fixture
def node(table: dict[str, Any], served: parts.Registry, tmp_path: Path) -> Node:
    return Node(table, tmp_path, f"{served.host}/app/sh:1")


def test_starts_and_stops_are_recorded(node: Node) -> None:
    done = node.run("kontain.app/images-cache=true")
    assert done.returncode == 0, done.stderr
    check, start, stop = node.ledger()
    assert check["event"] == "check" and check["findings"]
    assert (start["event"], stop["event"]) == ("start", "stop")
    assert start["image"] == node.image
    assert start["id"].startswith("sha256:")
    assert start["cache"] is True
    assert "warm" not in start
    assert 0 <= start["start_ms"] < 20_000
    assert start["container"] == stop["container"]
    suggested = node.images("cache", "suggest", "--annotated")
    assert node.image in suggested
    # After a pass over the store the image is known, and the next start is warm.
    node.images("ls")
    node.run()
    assert node.ledger()[-2]["warm"] is True
    assert node.ledger()[-2]["digest"].startswith("sha256:")


def test_installed_hooks_run_and_go_without_a_trace(node: Node) -> None:
    prefix, hooks = node.base / "usr", node.base / "hooks.d"
    for file in hooks.iterdir():
        file.unlink()
    where = [f"--prefix={prefix}", f"--hooks-dir={hooks}"]
    node.images("hooks", *where, f"--state={node.state}")
    done = node.run()
    assert done.returncode == 0, done.stderr
    assert [entry["event"] for entry in node.ledger()] == ["check", "start", "stop"]
    node.images("hooks", *where, "--remove")
    assert list(hooks.iterdir()) == []
    assert list((prefix / "lib").iterdir()) == []


def test_a_cold_start_is_refused_with_the_way_out(node: Node) -> None:
    done = node.run("kontain.app/images-check=refuse")
    assert done.returncode != 0
    [entry] = node.ledger()
    assert entry["mode"] == "refuse"
    node.images("warm", node.image)
    assert node.run("kontain.app/images-check=refuse").returncode == 0
    # The same image, not pinned as the host's policy wants it.
    node.policy.write_text('{"check": "refuse", "pinned": true}')
    assert node.run().returncode != 0
    assert node.ledger()[-1]["findings"] == ["is not pinned"]
    node.images("pin", node.image)
    try:
        assert node.run().returncode == 0
    finally:
        node.images("unpin", node.image)


def test_the_policy_s_digest(node: Node) -> None:
    node.images("ls")
    digest = "sha256:" + "ab" * 32
    node.policy.write_text(
        json.dumps({"check": "refuse", "images": {node.image: {"digest": digest}}})
    )
    assert node.run().returncode != 0
    assert digest in node.ledger()[-1]["findings"][0]
    # An annotation cannot loosen what the policy says.
    assert node.run("kontain.app/images-check=record").returncode != 0


def test_a_broken_hook_breaks_nothing_unless_it_must_refuse(node: Node) -> None:
    node.policy.write_text("{")
    assert node.run().returncode == 0
    assert node.run("kontain.app/images-check=refuse").returncode != 0
    assert node.run("app.kontain.images=nonsense").returncode == 0
    node.hooks("--mode=refuse")
    assert node.run().returncode != 0


def test_a_slow_hook_gives_up(node: Node) -> None:
    # Nobody ever writes to this policy file: opening it waits.
    os.mkfifo(node.policy)
    node.hooks("--seconds=0.2")
    assert node.run().returncode == 0
    node.hooks("--seconds=0.2", "--mode=refuse")
    assert node.run().returncode != 0


def test_prefetch_pulls_in_the_background(node: Node, served: parts.Registry) -> None:
    wanted = f"{served.host}/app/next:1"
    done = node.run(f"kontain.app/images-prefetch={wanted}")
    assert done.returncode == 0, done.stderr
    deadline = time.monotonic() + 30
    while wanted not in node.images("ls") and time.monotonic() < deadline:
        time.sleep(0.2)
    assert wanted in node.images("ls")
    assert (node.state / "prefetch.log").stat().st_size == 0
    # A name that is none is refused before anything is started.
    assert node.run("kontain.app/images-prefetch=--help;reboot").returncode == 0


@pytest.mark.parametrize("name", ["check", "record", "prefetch"])
def test_a_hook_imports_nothing_heavy(name: str) -> None:
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        f"from krun.images.hooks import {name}, program\nprint(*sys.modules)"
    )
    done = subprocess.run(
        ["/usr/bin/python3", "-I", "-S", "-c", program], check=True, capture_output=True, text=True
    )
    assert not HEAVY & set(done.stdout.split())


@pytest.mark.parametrize("name", ["check", "record", "prefetch"])
@pytest.mark.parametrize("state", ["", "[]", "{", '{"id": 1}', '{"id": "x", "annotations": 3}'])
def test_a_hook_survives_any_state(name: str, state: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [str(HOOKS / f"krun-image-{name}"), f"--state={tmp_path}", f"--policy={tmp_path}/none"],
        input=state, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0
    assert "traceback" not in done.stderr.lower()


@pytest.mark.parametrize("name", ["check", "record"])
def test_a_pod_s_sandbox_is_left_alone(name: str, tmp_path: Path) -> None:
    for key in ("io.kubernetes.cri.container-type", "io.kubernetes.cri-o.ContainerType"):
        state = {"id": "x", "status": "created", "bundle": "/", "annotations": {key: "sandbox"}}
        argv = [str(HOOKS / f"krun-image-{name}"), f"--state={tmp_path}", "--mode=refuse"]
        done = subprocess.run(argv, input=json.dumps(state), capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def runtime(tmp_path: Path) -> Path:
    """A runc that puts the hooks into each config.json first, as krun does for its containers."""
    entry = [f"--state={tmp_path}/state", f"--policy={tmp_path}/policy.json"]
    hooks = {
        stage: [{"path": str(HOOKS / program), "args": [program, *entry]}]
        for stage, program in (
            ("createRuntime", "krun-image-check"),
            ("poststart", "krun-image-record"),
            ("poststop", "krun-image-record"),
        )
    }
    path = tmp_path / "runc-with-hooks"
    path.write_text(
        "#!/usr/bin/python3\nimport json, os, sys\nargv = sys.argv\n"
        "if 'create' in argv:\n"
        "    bundle = argv[argv.index('--bundle') + 1]\n"
        "    path = bundle + '/config.json'\n"
        "    config = json.load(open(path))\n"
        f"    for stage, added in {hooks!r}.items():\n"
        "        config.setdefault('hooks', {}).setdefault(stage, []).extend(added)\n"
        "    json.dump(config, open(path, 'w'))\n"
        "os.execvp('runc', ['runc', *argv[1:]])\n"
    )
    path.chmod(0o755)
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_dockerd_s_containers(runtime: Path, served: parts.Registry, tmp_path: Path) -> None:
    image = f"{served.host}/app/sh:1"
    with parts.dockerd(f"--add-runtime=hooked={runtime}") as settings:
        docker = ["docker", "-H", str(settings["host"])]
        subprocess.run([*docker, "pull", "-q", image], check=True, capture_output=True)
        subprocess.run(
            [*docker, "run", "--rm", "--runtime=hooked", "--network=none", image], check=True
        )
        check, start, stop = lines(tmp_path / "state" / "ledger.jsonl")
        assert check["findings"] == ["nothing is known to be pre-pulled on this node"]
        assert (start["event"], stop["event"]) == ("start", "stop")
        assert start["image"] == image
        assert start["id"].startswith("sha256:")
        (tmp_path / "policy.json").write_text('{"check": "refuse"}')
        refused = subprocess.run(
            [*docker, "run", "--rm", "--runtime=hooked", "--network=none", image],
            capture_output=True, text=True,
        )  # fmt: skip
        assert refused.returncode != 0
        # dockerd shows its user what the hook said.
        assert f"krun images warm {image}" in refused.stderr


def test_containerd_s_containers(runtime: Path, served: parts.Registry, tmp_path: Path) -> None:
    image = f"{served.host}/app/sh:1"
    with parts.containerd() as settings:
        ctr = ["ctr", f"--address={settings['address']}"]
        subprocess.run([*ctr, "images", "pull", "--plain-http", image], check=True,
                       stdout=subprocess.DEVNULL)  # fmt: skip
        subprocess.run(
            [*ctr, "run", "--rm", f"--runc-binary={runtime}",
             f"--annotation=io.kubernetes.cri.image-name={image}",
             "--annotation=io.kubernetes.cri.sandbox-namespace=web", image, "one"],
            check=True,
        )  # fmt: skip
        _, start, stop = lines(tmp_path / "state" / "ledger.jsonl")
        assert (start["image"], start["namespace"]) == (image, "web")
        assert stop["event"] == "stop"
