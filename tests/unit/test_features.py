"""krun features beside what runc says of itself."""

from __future__ import annotations

import json
import subprocess

import needs
import pytest

from krun.__main__ import main
from krun.commands import features
from krun.plan.mounts import plan_mount


@needs.mark("runc")
def test_native_supports_what_runc_does() -> None:
    runc = str(needs.find("runc"))
    theirs = json.loads(subprocess.run([runc, "features"], capture_output=True, text=True).stdout)
    mine = features.native()
    assert set(theirs["hooks"]) <= set(mine["hooks"])
    # POSIX ACLs as an option of mount(2) are a matter of old file systems.
    assert set(theirs["mountOptions"]) - set(mine["mountOptions"]) <= {"acl", "noacl"}
    for name in ("namespaces", "capabilities"):
        assert set(theirs["linux"][name]) <= set(mine["linux"][name])
    for name in ("actions", "operators"):
        assert set(theirs["linux"]["seccomp"][name]) <= set(mine["linux"]["seccomp"][name])


def test_every_mount_option_that_is_claimed_is_read() -> None:
    for option in features.mount_options():
        fstype = "tmpfs" if option == "tmpcopyup" else "bind"
        text = {"idmap": "idmap=uids=0-1-1;gids=0-1-1", "ridmap": "ridmap=uids=0-1-1;gids=0-1-1"}
        plan_mount(
            {
                "destination": "/x",
                "source": "/y",
                "type": fstype,
                "options": [text.get(option, option)],
            },
            "mounts[0]",
        )


def test_annotations_that_change_what_is_done_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--engine", "native", "features"]) == 0
    told = json.loads(capsys.readouterr().out)["potentiallyUnsafeConfigAnnotations"]
    assert told == ["run.oci.", "app.kontain."]
