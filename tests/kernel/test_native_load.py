"""The native engine under load: many containers made at once, and nothing left of them."""

from __future__ import annotations

import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
from native_parts import Native, configuration

RUNS = 100
AT_ONCE = 8


@pytest.mark.timeout(60)
def test_a_burst_of_runs(native: Native) -> None:
    native.write(configuration("sh", "-c", "read word; echo got $word; exit 7"))
    names = [native.name() for _ in range(RUNS)]

    def run(name: str) -> subprocess.CompletedProcess[str]:
        return native("run", "--bundle", native.bundle, name, status=None, input=f"{name}\n")

    with ThreadPoolExecutor(AT_ONCE) as pool:
        done = dict(zip(names, pool.map(run, names), strict=True))
    wrong = {
        name: (one.returncode, one.stdout, one.stderr)
        for name, one in done.items()
        if (one.returncode, one.stdout, one.stderr) != (7, f"got {name}\n", "")
    }
    assert not wrong
    # run deletes what it made without the fixture's delete --force.
    assert native.left() == []
