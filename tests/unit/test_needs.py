"""Nothing that `make test` installs is a reason to skip a test."""

from __future__ import annotations

from pathlib import Path

import needs
import pytest

LIST = Path(__file__).parents[2] / "packaging/debian-test-packages.txt"


def test_every_package_that_is_named_is_installed_by_make_test() -> None:
    listed = {line.partition("#")[0].strip() for line in LIST.read_text().splitlines()}
    assert set(needs.PACKAGES.values()) - needs.ESSENTIAL <= listed


def test_a_missing_program_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needs, "find", lambda name: None if name in ("ip", "tc") else name)
    assert needs.why_not("strace", "ip", "tc") == "not installed: ip, tc (Debian: iproute2)"
    assert needs.why_not("strace") == ""
    with pytest.raises(pytest.skip.Exception, match=r"^not installed: ip \(Debian: iproute2\)$"):
        needs.need("ip")
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(pytest.skip.Exception, match=r"^needs root: mounts$"):
        needs.need(root="mounts")
