"""The native engine as an ordinary user: user namespace, own ids, no cgroup rights."""

from __future__ import annotations

import os
import subprocess
import tempfile

import pytest
from native_parts import Native, configuration
from needs import need

USER = 4711


def as_user(native: Native, *argv: str) -> subprocess.CompletedProcess[str]:
    for top, directories, files in os.walk(native.directory):
        for name in (top, *(f"{top}/{one}" for one in directories + files)):
            os.chown(name, USER, USER, follow_symlinks=False)
    words = ["setpriv", "--reuid", str(USER), "--regid", str(USER), "--clear-groups"]
    words += ["env", "-i", f"HOME={native.directory}", "PATH=/usr/bin:/bin"]
    # Files, not pipes: a waiting init would hold those open.
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as errors:
        done = subprocess.run(
            [*words, *native.words, *argv],
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=errors,
            timeout=30,
            cwd=native.directory,
        )
        said.seek(0)
        errors.seek(0)
        return subprocess.CompletedProcess(argv, done.returncode, said.read(), errors.read())


@pytest.mark.usefixtures("open_checkout")
def test_ordinary_user(native: Native) -> None:
    need("setpriv")
    script = "id -u; cat /proc/self/uid_map; : < /dev/zero && echo zero"
    document = configuration("sh", "-c", script)
    linux = document["linux"]
    linux["namespaces"] = [one for one in linux["namespaces"] if one["type"] != "cgroup"]
    linux["namespaces"].append({"type": "user"})
    linux["uidMappings"] = [{"containerID": 0, "hostID": USER, "size": 1}]
    linux["gidMappings"] = [{"containerID": 0, "hostID": USER, "size": 1}]
    del linux["resources"]
    native.write(document)
    name = native.name()
    done = as_user(native, "run", "--bundle", str(native.bundle), name)
    assert done.stdout.split() == ["0", "0", str(USER), "1", "zero"], done.stderr
    document["process"]["args"] = ["sleep", "100"]
    native.write(document)
    for words in (
        ("create", "--bundle", str(native.bundle), name),
        ("start", name),
        ("exec", name, "id", "-u"),
        ("delete", "--force", name),
    ):
        done = as_user(native, *words)
        assert done.returncode == 0, (words, done.stderr)
        assert done.stdout == ("0\n" if words[0] == "exec" else "")


@pytest.mark.usefixtures("open_checkout")
def test_without_a_user_namespace_it_says_so(native: Native) -> None:
    native.write(configuration("true"))
    done = as_user(native, "run", "--bundle", str(native.bundle), native.name())
    text = "config.json: linux.namespaces: an ordinary user's container needs a user namespace"
    assert done.stderr == f"krun: {text} (krun spec --rootless writes one)\n"
    assert done.returncode == 1


@pytest.mark.usefixtures("open_checkout")
def test_a_state_directory_that_cannot_be_made(native: Native) -> None:
    """As without XDG_RUNTIME_DIR, where there is no login session."""
    document = configuration("true")
    del document["process"]["capabilities"]
    linux = document["linux"]
    linux["namespaces"].append({"type": "user"})
    linux["uidMappings"] = [{"containerID": 0, "hostID": USER, "size": 1}]
    linux["gidMappings"] = linux["uidMappings"]
    native.write(document)
    done = as_user(native, "--root", "/krun-of-none/x", "run", "--bundle", str(native.bundle), "c")
    assert done.returncode == 1
    assert done.stderr.startswith("krun: /krun-of-none: Permission denied (set XDG_RUNTIME_DIR")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.usefixtures("open_checkout")
def test_a_time_namespace_and_no_root_inside(native: Native) -> None:
    """The user namespace's owner makes the time namespace, and needs no id 0 for that."""
    inside = 1000
    document = configuration("sleep", "100")
    document["process"]["user"] = {"uid": inside, "gid": inside}
    linux = document["linux"]
    linux["namespaces"] = [one for one in linux["namespaces"] if one["type"] != "cgroup"]
    linux["namespaces"] += [{"type": "user"}, {"type": "time"}]
    linux["uidMappings"] = [{"containerID": inside, "hostID": USER, "size": 1}]
    linux["gidMappings"] = linux["uidMappings"]
    linux["timeOffsets"] = {"monotonic": {"secs": 1000}, "boottime": {"secs": 2000}}
    del linux["resources"]
    native.write(document)
    name = native.name()
    done = as_user(native, "create", "--bundle", str(native.bundle), name)
    assert done.returncode == 0, done.stderr
    assert as_user(native, "start", name).returncode == 0
    script = "id -u; cat /proc/self/timens_offsets; cat /proc/1/timens_offsets"
    done = as_user(native, "exec", name, "sh", "-c", script)
    offsets = ["monotonic", "1000", "0", "boottime", "2000", "0"]
    assert done.stdout.split() == [str(inside), *offsets, *offsets], done.stderr
    assert as_user(native, "delete", "--force", name).returncode == 0
