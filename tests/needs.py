"""What tests need of a machine.  What is missing is named, with the Debian package that has it."""

from __future__ import annotations

import os
import shutil

import pytest

# Debian's package of each program that a test may be skipped for; `make test` installs them.
PACKAGES = {
    "as": "binutils",
    "busybox": "busybox-static",
    "chrt": "util-linux",
    "conmon": "conmon",
    "containerd": "containerd",
    "crun": "crun",
    "ctr": "containerd",
    "curl": "curl",
    "docker": "docker.io",
    "docker-registry": "docker-registry",
    "dockerd": "docker.io",
    "fish": "fish",
    "gcc": "gcc",
    "go": "golang-go",
    "htpasswd": "apache2-utils",
    "ip": "iproute2",
    "man": "man-db",
    "musl-gcc": "musl-tools",
    "newuidmap": "uidmap",
    "nft": "nftables",
    "node": "nodejs",
    "nsenter": "util-linux",
    "openssl": "openssl",
    "pasta": "passt",
    "podman": "podman",
    "runc": "runc",
    "setpriv": "util-linux",
    "slirp4netns": "slirp4netns",
    "strace": "strace",
    "systemd-analyze": "systemd",
    "tc": "iproute2",
    "unshare": "util-linux",
    "zsh": "zsh",
}
# Every Debian system has it.
ESSENTIAL = {"util-linux"}

KVM = os.access("/dev/kvm", os.R_OK | os.W_OK)
NO_KVM = "needs a /dev/kvm to read and write (krun check says more)"


def find(program: str) -> str | None:
    """The path of a program; those of administrators count for every user."""
    return shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


def why_not(*programs: str, root: str = "") -> str:
    """Say what is missing and how to get it: programs, or the user who may do what `root` says.

    "" when nothing is.
    """
    if missing := [name for name in programs if find(name) is None]:
        packages = " ".join(sorted({PACKAGES[name] for name in missing}))
        return f"not installed: {', '.join(missing)} (Debian: {packages})"
    return f"needs root: {root}" if root and os.geteuid() != 0 else ""


def mark(*programs: str, root: str = "") -> pytest.MarkDecorator:
    """Mark tests that are skipped where something is missing."""
    why = why_not(*programs, root=root)
    return pytest.mark.skipif(bool(why), reason=why)


def need(*programs: str, root: str = "") -> None:
    """Skip the test that calls this where something is missing."""
    if why := why_not(*programs, root=root):
        pytest.skip(why)


def need_kvm() -> None:
    """Skip the test that calls this where no VM can be made."""
    if not KVM:
        pytest.skip(NO_KVM)
