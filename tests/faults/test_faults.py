"""A sample of the fault harness; `make faults` goes through every point."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from faults import every_call
from native_parts import need_root
from needs import need

# So many points of each verb and fault are tried here.
SAMPLE = 4


@pytest.mark.parametrize("fault", every_call.FAULTS)
@pytest.mark.parametrize("verb", every_call.VERBS)
def test_nothing_is_left(tmp_path: Path, verb: str, fault: str) -> None:
    need_root()
    need("strace")
    native = every_call.Native(tmp_path / "native")
    found = every_call.points(every_call.calls_of(native, verb), verb, fault)
    shutil.rmtree(tmp_path / "native")
    every = max(1, len(found) // SAMPLE)
    count, failures = every_call.run(tmp_path / "native", verb, fault, every)
    assert failures == []
    assert count >= min(SAMPLE, len(found)) > 0
