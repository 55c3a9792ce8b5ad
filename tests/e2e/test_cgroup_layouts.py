"""The three cgroup layouts of users' machines: v1, hybrid, v2."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from e2e.machine import Client, Machine, cgroups, wait_for

LAYOUTS = {
    "v1": "true",
    "hybrid": "mount -t cgroup2 none /sys/fs/cgroup/unified",
    "v2": "umount -l /sys/fs/cgroup && mount -t cgroup2 none /sys/fs/cgroup",
}


@pytest.fixture(params=LAYOUTS)
def krun(request: pytest.FixtureRequest, machine: Machine, engine: str, tmp_path: Path) -> Client:
    """krun in a mount namespace of that layout, for each call anew."""
    if not os.path.isdir("/sys/fs/cgroup/unified"):
        pytest.skip("needs a machine with v1 controllers and a v2 hierarchy beside them")
    script = f'{LAYOUTS[request.param]} && exec "$@"'
    layout = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh"]
    launcher = machine.directory / f"krun-{engine}"
    client = Client(machine, [*layout, launcher, "--root", tmp_path / "root"], {})
    client.env = {"LAYOUT": request.param}
    return client


@pytest.fixture
def name(krun: Client) -> Iterator[str]:
    name = f"krun-test-{os.urandom(6).hex()}"
    yield name
    krun("delete", "--force", name, status=None)


def test_life(krun: Client, engine: str, bundle: Callable[..., Path], name: str) -> None:
    layout = krun.env["LAYOUT"]

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
