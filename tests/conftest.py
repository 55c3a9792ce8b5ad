"""Fixtures of all tests: the monitor and the payload that the tests run."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
from km import build
from native_parts import REPOSITORY, Native, need_root

# A shell starts what runs in the background, or under nohup(1), with these ignored, and what the
# tests start would inherit that.
for number in (signal.SIGHUP, signal.SIGQUIT, signal.SIGTSTP):
    signal.signal(number, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)

# A machine that stands still for a moment is no failure.
hypothesis.settings.register_profile("tests", deadline=None)
hypothesis.settings.load_profile("tests")


@pytest.fixture(scope="session")
def km(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A km: the one KRUN_TEST_KM names, or the stand-in of tests/km."""
    real = os.environ.get("KRUN_TEST_KM")
    return Path(real) if real else build.km(tmp_path_factory.mktemp("km"))


@pytest.fixture(scope="session")
def km_is_real() -> bool:
    """Whether `km` is a Kontain Monitor, not the stand-in (which alone writes records)."""
    return bool(os.environ.get("KRUN_TEST_KM"))


@pytest.fixture(scope="session")
def payload(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The freestanding payload, see tests/payloads/payload.c."""
    return build.payload(tmp_path_factory.mktemp("payload"))


@pytest.fixture(scope="session")
def open_checkout() -> None:
    """Skip where ordinary users cannot enter the checkout, as in root's home."""
    for path in (REPOSITORY, *REPOSITORY.parents):
        if not path.stat().st_mode & 0o001:
            pytest.skip(f"ordinary users cannot enter {path}: these tests need a clone elsewhere")


@pytest.fixture
def native(tmp_path: Path) -> Iterator[Native]:
    """The native engine with a bundle of its own; fails when something is left behind."""
    need_root()
    # Ordinary users pass here; with several workers there is a directory more on the way.
    for parent in (tmp_path, *tmp_path.parents):
        if parent == Path(tempfile.gettempdir()) or parent == Path("/"):
            break
        parent.chmod(0o755)
    engine = Native(tmp_path / "native")
    yield engine
    engine.close()
