"""mounts -> Mount records: one table of mount options (mount(8), runc, crun)."""

from __future__ import annotations

import os

from krun.errors import BadSpec
from krun.linux import flags as k
from krun.plan.model import IdMap, Mount

TYPE_CHECKING = False
if TYPE_CHECKING:
    from krun.types import IDMapping, Spec
    from krun.types import Mount as SpecMount

_ATIME = k.MOUNT_ATTR__ATIME

# option: (attributes set, attributes cleared); with a leading r, of the mounts below too.
ATTRIBUTES = {
    "ro": (k.MOUNT_ATTR_RDONLY, 0),
    "rw": (0, k.MOUNT_ATTR_RDONLY),
    "nosuid": (k.MOUNT_ATTR_NOSUID, 0),
    "suid": (0, k.MOUNT_ATTR_NOSUID),
    "nodev": (k.MOUNT_ATTR_NODEV, 0),
    "dev": (0, k.MOUNT_ATTR_NODEV),
    "noexec": (k.MOUNT_ATTR_NOEXEC, 0),
    "exec": (0, k.MOUNT_ATTR_NOEXEC),
    "noatime": (k.MOUNT_ATTR_NOATIME, _ATIME),
    "atime": (k.MOUNT_ATTR_RELATIME, _ATIME),
    "relatime": (k.MOUNT_ATTR_RELATIME, _ATIME),
    # mount(2) without any flag of access times is the kernel's default, relatime.
    "norelatime": (k.MOUNT_ATTR_RELATIME, _ATIME),
    "strictatime": (k.MOUNT_ATTR_STRICTATIME, _ATIME),
    "nostrictatime": (k.MOUNT_ATTR_RELATIME, _ATIME),
    "nodiratime": (k.MOUNT_ATTR_NODIRATIME, 0),
    "diratime": (0, k.MOUNT_ATTR_NODIRATIME),
    "nosymfollow": (k.MOUNT_ATTR_NOSYMFOLLOW, 0),
    "symfollow": (0, k.MOUNT_ATTR_NOSYMFOLLOW),
}

PROPAGATION = {
    "shared": k.MS_SHARED,
    "rshared": k.MS_SHARED | k.MS_REC,
    "slave": k.MS_SLAVE,
    "rslave": k.MS_SLAVE | k.MS_REC,
    "private": k.MS_PRIVATE,
    "rprivate": k.MS_PRIVATE | k.MS_REC,
    "unbindable": k.MS_UNBINDABLE,
    "runbindable": k.MS_UNBINDABLE | k.MS_REC,
}

# Flags of the superblock, which the file system takes by name.
SUPERBLOCK = ("sync", "dirsync", "lazytime", "mand")

# Negations of those, and words without effect here: MS_I_VERSION has none in mount(2) any more.
IGNORED = (
    "iversion",
    "defaults",
    "async",
    "nolazytime",
    "nomand",
    "noiversion",
    "silent",
    "loud",
    "_netdev",
    "nofail",
)

# File systems whose superblock is shared between mounts, or has no use for being read-only.
_ATTRIBUTE_ONLY = ("proc", "sysfs", "mqueue", "devpts", "tmpfs", "cgroup", "cgroup2")


def plan_mounts(spec: Spec, bundle: str) -> tuple[Mount, ...]:
    """Return the mounts of a configuration, in its order."""
    return tuple(
        plan_mount(mount, f"mounts[{index}]", bundle)
        for index, mount in enumerate(spec.get("mounts", ()))
    )


def plan_mount(mount: SpecMount, where: str, bundle: str = "/") -> Mount:
    """Return one mount; raises BadSpec for options that contradict each other.

    The source of a bind mount is relative to the bundle (config.md, Mounts).
    """
    options = mount.get("options") or ()
    fstype = mount.get("type", "")
    source = mount.get("source", "")
    set_ = clear = recursive_set = recursive_clear = 0
    bind = recursive = copy_up = copy_symlink = nofollow = remount = False
    idmap = ""
    propagation: list[int] = []
    data: list[tuple[str, str | None]] = []
    for option in options:
        found = ATTRIBUTES.get(option)
        if found is not None:
            set_ = set_ & ~(found[0] | found[1]) | found[0]
            clear = clear & ~(found[0] | found[1]) | found[1]
            continue
        if option in PROPAGATION:
            propagation.append(PROPAGATION[option])
            continue
        found = ATTRIBUTES.get(option[1:]) if option[:1] == "r" else None
        if found is not None:
            recursive_set = recursive_set & ~(found[0] | found[1]) | found[0]
            recursive_clear = recursive_clear & ~(found[0] | found[1]) | found[1]
        elif option in ("bind", "rbind"):
            bind = True
            recursive = recursive or option == "rbind"
        elif option in SUPERBLOCK:
            data.append((option, None))
        elif option == "tmpcopyup":
            copy_up = True
        elif option == "copy-symlink":
            copy_symlink = True
        elif option in ("src-nofollow", "dest-nofollow"):
            nofollow = True
        elif option == "remount":
            remount = True
        elif option in ("idmap", "ridmap") or option.startswith(("idmap=", "ridmap=")):
            idmap = option
        elif option not in IGNORED and not option.startswith(("x-", "X-")):
            name, equals, value = option.partition("=")
            data.append((name, value if equals else None))
    if fstype in ("bind", "rbind"):
        bind = True
        recursive = recursive or fstype == "rbind"
    if not bind and not remount and not fstype:
        raise BadSpec(f"{where}.type", "is required unless the mount is a bind mount")
    if bind and not source:
        raise BadSpec(f"{where}.source", "is required for a bind mount")
    if bind and source[:1] != "/":
        source = f"{bundle}/{source}"
    destination = os.path.normpath("/" + mount["destination"].lstrip("/"))
    if destination == "/" and not remount:
        # The new root is below whatever is mounted on it.
        raise BadSpec(f"{where}.destination", "is the root itself, which root.path names")
    mapping = _idmap(mount, idmap, where)
    if mapping and not bind:
        raise BadSpec(where, "only bind mounts have an id mapping")
    if copy_up and fstype != "tmpfs":
        raise BadSpec(f"{where}.options", "tmpcopyup is for tmpfs alone")
    if remount:
        kind = "remount"
    elif bind:
        kind = "bind"
    elif fstype in ("cgroup", "cgroup2"):
        kind = "cgroup"
    else:
        kind = "filesystem"
        if set_ & k.MOUNT_ATTR_RDONLY and fstype not in _ATTRIBUTE_ONLY:
            data.append(("ro", None))
    return Mount(
        kind,
        destination,
        source,
        fstype,
        tuple(data) if not bind else (),
        set_,
        clear,
        recursive_set,
        recursive_clear,
        recursive,
        tuple(propagation),
        copy_up,
        copy_symlink,
        nofollow,
        mapping,
    )


def _idmap(mount: SpecMount, option: str, where: str) -> IdMap | None:
    """Return the mapping of an idmapped mount.

    The mapping is the mount's own uidMappings, or given in the option (idmap=uids=C-H-N;gids=…,
    crun's form); a bare idmap without mappings means the container's, filled by the caller.  A
    range that begins with @ names the container's own ids in place of the host's: so does its line.
    """
    uids, gids = mount.get("uidMappings"), mount.get("gidMappings")
    if uids or gids:
        if not uids or not gids:
            raise BadSpec(where, "uidMappings and gidMappings go together")
        return IdMap(id_map(uids), id_map(gids), option.startswith("r"))
    if not option:
        return None
    name, _, text = option.partition("=")
    if not text:
        return IdMap("", "", name == "ridmap")
    maps = {"uids": "", "gids": ""}
    for part in text.split(";"):
        key, _, ranges = part.partition("=")
        if key not in maps:
            raise BadSpec(f"{where}.options", f"{option}: neither uids= nor gids=")
        lines = []
        for one in ranges.split("#"):
            numbers = one.lstrip("@").split("-")
            if len(numbers) != 3 or not all(
                number.isascii() and number.isdigit() for number in numbers
            ):
                raise BadSpec(f"{where}.options", f"{option}: {one} is not CONTAINER-HOST-SIZE")
            lines.append(one[: one.startswith("@")] + " ".join(numbers))
        maps[key] = "\n".join(lines)
    return IdMap(maps["uids"], maps["gids"], name == "ridmap")


def id_map(mappings: list[IDMapping]) -> str:
    """Return id mappings as the text of /proc/PID/uid_map."""
    return "\n".join(f"{m['containerID']} {m['hostID']} {m['size']}" for m in mappings)
