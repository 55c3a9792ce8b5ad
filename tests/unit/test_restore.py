"""checkpoint and restore: what reaches crun, a recorder here, since Debian's has no criu."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BUSYBOX = Path("/bin/busybox")


class Host:
    """A bundle, and a crun that says what it was called with."""

    def __init__(self, directory: Path, features: str) -> None:
        self.directory = directory
        crun = directory / "crun"
        crun.write_text(
            "#!/bin/sh\n"
            f'[ "$1" != --version ] || {{ echo "crun version 1.14 {features}"; exit; }}\n'
            'echo "called $*"\n'
        )
        crun.chmod(0o755)
        (directory / "policy.json").write_text(json.dumps({"paths": {"crun": str(crun)}}))
        (directory / "rootfs" / "bin").mkdir(parents=True)
        shutil.copy(BUSYBOX, directory / "rootfs" / "bin")
        self.write({})
        (directory / "root" / "there").mkdir(parents=True)
        (directory / "root" / "there" / "status").write_text("{}")

    def write(self, annotations: dict[str, str]) -> None:
        """Write the bundle's configuration."""
        namespaces = [{"type": "mount"}, {"type": "pid"}]
        document = {
            "ociVersion": "1.2.0",
            "root": {"path": "rootfs"},
            "process": {"args": ["/bin/busybox"], "cwd": "/"},
            "annotations": annotations,
            "linux": {"namespaces": namespaces},
        }
        (self.directory / "config.json").write_text(json.dumps(document))

    def __call__(self, *words: object) -> subprocess.CompletedProcess[str]:
        policy = ("--policy", self.directory / "policy.json", "--root", self.directory / "root")
        command = [sys.executable, "-m", "krun", *policy, *words]
        return subprocess.run([*map(str, command)], capture_output=True, text=True)


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path, "+CRIU")


def test_what_would_run_in_a_vm_is_not_restored(host: Host) -> None:
    """A checkpoint holds processes of the host's kernel."""
    words = ("restore", "--bundle", host.directory, "--image-path", "/saved", "new")
    for options in ((), ("--mode", "label")):
        host.write({"app.kontain.version": "1"} if options else {})
        done = host(*options, *words)
        assert (done.returncode, done.stdout) == (1, "")
        assert "restore: the processes of a checkpoint would run outside of any VM" in done.stderr


def test_unmarked_containers_are_restored_by_crun(host: Host) -> None:
    done = host("--mode", "label", "restore", "--bundle", host.directory, "new")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"restore --bundle {host.directory} new\n")


def test_checkpoint_needs_a_container_and_criu(host: Host, tmp_path: Path) -> None:
    assert host("checkpoint", "--leave-running", "there").stdout.endswith(
        "checkpoint --leave-running there\n"
    )
    assert "`nothing` does not exist" in host("checkpoint", "nothing").stderr
    (tmp_path / "other").mkdir()
    without = Host(tmp_path / "other", "+SECCOMP")
    done = without("checkpoint", "there")
    assert done.returncode == 1
    assert "is built without criu" in done.stderr
