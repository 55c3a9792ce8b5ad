"""resctrl groups, in a directory that stands for the file system: few machines have one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from krun.errors import KrunError
from krun.linux import resctrl


@pytest.fixture
def top(tmp_path: Path) -> Path:
    for name in ("info/L3", "info/MB", "shared/mon_groups"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "shared/schemata").write_text("    MB:0=100;1=100\n    L3:0=00f;1=ff\n")
    (tmp_path / "schemata").write_text("    MB:0=100;1=100\n    L3:0=fff;1=fff\n")
    (tmp_path / "shared/tasks").touch()
    return tmp_path


def find(section: dict[str, Any], top: Path) -> tuple[str, str]:
    group, own = resctrl.find(section, "box", str(top))
    return group.removeprefix(str(top)), own.removeprefix(str(top))


def test_whose_group_it_is(top: Path) -> None:
    assert find({"l3CacheSchema": "L3:0=f"}, top) == ("/box", "/box")
    assert find({"closID": "shared"}, top) == ("/shared", "")
    assert find({"closID": "new", "memBwSchema": "MB:0=20"}, top) == ("/new", "")
    assert find({"closID": "/"}, top) == ("", "")
    for key in ("enableMonitoring", "enableCMT", "enableMBM"):
        assert find({"closID": "shared", key: True}, top) == ("/shared", "/shared/mon_groups/box")
    (top / "box").mkdir()
    assert find({"l3CacheSchema": "L3:0=f"}, top) == ("/box", ""), "somebody else's"
    (top / "shared/mon_groups/box").mkdir()
    assert find({"closID": "shared", "enableCMT": True}, top) == ("/shared", "")


@pytest.mark.parametrize(
    ("section", "text"),
    [
        ({"closID": "absent"}, "there is no group"),
        ({"closID": ".."}, "not the name of a group"),
        ({"closID": "a/b"}, "not the name of a group"),
        ({"closID": "shared", "l3CacheSchema": "L3:0=f;1=f"}, "has L3:1=ff, not f"),
        ({"closID": "shared", "memBwSchema": "MB:0=20"}, "has MB:0=100, not 20"),
    ],
)
def test_what_cannot_be(top: Path, section: dict[str, Any], text: str) -> None:
    with pytest.raises(KrunError, match=text):
        find(section, top)


def test_a_machine_without_the_feature(top: Path) -> None:
    (top / "info/MB").rmdir()
    find({"l3CacheSchema": "L3:0=f"}, top)
    with pytest.raises(KrunError, match="memBwSchema: this machine's resctrl has no MB"):
        find({"memBwSchema": "MB:0=20"}, top)


def test_limits_are_written_in_order(top: Path) -> None:
    section = {"l3CacheSchema": "L3:0=f", "memBwSchema": "MB:0=20", "schemata": ["L2:0=3"]}
    # The kernel puts the files into a new directory.
    (top / "box").mkdir()
    (top / "box/schemata").touch()
    resctrl.make(section, str(top / "box"), "box")
    assert (top / "box/schemata").read_text() == "L3:0=f\nMB:0=20\nL2:0=3\n"


def test_a_shared_group_is_joined_as_it_is(top: Path) -> None:
    before = (top / "shared/schemata").read_text()
    section = {"closID": "shared", "l3CacheSchema": "L3:0=f;1=ff", "enableMonitoring": True}
    group, own = resctrl.find(section, "box", str(top))
    resctrl.make(section, group, "box")
    (top / "shared/mon_groups/box/tasks").touch()
    resctrl.join(group, "box", 4711)
    assert (top / "shared/schemata").read_text() == before
    assert (top / "shared/tasks").read_text() == "4711"
    assert (top / "shared/mon_groups/box/tasks").read_text() == "4711"
    (top / "shared/mon_groups/box/tasks").unlink()
    resctrl.remove(own)
    resctrl.remove(own)
    assert (top / "shared").is_dir()
    assert not (top / "shared/mon_groups/box").exists()


def test_the_kernels_reason_is_shown(top: Path) -> None:
    (top / "info/last_cmd_status").write_text("Mask out of range\n")
    with pytest.raises(KrunError, match="Mask out of range"):
        resctrl.write_schemata(str(top / "absent"), ["L3:0=fffff"])
