"""Walks through a hostile root file system, with mounts over it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from krun import view


@pytest.fixture
def root(tmp_path: Path) -> Path:
    base = tmp_path / "rootfs"
    (base / "bin").mkdir(parents=True)
    (base / "bin" / "tool").write_text("inside")
    (tmp_path / "secret").write_text("outside")
    return base


def read(files: view.View, path: str) -> tuple[str, str]:
    found = files.find(path)
    with open(view.readable(found)) as file:
        os.close(found.fd)
        return found.path, file.read()


def test_finds_a_file(root: Path) -> None:
    with view.View(str(root)) as files:
        assert read(files, "/bin/tool") == ("/bin/tool", "inside")
        assert read(files, "/bin/../bin/./tool") == ("/bin/tool", "inside")


@pytest.mark.parametrize(
    "target", ["../../secret", "/../../secret", "/../secret", "../../../secret"]
)
def test_links_and_dots_stay_inside(root: Path, target: str) -> None:
    (root / "link").symlink_to(target)
    with view.View(str(root)) as files:
        with pytest.raises(FileNotFoundError):
            files.find("/link")
        with pytest.raises(FileNotFoundError):
            files.find("/../../secret")
    (root / "secret").write_text("decoy")
    with view.View(str(root)) as files:
        assert read(files, "/link") == ("/secret", "decoy")


def test_absolute_links_start_at_the_containers_root(root: Path) -> None:
    (root / "etc").symlink_to("/bin")
    with view.View(str(root)) as files:
        assert read(files, "/etc/tool") == ("/bin/tool", "inside")


def test_link_loops_end(root: Path) -> None:
    (root / "a").symlink_to("b")
    (root / "b").symlink_to("a")
    with view.View(str(root)) as files, pytest.raises(OSError) as caught:
        files.find("/a")
    assert caught.value.errno == 40  # ELOOP
    assert caught.value.filename == "/a"


def test_a_bind_mount_covers_what_is_below(root: Path, tmp_path: Path) -> None:
    volume = tmp_path / "volume"
    volume.mkdir()
    (volume / "tool").write_text("from the volume")
    with view.View(str(root)) as files:
        files.mount("/bin", str(volume), "bind")
        assert read(files, "/bin/tool") == ("/bin/tool", "from the volume")
        with pytest.raises(FileNotFoundError):
            files.find("/bin/other")


def test_a_file_can_be_mounted_and_reached_through_a_link(root: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text("covered")
    (root / "usr").symlink_to("bin")
    with view.View(str(root)) as files:
        files.mount("/usr/tool", str(other), "bind")
        assert read(files, "/bin/tool") == ("/bin/tool", "covered")


def test_a_later_mount_hides_an_earlier_one_below_it(root: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text("covered")
    empty = tmp_path / "empty"
    empty.mkdir()
    with view.View(str(root)) as files:
        files.mount("/bin/tool", str(other), "bind")
        files.mount("/bin", str(empty), "bind")
        with pytest.raises(FileNotFoundError):
            files.find("/bin/tool")


def test_what_is_not_there_yet_is_unseen(root: Path) -> None:
    (root / "self").symlink_to("/proc/self/exe")
    with view.View(str(root)) as files:
        files.mount("/proc", "", "proc")
        with pytest.raises(view.Unseen) as caught:
            files.find("/self")
        assert caught.value.fstype == "proc"


def test_leaves_no_descriptor_open(root: Path) -> None:
    (root / "loop").symlink_to("loop")
    before = len(os.listdir("/proc/self/fd"))
    for path in ("/bin/tool", "/nothing/there", "/loop", "/bin/tool/more", "/", "/bin/.."):
        with view.View(str(root)) as files:
            try:
                os.close(files.find(path).fd)
            except OSError:
                pass
    assert len(os.listdir("/proc/self/fd")) == before
