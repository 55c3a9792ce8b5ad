"""krun images as an ordinary user, with podman's store in the user's home."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import images_parts as parts
import needs
import pytest
from e2e.machine import REPOSITORY, TESTER, Machine, as_tester

pytestmark = needs.mark("podman", "docker-registry", "newuidmap", root=parts.ROOT)

BASE = parts.layer("base", 300_000)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[parts.Registry]:
    with parts.registry(tmp_path_factory.mktemp("registry") / "r") as registry:
        for name in "abc":
            registry.push(f"app/{name}", "1", [BASE, parts.layer(name, 50_000)])
        yield registry


class Home:
    """One user's home, and commands run as that user in it."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.path = machine.directory / "home-images"
        self.user = as_tester(self.path, f"TMPDIR={self.path}/tmp", f"PYTHONPATH={REPOSITORY}")
        (self.path / "tmp").mkdir()
        os.chown(self.path / "tmp", TESTER, TESTER)
        self.state = self.path / ".local/state/krun/images"

    def line(self, *argv: object) -> list[str]:
        return self.machine.inside(*self.user, *argv)

    def run(self, *argv: object, status: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(self.line(*argv), capture_output=True, text=True, timeout=120)
        assert done.returncode == status, (argv, done)
        assert "traceback" not in done.stderr.lower()
        return done

    def images(self, *argv: object, status: int = 0) -> str:
        # -P: the directory of a run must not shadow modules.
        done = self.run(sys.executable, "-P", "-m", "krun", "images", *argv, status=status)
        self.errors = done.stderr
        return done.stdout

    def names(self) -> set[str]:
        return {item["image"] for item in json.loads(self.images("ls", "--format=json"))}


@pytest.fixture(scope="module")
def home(machine: Machine) -> Iterator[Home]:
    home = Home(machine)
    yield home
    home.run("podman", "unshare", "rm", "-rf", home.path / ".local")
    # Ends the process that keeps the user's namespaces.
    home.run("podman", "system", "migrate")


@pytest.fixture
def manifest(home: Home) -> Callable[..., Path]:
    def write(*images: str) -> Path:
        path = home.path / "cache.json"
        path.write_text(
            json.dumps(
                {
                    "apiVersion": "kubefledged.io/v1alpha2",
                    "kind": "ImageCache",
                    "metadata": {"name": "mine"},
                    "spec": {"cacheSpec": [{"images": list(images)}]},
                }
            )
        )
        return path

    return write


@pytest.mark.usefixtures("open_checkout")
def test_an_ordinary_user(home: Home, served: parts.Registry, manifest: Any) -> None:
    one, two, three = (f"{served.host}/app/{name}:1" for name in "abc")
    [cold] = json.loads(home.images("status", one, "--format=json"))
    assert cold["state"] == "cold"
    assert f"{one}: pulled" in home.images("warm", one)
    assert home.names() == {one}
    # It is the user's own podman that has it, in the user's own home; and the state is there too.
    assert home.run("podman", "images", "-q").stdout.strip()
    assert (home.state / "index.tsv").stat().st_uid == TESTER
    [warm] = json.loads(home.images("status", one, "--format=json"))
    assert (warm["state"], warm["missing"]) == ("warm", 0)

    home.images("pin", one)
    home.run("podman", "image", "prune", "-af")
    assert home.names() == {one}
    assert "Succeeded" in home.images("cache", "apply", "-f", manifest(two, three))
    assert home.names() == {one, two, three}
    # gc leaves what is pinned and what a cache wants.
    home.images("gc", "--quota=0")
    assert home.names() == {one, two, three}
    home.images("cache", "apply", "-f", manifest(two))
    assert home.names() == {one, two}
    home.images("unpin", one)
    home.images("gc", "--quota=0")
    assert home.names() == {two}
    home.images("cache", "delete", "mine")
    assert home.names() == set()


def test_what_containers_use(home: Home, served: parts.Registry, manifest: Any) -> None:
    one = f"{served.host}/app/a:1"
    home.images("cache", "apply", "-f", manifest(one))
    home.run("podman", "create", "--name=user", "--network=none", one, "/x")
    assert "ImageInUse" in home.images("cache", "delete", "mine", status=1)
    assert home.names() == {one}
    home.run("podman", "rm", "user")
    home.images("cache", "watch", "--once")
    assert home.names() == set()


def test_a_killed_pull_leaves_nothing(home: Home, served: parts.Registry, manifest: Any) -> None:
    served.push("app/long", "1", [parts.layer("long", 4_000_000)])
    with parts.slowed(served.host, 1_000_000) as slow:
        path = manifest(f"{slow}/app/long:1")
        argv = home.line(sys.executable, "-P", "-m", "krun", "images", "cache", "apply", "-f", path)
        with subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as running:
            assert running.stderr is not None
            assert b"pulling" in running.stderr.readline()
            # nsenter and setpriv became krun itself.
            assert parts.wait_until(lambda: bool(serving()))
            time.sleep(1)
            running.kill()
        assert parts.wait_until(lambda: not serving()), serving()
        assert [name for name in os.listdir(home.path / "tmp") if "storage" in name] == []
    home.images("cache", "delete", "mine")


def serving() -> list[str]:
    """Return the services of this user: other tests have some of their own."""
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            line = Path(f"/proc/{entry}/cmdline").read_bytes().replace(b"\0", b" ").decode()
            if " system service " in line and os.stat(f"/proc/{entry}").st_uid == TESTER:
                found.append(line)
        except OSError:
            continue
    return found
