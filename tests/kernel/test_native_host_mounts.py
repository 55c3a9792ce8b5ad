"""Containers without a mount namespace: in the host's, which they neither change nor see."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from native_parts import Native, configuration

OWN = Path("/proc/self/mountinfo")


def _shared(*args: str, **namespaces: bool) -> dict[str, Any]:
    """A configuration without a mount namespace; of the others, those that are named."""
    document = configuration(*args)
    document["linux"]["namespaces"] = [{"type": kind} for kind in namespaces]
    document.pop("hostname")
    return document


def _start(native: Native, document: dict[str, Any]) -> str:
    native.write(document)
    name = native.name()
    native("run", "--detach", "--bundle", native.bundle, name, stdout=subprocess.DEVNULL)
    return name


@pytest.mark.parametrize("namespaces", [{}, {"pid": True, "ipc": True}])
def test_the_host_keeps_its_mounts(native: Native, namespaces: dict[str, bool]) -> None:
    before = OWN.read_text()
    name = _start(native, _shared("sleep", "100", **namespaces))
    pid = native.state(name)["pid"]
    assert os.readlink(f"/proc/{pid}/ns/mnt") == os.readlink("/proc/self/ns/mnt")
    assert OWN.read_text() == before
    script = "readlink /proc/self/ns/mnt; ls /; ls /dev/pts; grep -c . /proc/self/mountinfo"
    done = native("exec", name, "sh", "-c", script, status=1)
    assert done.stdout.split() == [
        os.readlink("/proc/self/ns/mnt"),
        *("bin", "dev", "proc", "sys"),
        "ptmx",
        "0",
    ]
    native("delete", "--force", name)
    assert OWN.read_text() == before
    assert os.listdir(native.rootfs / "dev") == []


def test_masks_and_read_only_paths_hold(native: Native) -> None:
    (native.rootfs / "secret").write_text("secret")
    (native.rootfs / "fixed").write_text("fixed")
    script = "cat /secret; echo x > /fixed; echo y > /plain; cat /fixed /plain"
    document = _shared("sh", "-c", script)
    document["linux"]["maskedPaths"].append("/secret")
    document["linux"]["readonlyPaths"].append("/fixed")
    done = native.run(document)
    assert done.stdout == "fixedy\n"
    assert "can't create /fixed: Read-only file system" in done.stderr


ESCAPE = r"""
#include <fcntl.h>
#include <stdio.h>
#include <sys/stat.h>
#include <unistd.h>
int main(void) {
    int root = open("/", O_RDONLY);
    mkdir("/below", 0755);
    if (chroot("/below") || fchdir(root)) return 2;
    for (int i = 0; i < 40; i++) if (chdir("..")) return 3;
    if (chroot(".")) return 4;
    return access("/bin/escape", F_OK) ? 5 : 0;
}
"""


def test_no_way_up(native: Native) -> None:
    """With CAP_SYS_CHROOT the classic escape of a chroot ends in the container's own root."""
    native.compile("escape", ESCAPE)
    document = _shared("escape")
    for names in document["process"]["capabilities"].values():
        names.append("CAP_SYS_CHROOT")
    native.run(document)


def test_nothing_can_be_mounted(native: Native) -> None:
    os.symlink("busybox", native.rootfs / "bin/mount")
    (native.rootfs / "mnt").mkdir()
    document = _shared("sh", "-c", "mount -t tmpfs none /mnt; mount --bind /bin /mnt; ls /mnt")
    for names in document["process"]["capabilities"].values():
        names.append("CAP_SYS_ADMIN")
    before = OWN.read_text()
    done = native.run(document)
    assert done.stdout == ""
    assert done.stderr.count("on /mnt failed") == 2, done.stderr
    assert OWN.read_text() == before


def test_create_and_start(native: Native) -> None:
    native.write(_shared("sh", "-c", "echo x > /dev/null && sleep 100", pid=True))
    name = native.name()
    native("create", "--bundle", native.bundle, name, stdout=subprocess.DEVNULL)
    native("start", name)
    assert native.state(name)["status"] == "running"


def test_with_a_user_namespace_it_is_refused(native: Native) -> None:
    document = _shared("true", user=True)
    maps = [{"containerID": 0, "hostID": 100000, "size": 1000}]
    document["linux"] |= {"uidMappings": maps, "gidMappings": maps}
    said = native.run(document, 1).stderr
    assert "linux.namespaces: a user namespace needs a mount namespace, too" in said
