"""translate(...) -> Translation: wrap the payload of a configuration with its monitor.  Pure.

Both engines take the result, so whether something runs in a VM is decided here and nowhere else.
What is added: the monitor's read-only mount, its device with the cgroup rule, an init in front,
the limits km needs, and the annotation that exec reads.  Nothing else changes.
"""

from __future__ import annotations

import os

from krun import extension, jsontext
from krun.errors import BadSpec, CannotExecute, KrunError, PolicyDenied
from krun.monitor import km
from krun.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from krun.extension import Choice
    from krun.host import Host, VirtDevice
    from krun.payload import Payload
    from krun.types import Device, DeviceRule, Hook, Process, Rlimit, Spec

KM_IN_IMAGE = "/opt/kontain/bin/km"
# On devtmpfs: /run is mounted nodev.
NODES = "/dev/.krun"
STATE_VERSION = 1
_MOUNT_OPTIONS = ["bind", "ro", "nosuid", "nodev", "rprivate"]


class Pinned(Record):
    """An allow-listed program, verified: the host's read-only copy and who asks for it."""

    path: str
    pattern: str
    directory: str
    name: str


class Facts(Record):
    """What was seen of the container's files before it exists.

    `init_words` are the leading words of process.args that start an init the client supplied
    from the host; `payload` is None where the host's own program is all that runs.
    """

    payload: Payload | None
    init_words: list[str]
    km_words: list[str]
    dev_is_directory: bool
    marked: bool
    pinned: tuple[Pinned, ...] = ()
    chosen_pin: int | None = None


class Note(Record):
    """Something the user may want to know; `level` is that of a log line."""

    level: str
    text: str


class Node(Record):
    """A device node that krun, as the host's root, has to make before the hand-over.

    A container of root's with user namespaces can neither make nodes nor open the host's 0600
    one; `uid` is the host's number of its root, the only one that can reach the new node.
    """

    path: str
    device: VirtDevice
    uid: int


class Translation(Record):
    """The configuration for the engine, and what was decided.

    `outside` is a payload without a VM: a listed program, or a container left unchanged.
    """

    spec: Spec
    engine: str
    monitor: str
    notes: list[Note]
    state: dict[str, Any]
    node: Node | None = None
    outside: bool = False


def _has_own(spec: Spec, kind: str) -> bool:
    """Return whether the container gets a new namespace of that kind."""
    namespaces = (spec.get("linux") or {}).get("namespaces") or []
    return any(n["type"] == kind and not n.get("path") for n in namespaces)


def _uses(spec: Spec, kind: str) -> bool:
    namespaces = (spec.get("linux") or {}).get("namespaces") or []
    return any(n["type"] == kind for n in namespaces)


def _has_mount(spec: Spec, destination: str, fstype: str = "") -> bool:
    for mount in reversed(spec.get("mounts") or []):
        if os.path.normpath(mount["destination"]) == destination:
            return not fstype or mount.get("type") == fstype
    return False


def _has_proc(spec: Spec) -> bool:
    """Return whether /proc will be one: of the container's own, or the host's bound over."""
    for mount in reversed(spec.get("mounts") or []):
        if os.path.normpath(mount["destination"]) == "/proc":
            return mount.get("type") == "proc" or mount.get("source") == "/proc"
    return False


def _place(spec: Spec, facts: Facts, name: str) -> str:
    """Return where in the container to mount a host file.

    Below /dev, where it is the container's own tmpfs: no mount point is left in the image, and
    both /dev and the file are mount points, which the container cannot rename away and replace
    before an exec.  Elsewhere in the root directory, whose own name cannot change either.
    """
    if facts.dev_is_directory and _has_mount(spec, "/dev", "tmpfs"):
        return f"/dev/{name}"
    return f"/.krun-{name}"


def pick_device(host: Host, wanted: str) -> VirtDevice:
    """Return the device to use; raises CannotExecute that tells how to get one."""
    for device in host.devices:
        if wanted in ("", "auto", device.kind):
            if not device.usable:
                raise CannotExecute(
                    f"{device.path}: permission denied, a payload cannot run in a VM",
                    126,
                    f"chmod 0666 {device.path}, a udev rule, or the group that owns it",
                )
            return device
    name = wanted if wanted in ("kvm", "kkm") else "kvm"
    raise CannotExecute(
        f"/dev/{name}: no such device, a payload cannot run in a VM",
        126,
        f"load its kernel module ({'kkm' if name == 'kkm' else 'kvm_intel, kvm_amd'}); "
        "krun check tells more",
    )


def _no_km(host: Host, way_out: str) -> KrunError:
    return KrunError(f"km: no executable file at {host.km_wanted}", way_out)


def _pick_monitor(choice: Choice, host: Host, engine: str) -> str:
    if choice.monitor != "auto":
        return choice.monitor
    if host.km or choice.monitor_path:
        return "km"
    if host.km_configured:
        raise _no_km(host, "the policy's paths.km names it")
    if engine == "crun":
        raise _no_km(host, "the crun engine needs it; the built-in monitor has --engine native")
    return "builtin"


def _pick_engine(choice: Choice, host: Host, monitor: str) -> str:
    engine = choice.engine
    if engine == "auto":
        no_crun = monitor == "builtin" or not host.crun or host.hybrid_cgroups
        engine = "native" if no_crun else "crun"
    if not host.crun and host.crun_configured:
        raise KrunError(
            f"crun: no executable file at {host.crun_configured}",
            "the policy's paths.crun names it",
        )
    if engine == "crun" and not host.crun:
        raise KrunError("crun is not installed", "apt-get install crun, or use --engine native")
    if engine == "crun" and monitor == "builtin":
        raise KrunError(
            "the built-in monitor runs inside krun and needs the native engine",
            "use --engine native, or install km",
        )
    return engine


class _Draft:
    """The configuration while it is being translated."""

    def __init__(self, spec: Spec, process: Process, facts: Facts, host: Host) -> None:
        self.spec: Spec = {**spec}
        self.process: Process = {**process}
        self.mounts = list(spec.get("mounts") or [])
        self.facts = facts
        self.host = host
        self.notes: list[Note] = []
        self.state: dict[str, Any] = {}
        self.node: Node | None = None

    def note(self, level: str, text: str) -> None:
        """Keep something to log."""
        self.notes.append(Note(level, text))

    def bind(self, source: str, name: str) -> str:
        """Mount a host file or directory read-only and return its place in the container."""
        place = _place(self.spec, self.facts, name)
        self.mounts.append(
            {
                "destination": place,
                "type": "bind",
                "source": source,
                "options": list(_MOUNT_OPTIONS),
            }
        )
        return place

    def finish(self, engine: str, monitor: str) -> Translation:
        """Put the parts together."""
        spec = self.spec
        spec["process"] = self.process
        spec["mounts"] = self.mounts
        spec["annotations"] = {
            **(spec.get("annotations") or {}),
            extension.STATE: jsontext.dumps(self.state),
        }
        outside = self.facts.chosen_pin is not None
        return Translation(spec, engine, monitor, self.notes, self.state, self.node, outside)


def _root_uid(spec: Spec) -> int | None:
    """Return the host's uid of the container's root, None where no mapping tells."""
    for mapping in (spec.get("linux") or {}).get("uidMappings") or []:
        if mapping["containerID"] == 0:
            return mapping["hostID"]
    return None


def _bind_device(draft: _Draft, device: VirtDevice, host_root: bool) -> None:
    """Bind-mount the device: no mknod in a user namespace."""
    source = device.path
    uid = _root_uid(draft.spec) if host_root else None
    if device.mode & 0o006 != 0o006:
        if uid is None:
            draft.note(
                "warning",
                f"{device.path} has mode {device.mode:o}: users of a container in a user "
                "namespace may lack access (chmod 0666, or a udev rule)",
            )
        else:
            source = f"{NODES}/{uid}/{device.kind}"
            draft.node = Node(source, device, uid)
    draft.mounts.append(
        {
            "destination": device.path,
            "type": "bind",
            "source": source,
            "options": ["bind", "nosuid", "noexec", "rprivate"],
        }
    )


def _add_device(draft: _Draft, device: VirtDevice) -> None:
    """Give the container its device: a node or a bind mount, and a cgroup rule."""
    host = draft.host
    host_root = host.euid == 0 and not host.user_namespace
    linux = draft.spec.get("linux") or {}
    if not host_root or _uses(draft.spec, "user"):
        _bind_device(draft, device, host_root)
    else:
        node: Device = {
            "path": device.path,
            "type": "c",
            "major": device.major,
            "minor": device.minor,
            # Every user of the container runs in a VM, so every user may open it.
            "fileMode": 0o666,
            "uid": 0,
            "gid": 0,
        }
        others = [d for d in linux.get("devices") or [] if d.get("path") != device.path]
        linux = {**linux, "devices": [*others, node]}
    resources = linux.get("resources") or {}
    rules = resources.get("devices") or []
    # An empty list means no device rules at all; one rule would turn everything else off.
    if rules and host_root:
        rule: DeviceRule = {
            "allow": True,
            "type": "c",
            "major": device.major,
            "minor": device.minor,
            "access": "rw",
        }
        linux = {**linux, "resources": {**resources, "devices": [*rules, rule]}}
    if linux:
        draft.spec["linux"] = linux


def _raise_nofile(draft: _Draft) -> None:
    """Raise the soft RLIMIT_NOFILE to what km needs; KrunError where the hard limit forbids it."""
    soft, hard = draft.host.nofile_soft, draft.host.nofile_hard
    rlimits = draft.process.get("rlimits") or []
    for rlimit in rlimits:
        if rlimit["type"] == "RLIMIT_NOFILE":
            soft, hard = rlimit["soft"], rlimit["hard"]
    if hard < 0:  # RLIM_INFINITY, as getrlimit(2) gives it to Python
        hard = (1 << 64) - 1
    if hard < km.NOFILE_LEAST:
        raise KrunError(
            f"process.rlimits: RLIMIT_NOFILE hard limit {hard} is too low, "
            f"km needs {km.NOFILE_LEAST}",
            f"--ulimit nofile={km.NOFILE_WANTED}:{km.NOFILE_WANTED}",
        )
    wanted = min(hard, km.NOFILE_WANTED)
    if 0 <= soft < wanted:
        others = [r for r in rlimits if r["type"] != "RLIMIT_NOFILE"]
        raised: Rlimit = {"type": "RLIMIT_NOFILE", "soft": wanted, "hard": hard}
        draft.process["rlimits"] = [*others, raised]
        draft.note("info", f"RLIMIT_NOFILE raised from {soft} to {wanted}, which km needs")


def _raise_pids(draft: _Draft, tasks: int) -> None:
    """Raise a pids limit below the tasks that km (and an init) are."""
    linux = draft.spec.get("linux") or {}
    resources = linux.get("resources") or {}
    pids = resources.get("pids") or {}
    limit = pids.get("limit") or 0
    if 0 < limit < tasks:
        draft.note("info", f"pids limit raised from {limit} to {tasks}, which km needs")
        draft.spec["linux"] = {
            **linux,
            "resources": {**resources, "pids": {**pids, "limit": tasks}},
        }


def clean_environment(env: list[str], notes: list[Note]) -> list[str]:
    """Return env without the variables that steer km itself; an image must not set them."""
    kept = []
    for entry in env:
        name = entry.partition("=")[0]
        if name.startswith(km.RESERVED_ENV):
            text = f"environment variable {name} removed: it would steer the monitor"
            notes.append(Note("warning", f"{text} (use annotations {extension.PREFIX}km.*)"))
        else:
            kept.append(entry)
    return kept


def check_strings(argv: list[str], env: list[str]) -> None:
    """Raise CannotExecute where km would cut a string or refuse their sum."""
    total = 0
    for what, strings in (("argument", argv), ("environment variable", env)):
        for text in strings:
            size = len(os.fsencode(text))
            total += size + 1
            if size > km.STRING_MAX:
                name = text.partition("=")[0] if what != "argument" else f"{text[:20]}…"
                raise CannotExecute(
                    f'exec: "{argv[0]}": argument list too long: {what} {name} has {size} bytes, '
                    f"km passes on {km.STRING_MAX}",
                    126,
                    "use the built-in monitor, or shorten it",
                )
    if total > km.STRINGS_MAX:
        raise CannotExecute(
            f'exec: "{argv[0]}": argument list too long: {total} bytes, km takes {km.STRINGS_MAX}',
            126,
            "use the built-in monitor",
        )


def _payload_words(facts: Facts) -> list[str]:
    payload = facts.payload
    if payload is None:
        raise BadSpec("process.args", "names no program behind the init")
    if payload.kind == "snapshot" and len(payload.argv) > 1:
        raise BadSpec("process.args", "a km snapshot takes no arguments")
    return payload.argv


def unchanged(spec: Spec, choice: Choice, facts: Facts) -> bool:
    """Return whether the container goes to the engine as it is, without any VM."""
    annotations = spec.get("annotations") or {}
    if choice.sandbox == "native" and extension.is_sandbox(annotations):
        return True
    if facts.payload is None:
        # The client's own init from the host, with nothing behind it: a pod's pause.
        return True
    if choice.mode != "label":
        return False
    return not (
        extension.is_marked(annotations) or facts.marked or _has_mount(spec, extension.MARK_PATH)
    )


def _without(spec: Spec, names: tuple[str, ...]) -> Spec:
    annotations = spec.get("annotations") or {}
    if not any(name in annotations for name in names):
        return spec
    kept = {k: v for k, v in annotations.items() if k not in names}
    return {**spec, "annotations": kept}


def _without_dropped(spec: Spec, choice: Choice, notes: list[Note]) -> Spec:
    for name in choice.dropped:
        way_out = "the policy's allow.crunAnnotations lists what is kept"
        notes.append(Note("warning", f"annotation {name} dropped ({way_out})"))
    return _without(spec, choice.dropped)


def with_image_hooks(spec: Spec, choice: Choice, host: Host, notes: list[Note]) -> Spec:
    """Return spec with the image hooks that the choice asks for (docker and containerd have none).

    podman and CRI-O run the same programs from their own hooks.d files; the container that holds a
    pod's namespaces is of an image that nobody asked for.
    """
    annotations = spec.get("annotations") or {}
    by_client = annotations.get("io.container.manager") in ("libpod", "cri-o")
    sandbox = annotations.get("io.kubernetes.cri.container-type") == "sandbox"
    if not choice.images or by_client or sandbox:
        return spec
    if not host.image_hooks:
        text = "images.check: the hook programs are not installed"
        if choice.images.get("check") == "refuse":
            raise KrunError(text, "krun images hooks installs them")
        notes.append(Note("warning", text))
        return spec

    def hook(name: str, *words: str) -> Hook:
        return {"path": f"{host.image_hooks}/{name}", "args": [name, *words]}

    check = choice.images.get("check", "record")
    added: dict[str, list[Hook]] = {
        "createRuntime": [hook("krun-image-check", f"--mode={check}")],
        "poststart": [hook("krun-image-record")],
        "poststop": [hook("krun-image-record")],
    }
    if choice.images.get("prefetch"):
        added["poststart"].append(hook("krun-image-prefetch"))
    hooks = spec.get("hooks") or {}
    merged = {name: [*(hooks.get(name) or []), *new] for name, new in added.items()}
    return {**spec, "hooks": {**hooks, **merged}}


def translate(spec: Spec, choice: Choice, host: Host, facts: Facts) -> Translation:
    """Return spec with its payload wrapped.

    Raises KrunError for what is missing on the host, CannotExecute for a payload that no VM can
    run, PolicyDenied for one that may not run outside.
    """
    spec = _without(spec, (extension.STATE,))
    process = spec.get("process")
    if process is None:
        raise BadSpec("process", "is required")
    notes: list[Note] = []
    spec = with_image_hooks(spec, choice, host, notes)
    if unchanged(spec, choice, facts):
        engine = _pick_engine(choice, host, "none")
        return Translation(spec, engine, "none", notes, {}, outside=True)
    spec = _without_dropped(spec, choice, notes)
    words = _payload_words(facts)
    direct = facts.chosen_pin is not None
    monitor = _pick_monitor(choice, host, choice.engine)
    if monitor == "none" and not direct:
        raise PolicyDenied(
            f"{words[0]}: monitor none runs allow-listed programs only",
            "list it under directInvocation in /etc/krun/policy.json, or leave the monitor out",
        )
    if direct and monitor == "km" and not (host.km or choice.monitor_path):
        monitor = "none"
    engine = _pick_engine(choice, host, monitor)
    draft = _Draft(spec, process, facts, host)
    draft.notes += notes
    pinned = []
    for index, pin in enumerate(facts.pinned):
        place = draft.bind(pin.directory, f".direct-{index}")
        pinned.append(
            {
                "path": pin.path,
                "pattern": pin.pattern,
                "place": place,
                "name": pin.name,
                "directory": pin.directory,
            }
        )
    draft.state = {
        "version": STATE_VERSION,
        "monitor": monitor,
        "args": process.get("args") or [],
        "execOutsideVM": choice.exec_outside_vm,
        "direct": pinned,
    }
    if facts.chosen_pin is not None:
        # The name asked for stays the last part of argv[0]: some programs go by it.
        name = os.path.basename(words[0])
        words = [f"{pinned[facts.chosen_pin]['place']}/{name}", *words[1:]]
    if monitor == "km":
        _wrap_with_km(draft, choice, words, direct)
    else:
        # The built-in monitor is the init that the client wanted in front of the payload.
        draft.process["args"] = words if monitor == "builtin" else [*facts.init_words, *words]
        draft.state["init"] = bool(facts.init_words)
        draft.state["memory"] = choice.memory
        draft.state["km"] = choice.km
    return draft.finish(engine, monitor)


def _wrap_with_km(draft: _Draft, choice: Choice, words: list[str], direct: bool) -> None:
    """Wrap the process with km: its mount, device, limits, flags, and an init in front.

    A direct program is not wrapped, but what is exec'd beside it will be.
    """
    host, facts = draft.host, draft.facts
    source = choice.monitor_path or host.km
    if not source:
        raise _no_km(host, "install it, set paths.km in the policy, or use --monitor builtin")
    if not _has_proc(draft.spec):
        raise BadSpec("mounts", "lacks /proc, which km needs", "add a mount of type proc")
    wanted = choice.km.get("device", "auto")
    device = pick_device(host, wanted)
    env = clean_environment(draft.process.get("env") or [], draft.notes)
    if not direct:
        check_strings(words, env)
    if "env" in draft.process:
        draft.process["env"] = env
    place = draft.bind(source, "km")
    _add_device(draft, device)
    flags = km.flags(choice.km, device.path if wanted in ("kvm", "kkm") else "")
    flags += facts.km_words
    init_words = list(facts.init_words)
    # km as pid 1 turns every end by a signal into status 139 after two seconds.
    if not init_words and choice.init != "none" and _has_own(draft.spec, "pid"):
        if host.init_configured and not host.init:
            text = f"init: no executable file at {host.init_configured}"
            raise KrunError(text, "the policy names it")
        if host.init:
            init_words = [draft.bind(host.init, "krun-init"), "--"]
    _raise_nofile(draft)
    _raise_pids(draft, km.PIDS_LEAST + (1 if init_words else 0))
    draft.process["args"] = [*init_words, *(words if direct else km.argv(place, flags, words))]
    draft.state["program"] = place
    draft.state["flags"] = flags


def wrap_exec(args: list[str], env: list[str], state: dict[str, Any]) -> list[str]:
    """Return the arguments of an exec'd process, wrapped by the container's monitor."""
    if state.get("monitor") != "km":
        return args
    check_strings(args, env)
    return km.argv(state["program"], state["flags"], args)
