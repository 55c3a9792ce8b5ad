"""The programs of user-mode networks: which are orphans, whose members are gone."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from krun.network import removal, state, usermode


@contextlib.contextmanager
def helper(directory: Path, member: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process with the command line of a helper of this member."""
    words = ["slirp4netns", "-c", "read word", f"--api-socket={directory}/slirp-{member}"]
    with subprocess.Popen(words, executable="/bin/sh", stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


def test_helpers_whose_members_are_gone_are_ended(tmp_path: Path) -> None:
    one, two = state.new_member(), state.new_member()
    with helper(tmp_path, one) as orphan, helper(tmp_path, two) as wanted:
        listed = usermode.helpers(str(tmp_path))
        assert {(process.pid, member) for process, member in listed} == {
            (orphan.pid, one),
            (wanted.pid, two),
        }
        assert usermode.helpers(str(tmp_path / "other")) == []
        assert usermode.end_orphans(listed, {two}) == [one]
        assert orphan.wait(10) == -9
        assert wanted.poll() is None
        assert usermode.end_orphans(listed, {two}) == []


def test_helpers_of_another_user_are_left_alone(tmp_path: Path) -> None:
    """Root's directory is /run/krun-network; a user's may be /home/ann/run/krun-network."""
    others = Path(f"/home/ann{tmp_path}")
    with helper(tmp_path, state.new_member()) as own, helper(others, state.new_member()):
        listed = usermode.helpers(str(tmp_path))
        assert [process.pid for process, _ in listed] == [own.pid]


def test_member_that_comes_to_life_meanwhile_keeps_its_helper(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its network is made while gc is at work, which must not take it for dead."""
    directory = tmp_path / "network"
    directory.mkdir()
    late: list[subprocess.Popen[bytes]] = []
    looked: list[str] = []
    entries = state.entries

    with contextlib.ExitStack() as stack:

        def then_another(path: str) -> list[str]:
            # What may be an orphan is looked at from the first on, what lives from the second.
            looked.append(path.rpartition("/")[2])
            if "netns" in looked and looked[-1] == "dying":
                late.append(stack.enter_context(helper(directory, state.new_member())))
            return entries(path)

        monkeypatch.setattr(state, "entries", then_another)
        assert removal.gc(str(directory), thorough=True)["helpers"] == []
        assert late
        assert all(process.poll() is None for process in late)
