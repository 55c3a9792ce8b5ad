"""The Plan: everything the native engine will do to make one container, as plain data."""

from __future__ import annotations

from krun.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class Join(Record):
    """A namespace that is joined: its CLONE_NEW* flag and the file that names it."""

    flag: int
    path: str


class Namespaces(Record):
    """What is new, what is joined; `listed` is both, which exec joins later."""

    new: int
    join: tuple[Join, ...]
    listed: int
    uid_map: str
    gid_map: str
    time_offsets: str


class IdMap(Record):
    """The id mapping of one idmapped mount, as text of uid_map(5) and gid_map(5)."""

    uid_map: str
    gid_map: str
    recursive: bool


class Mount(Record):
    """One mount; `kind` is bind, filesystem, cgroup, or remount.

    set_/clear are MOUNT_ATTR_* of the mount, recursive_* of the mounts below it too; `options`
    go to the file system; propagation holds MS_* in order.
    """

    kind: str
    destination: str
    source: str
    fstype: str
    options: tuple[tuple[str, str | None], ...] = ()
    set_: int = 0
    clear: int = 0
    recursive_set: int = 0
    recursive_clear: int = 0
    recursive: bool = False
    propagation: tuple[int, ...] = ()
    copy_up: bool = False
    copy_symlink: bool = False
    source_nofollow: bool = False
    idmap: IdMap | None = None


class Device(Record):
    """A device node or fifo below the root."""

    path: str
    mode: int
    major: int
    minor: int
    uid: int
    gid: int


class Link(Record):
    """A symbolic link below the root."""

    path: str
    target: str


class Capabilities(Record):
    """Five capability sets as bit masks."""

    bounding: int
    effective: int
    inheritable: int
    permitted: int
    ambient: int


class Rlimit(Record):
    """One resource limit, by the kernel's number."""

    resource: int
    soft: int
    hard: int


class Process(Record):
    """What the payload's process is to be."""

    args: tuple[str, ...]
    env: tuple[str, ...]
    cwd: str
    terminal: bool
    console_size: tuple[int, int] | None
    uid: int
    gid: int
    groups: tuple[int, ...]
    umask: int | None
    capabilities: Capabilities
    rlimits: tuple[Rlimit, ...]
    no_new_privileges: bool
    oom_score_adj: int | None
    apparmor: str
    selinux: str
    scheduler: bytes | None
    io_priority: int | None
    affinity_initial: tuple[int, ...]
    affinity_final: tuple[int, ...]


class Rule(Record):
    """One device rule; -1 is any number, kind is a, b or c."""

    allow: bool
    kind: str
    major: int
    minor: int
    access: str


class Write(Record):
    """One value for one file of one cgroup controller."""

    controller: str
    file: str
    value: str


class Unit(Record):
    """A scope that systemd makes: properties are name, D-Bus signature and value.

    Without a slice it is where systemd puts it.
    """

    name: str
    slice: str
    properties: tuple[tuple[str, str, Any], ...]


class Cgroup(Record):
    """Where the container's cgroup is and what is written there.

    `path` is linux.cgroupsPath, or the container's id; writes are for v1 or v2 as `version`
    says (a hybrid machine counts as v1).  With a unit systemd says where it is.  Realtime: the
    payload's policy is, and nothing says how much of the time that may take.
    """

    path: str
    version: int
    writes: tuple[Write, ...]
    devices: tuple[Rule, ...]
    unit: Unit | None = None
    realtime: bool = False


class Plan(Record):
    """One container, decided."""

    id: str
    bundle: str
    rootfs: str
    readonly: bool
    root_propagation: int
    namespaces: Namespaces
    hostname: str
    domainname: str
    mounts: tuple[Mount, ...]
    devices: tuple[Device, ...]
    links: tuple[Link, ...]
    masked_paths: tuple[str, ...]
    readonly_paths: tuple[str, ...]
    sysctl: tuple[tuple[str, str], ...]
    process: Process
    personality: int | None
    memory_policy: tuple[int, tuple[int, ...]] | None
    seccomp: dict[str, Any] | None
    seccomp_strict: bool
    mount_label: str
    mount_context: str
    cgroup: Cgroup
    hooks: dict[str, list[Any]]
    annotations: dict[str, str]
    rdt: dict[str, Any] | None
    keep_groups: bool


def to_json(value: Any) -> Any:
    """Return a plan, or a part of one, as what JSON can hold."""
    if isinstance(value, tuple):
        if hasattr(value, "_asdict"):
            return {name: to_json(member) for name, member in value._asdict().items()}
        return [to_json(member) for member in value]
    if isinstance(value, bytes):
        return value.hex()
    return value
