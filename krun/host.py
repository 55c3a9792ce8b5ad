"""probe() -> Host: what this machine offers; reads only, and only what a start needs to decide."""

from __future__ import annotations

import os

from krun.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from krun.policy import Policy

CRUN_PATHS = ("/usr/local/bin/crun", "/usr/bin/crun", "/usr/sbin/crun", "/bin/crun")
KM_PATHS = ("/opt/kontain/bin/km",)
# Statically linked inits that distributions ship; a dynamic tini would need the image's libraries.
# catatonit comes last: it leaves SIGTSTP, SIGTTIN and SIGTTOU blocked in what it starts.
INIT_PATHS = (
    "/usr/bin/tini-static",
    "/usr/sbin/tini-static",
    "/usr/bin/docker-init",
    "/usr/libexec/docker/docker-init",
    "/usr/libexec/podman/catatonit",
    "/usr/bin/catatonit",
)


class VirtDevice(Record):
    """A virtualization device of the host: `kind` is kvm or kkm; may this user open it?"""

    kind: str
    path: str
    major: int
    minor: int
    mode: int
    uid: int
    gid: int
    usable: bool = True


class Host(Record):
    """What was found; an empty string is a program that is not there.

    `km_wanted` is where km was looked for, `km_configured` whether the policy says so;
    `crun_configured` and `init_configured` are the policy's paths of crun and an init.
    """

    euid: int
    egid: int
    user_namespace: bool
    devices: tuple[VirtDevice, ...]
    crun: str
    km: str
    init: str
    nofile_soft: int
    nofile_hard: int
    km_wanted: str = KM_PATHS[0]
    km_configured: bool = False
    crun_configured: str = ""
    hybrid_cgroups: bool = False
    image_hooks: str = ""
    init_configured: str = ""


def first_executable(paths: tuple[str, ...]) -> str:
    """Return the first of paths that this process may execute, or an empty string."""
    for path in paths:
        if os.access(path, os.X_OK) and not os.path.isdir(path):
            return path
    return ""


def virt_devices() -> tuple[VirtDevice, ...]:
    """Return the virtualization devices, in km's order of preference."""
    found = []
    for kind in ("kvm", "kkm"):
        path = f"/dev/{kind}"
        try:
            status = os.stat(path)
        except OSError:
            continue
        found.append(
            VirtDevice(
                kind,
                path,
                os.major(status.st_rdev),
                os.minor(status.st_rdev),
                status.st_mode & 0o777,
                status.st_uid,
                status.st_gid,
                os.access(path, os.R_OK | os.W_OK),
            )
        )
    return tuple(found)


def in_user_namespace() -> bool:
    """Return whether this process is in a user namespace other than the initial one.

    Only the initial one maps all 4294967295 ids to themselves (user_namespaces(7)).
    """
    try:
        with open("/proc/self/uid_map", encoding="utf-8") as uid_map:
            return uid_map.read().split() != ["0", "0", "4294967295"]
    except OSError:
        return False


def hybrid_cgroups() -> bool:
    """Return whether v1 controllers and a v2 hierarchy with controllers are mounted together.

    crun refuses that layout.
    """
    try:
        with open("/sys/fs/cgroup/unified/cgroup.controllers", encoding="utf-8") as controllers:
            return bool(controllers.read().strip())
    except OSError:
        return False


# Where krun images hooks puts them unless told otherwise.
HOOK_PROGRAMS = "/usr/local/lib/krun-hooks/hooks"


def image_hooks() -> str:
    """Return the directory of the image hook programs; an empty string where none is installed.

    A checkout has them; krun images hooks puts them into a prefix.
    """
    above = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    # An installed copy is PREFIX/lib/krun/VERSION-DIGEST.
    library = os.path.dirname(os.path.dirname(above))
    for directory in (f"{above}/hooks", f"{library}/krun-hooks/hooks", HOOK_PROGRAMS):
        if os.access(f"{directory}/krun-image-check", os.X_OK):
            return directory
    return ""


def rootless() -> bool:
    """Return whether krun lacks the host's root: another user, or root of a user namespace."""
    return os.geteuid() != 0 or in_user_namespace()


def default_root() -> str:
    """Return the default directory of the containers' state."""
    if os.geteuid() == 0 and not in_user_namespace():
        return "/run/krun"
    runtime = os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.geteuid()}"
    return f"{runtime}/krun"


def state_home() -> str:
    """Return the directory of what krun keeps between starts (the pinned direct programs)."""
    if os.geteuid() == 0:
        return "/var/lib/krun"
    data = os.environ.get("XDG_DATA_HOME") or os.path.expanduser("~/.local/share")
    return f"{data}/krun"


def open_files() -> tuple[int, int]:
    """Return the soft and the hard RLIMIT_NOFILE; -1 where unlimited.

    From proc(5)'s limits: the resource module is a shared object, 0.2 ms to load.  Without /proc
    it is loaded.
    """
    try:
        with open("/proc/self/limits", encoding="utf-8") as limits:
            for line in limits:
                if line.startswith("Max open files"):
                    soft, hard = line.split()[3:5]
                    return _limit(soft), _limit(hard)
    except OSError:
        pass
    import resource

    return resource.getrlimit(resource.RLIMIT_NOFILE)


def _limit(text: str) -> int:
    return -1 if text == "unlimited" else int(text)


def probe(policy: Policy) -> Host:
    """Look at the machine once; the policy may name the programs."""
    soft, hard = open_files()
    return Host(
        euid=os.geteuid(),
        egid=os.getegid(),
        user_namespace=in_user_namespace(),
        devices=virt_devices(),
        crun=first_executable((policy.crun,) if policy.crun else CRUN_PATHS),
        km=first_executable((policy.km_path,) if policy.km_path else KM_PATHS),
        init=first_executable((policy.init_path,) if policy.init_path else INIT_PATHS),
        nofile_soft=soft,
        nofile_hard=hard,
        km_wanted=policy.km_path or KM_PATHS[0],
        km_configured=bool(policy.km_path),
        crun_configured=policy.crun,
        init_configured=policy.init_path,
        hybrid_cgroups=hybrid_cgroups(),
    )
