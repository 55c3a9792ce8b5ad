"""inspect() -> Facts: look at this machine; reads, asks programs for their version, opens devices.

Nothing is left: the VM that is made to see whether one can be made goes with its descriptor.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import stat
import subprocess
from importlib import util

from krun import host, policy
from krun.checks import CAPABILITIES, KVM_API_VERSION, Device, Facts, Program
from krun.errors import BadSpec, KrunError
from krun.network import reader

KVM_GET_API_VERSION = 0xAE00
KVM_CREATE_VM = 0xAE01
# Seconds for a program to print its version; podman's first start is slow.
PATIENCE = 20
# Import names of the packages that krun's verbs use, and what pip calls them.
PACKAGES = {
    "click": "click",
    "jsonschema": "jsonschema",
    "prctl": "python-prctl",
    "psutil": "psutil",
    "pyroute2": "pyroute2",
    "rich": "rich",
    "tomlkit": "tomlkit",
}
_SBIN = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def version_of(path: str, *words: str) -> Program:
    """Return a program with its version: the first number it prints, else its first line."""
    if not path:
        return Program()
    try:
        done = subprocess.run(
            [path, *words], capture_output=True, text=True, errors="replace", timeout=PATIENCE
        )
    except OSError as error:
        return Program(path, "", error.strerror or str(error))
    except subprocess.TimeoutExpired:
        return Program(path, "", f"no answer in {PATIENCE} s")
    # km writes its version to its log, which is standard error here.
    output = done.stdout + done.stderr
    lines = output.strip().splitlines()
    if done.returncode or not lines:
        return Program(path, "", lines[-1] if lines else f"status {done.returncode}")
    found = re.search(r"\d+\.\d+[\w.+~-]*", output)
    return Program(path, found[0] if found else lines[0])


def _privileges() -> tuple[tuple[str, ...], bool]:
    """Return which of the capabilities that make containers root lacks, and no_new_privs.

    Nothing is said without python-prctl, nor of the capabilities of an ordinary user.
    """
    try:
        import prctl
    except ImportError:
        return (), False
    lacking = []
    if os.geteuid() == 0:
        lacking = [one for one in CAPABILITIES if not getattr(prctl.cap_effective, one.lower())]
    return tuple(lacking), bool(prctl.get_no_new_privs())


def _which(name: str) -> str:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:{_SBIN}") or ""


def try_device(path: str) -> Device:
    """Open a virtualization device and make a VM, as a monitor will."""
    try:
        status = os.stat(path)
    except OSError:
        return Device(path)
    mode = stat.S_IMODE(status.st_mode)
    if not stat.S_ISCHR(status.st_mode):
        return Device(path, True, mode, "is no device")
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        return Device(path, True, mode, f"open: {error.strerror}")
    try:
        version = fcntl.ioctl(fd, KVM_GET_API_VERSION, 0)
        if version != KVM_API_VERSION:
            return Device(path, True, mode, f"has API version {version}, not {KVM_API_VERSION}")
        os.close(fcntl.ioctl(fd, KVM_CREATE_VM, 0))
    except OSError as error:
        return Device(path, True, mode, f"no VM can be made: {error.strerror}")
    finally:
        os.close(fd)
    return Device(path, True, mode)


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def cpu_flags() -> frozenset[str]:
    """Return the first processor's flags."""
    for line in _read("/proc/cpuinfo").splitlines():
        if line.startswith("flags"):
            return frozenset(line.partition(":")[2].split())
    return frozenset()


def cgroup_layout(mounts: str, root: str = "/sys/fs/cgroup") -> tuple[str, tuple[str, ...]]:
    """Return the layout (v1, hybrid, v2, none) and controllers; `mounts` is /proc/self/mounts."""
    v1: set[str] = set()
    v2 = []
    for line in mounts.splitlines():
        fields = line.split()
        if len(fields) < 4 or not fields[1].startswith(root):
            continue
        if fields[2] == "cgroup2":
            v2.append(fields[1])
        elif fields[2] == "cgroup":
            v1.update(fields[3].split(","))
    v1 -= {"rw", "ro", "nosuid", "nodev", "noexec", "relatime", "noatime", "xattr"}
    names = {name for name in v1 if "=" not in name and name != "none"}
    for place in v2:
        names.update(_read(f"{place}/cgroup.controllers").split())
    controllers = tuple(sorted(names))
    if v1 and v2:
        return "hybrid", controllers
    if v2:
        return "v2", controllers
    return ("v1" if v1 else "none"), controllers


def _sets_id(name: str) -> Program:
    """Return newuidmap or newgidmap; an error where it can set no ids."""
    path = _which(name)
    if not path:
        return Program()
    set_id = os.stat(path).st_mode & (stat.S_ISUID | stat.S_ISGID)
    try:
        capable = bool(os.getxattr(path, "security.capability"))
    except OSError:
        capable = False
    return Program(path, "", "" if set_id or capable else "neither setuid nor with capabilities")


def _has_range(path: str, user: str, uid: int) -> bool:
    return any(
        line.split(":")[0] in (user, str(uid)) for line in _read(path).splitlines() if line.strip()
    )


def _libseccomp() -> str:
    import ctypes

    try:
        ctypes.CDLL("libseccomp.so.2")
    except OSError:
        return ""
    return "libseccomp.so.2"


def _user() -> str:
    import pwd

    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())


def _is_there(module: str) -> bool:
    try:
        return util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _start() -> str:
    """Return how the copy that runs starts: warm, stale, cold; an empty string in a checkout."""
    from krun.install import library, warm

    directory = str(library.SOURCE.parent)
    if not os.path.exists(f"{directory}/{library.ARCHIVE}"):
        return ""
    if not os.path.exists(f"{directory}/{warm.FACTS}"):
        return "cold"
    return "warm" if warm.is_current(directory) else "stale"


def _stale_launcher(source: str) -> str:
    """Return the launcher that was installed before the policy file was written, if there is."""
    path = shutil.which("krun") or ""
    if not source or not path:
        return ""
    from krun.install import launcher

    with open(path, "rb") as file:
        if launcher.MARK not in file.read(512):
            return ""
    newest = max(os.stat(source).st_mtime_ns, os.stat(os.path.dirname(source)).st_mtime_ns)
    return path if newest >= os.stat(path).st_mtime_ns else ""


def inspect(policy_file: str | None = None) -> Facts:
    """Look at the machine; takes as long as podman and docker take to print their versions."""
    policy_error = ""
    try:
        rules = policy.load(policy_file)
    except KrunError as error:
        rules, policy_error = policy.Policy(), str(error)
    try:
        if rules.network is not None:
            reader.parse(rules.network, "defaults.network")
    except BadSpec as error:
        policy_error = f"{rules.source}: {error.path}: {error.text}"
    machine = host.probe(rules)
    uname = os.uname()
    layout, controllers = cgroup_layout(_read("/proc/self/mounts"))
    user = _user()
    limit = _read("/proc/sys/user/max_user_namespaces").strip()
    clone = _read("/proc/sys/kernel/unprivileged_userns_clone").strip()
    lacking, no_new_privs = _privileges()
    return Facts(
        kernel=uname.release,
        machine=uname.machine,
        cpu_flags=cpu_flags(),
        devices=(try_device("/dev/kvm"), try_device("/dev/kkm")),
        crun=version_of(machine.crun, "--version"),
        km=version_of(machine.km, "--km-log-to=stderr", "--version"),
        init=Program(machine.init),
        podman=version_of(_which("podman"), "--version"),
        docker=version_of(_which("docker"), "--version"),
        containerd=version_of(_which("containerd"), "--version"),
        cgroup=layout,
        controllers=controllers,
        seccomp="Seccomp_filters:" in _read("/proc/self/status")
        or os.path.exists("/proc/sys/kernel/seccomp/actions_avail"),
        libseccomp=_libseccomp(),
        newuidmap=_sets_id("newuidmap"),
        newgidmap=_sets_id("newgidmap"),
        user=user,
        euid=os.geteuid(),
        user_namespaces=limit not in ("", "0") and clone != "0",
        subuid=_has_range("/etc/subuid", user, os.geteuid()),
        subgid=_has_range("/etc/subgid", user, os.geteuid()),
        packages=tuple(name for module, name in PACKAGES.items() if not _is_there(module)),
        native=_is_there("krun.launch"),
        builtin=_is_there("krun.monitor.builtin"),
        policy=rules.source,
        policy_error=policy_error,
        launcher_stale=_stale_launcher(rules.source),
        start=_start(),
        lacking=lacking,
        no_new_privs=no_new_privs,
    )
