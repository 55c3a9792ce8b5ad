"""The three cgroup layouts of users' machines: v1, hybrid, v2."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from e2e.machine import IMAGE, Client, Machine, Record, cgroups, make_launcher, wait_for

LAYOUTS = {
    "v1": "true",
    "hybrid": "mount -t cgroup2 none /sys/fs/cgroup/unified",
    "v2": "umount -l /sys/fs/cgroup && mount -t cgroup2 none /sys/fs/cgroup",
}


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> str:
    """The name of a layout."""
    if not os.path.isdir("/sys/fs/cgroup/unified"):
        pytest.skip("needs a machine with v1 controllers and a v2 hierarchy beside them")
    return str(request.param)


def within(layout: str) -> list[str]:
    """The words before a command that give it a mount namespace of that layout."""
    script = f'{LAYOUTS[layout]} && exec "$@"'
    return ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh"]


@pytest.fixture
def krun(machine: Machine, layout: str, engine: str, tmp_path: Path) -> Client:
    """krun in a mount namespace of that layout, for each call anew."""
    launcher = machine.directory / f"krun-{engine}"
    return Client(machine, [*within(layout), launcher, "--root", tmp_path / "root"], {})


@pytest.fixture
def name(krun: Client) -> Iterator[str]:
    name = f"krun-test-{os.urandom(6).hex()}"
    yield name
    krun("delete", "--force", name, status=None)


def test_life(
    krun: Client, layout: str, engine: str, bundle: Callable[..., Path], name: str
) -> None:
    def edit(config: dict[str, Any]) -> None:
        # Device rules of v2 are BPF programs, which not every kernel takes.
        if layout == "v2":
            config["linux"]["resources"].pop("devices", None)

    directory = bundle("/payload", "nap", edit=edit)
    log = directory / "log"
    with open(log, "wb") as stream:
        done = krun("create", "-b", directory, name, status=None, stdout=stream, stderr=stream)
    if engine == "crun" and layout != "v1" and done.returncode:
        # crun 1.8 knows no hybrid layout, and needs CAP_SYS_RESOURCE for v2's device rules.
        [said] = log.read_text().splitlines()
        assert "hybrid" in said or "MEMLOCK" in said.upper()
        for cgroup in cgroups(name):  # crun leaves it
            os.rmdir(cgroup)
        return
    assert done.returncode == 0, log.read_text()
    krun("start", name)
    wait_for("the payload runs", lambda: "napping" in log.read_text())
    assert krun("exec", name, "/payload", "args", "x").stdout == "x\n"
    krun("pause", name)
    assert state(krun, name) == "paused"
    krun("resume", name)
    krun("kill", name, "TERM")
    wait_for("the end", lambda: state(krun, name) == "stopped")
    krun("delete", name)
    assert cgroups(name) == []


def state(krun: Client, name: str) -> Any:
    """The container's status."""
    return json.loads(krun("state", name).stdout)["status"]


def test_engine_is_chosen_by_the_layout(
    machine: Machine, layout: str, bundle: Callable[..., Path], tmp_path: Path
) -> None:
    """Without a word about engines krun takes one that works here."""

    def edit(config: dict[str, Any]) -> None:
        config["linux"]["resources"].pop("devices", None)

    launcher = make_launcher(tmp_path / "krun", "auto")
    krun = [*within(layout), launcher, "--root", tmp_path / "root"]
    name = f"krun-test-{os.urandom(6).hex()}"
    done = machine.run(*krun, "run", "-b", bundle("/payload", "args", "x", edit=edit), name)
    assert done.stdout == "x\n"
    assert cgroups(name) == []


@pytest.mark.parametrize("engine", ["native"])
def test_podman(podman: Client, layout: str, record: Record) -> None:
    client = Client(podman.machine, [*within(layout), *podman.argv], podman.env)
    options = ["--network", "none", "-v", record.volume, "-m", "64m"]
    if layout == "v2":
        # Without controllers there is nothing to limit with, and no device rules without BPF.
        options = [*options[:4], "--cgroups", "disabled"]
    done = client("run", "--rm", *options, IMAGE, "/payload", "args", "x")
    assert done.stdout == "x\n"
    record.count(1)
