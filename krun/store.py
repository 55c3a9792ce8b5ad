"""The native engine's state of a container: one directory, written whole or not at all.

<root>/<id>/state.json     what cannot be derived: pid and its start time, cgroup, bundle
<root>/<id>/config.json    the translated configuration, for exec and delete
<root>/<id>/exec.fifo      there and locked: the container is created (krun.handshake)
<root>/<id>/launcher       what the launcher's shell needs for state and kill (decision 25)
<root>/<id>/notify/        what its payload finds at /run/notify (krun.notify)

Status is derived each time: is init there, frozen, waiting?
"""

from __future__ import annotations

import os

from krun import handshake, jsontext
from krun.errors import BadState, KrunError, NotFound
from krun.linux import cgroupfs, proc
from krun.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

OCI_VERSION = "1.2.0"
CLONE_NEWPID = 0x20000000
STATE = "state.json"
CONFIG = "config.json"
LAUNCHER = "launcher"
# A shell reads byte by byte: what is longer is told by Python faster.
_LONGEST = 4096

_ALLOWED = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_+-.")


class State(Record):
    """What is stored of a container; pid 0 means that init has not been born."""

    id: str
    pid: int
    start_time: int
    bundle: str
    rootfs: str
    created: str
    annotations: dict[str, str]
    owner: int
    namespaces: int
    cgroup: tuple[cgroupfs.Directory, ...]
    tolerant: bool
    unit: str = ""
    poststart: bool = False
    # The resctrl group, and what of it delete removes.
    rdt: str = ""
    rdt_own: str = ""


_KINDS = {
    **dict.fromkeys(("id", "bundle", "rootfs", "created", "unit", "rdt", "rdt_own"), str),
    **dict.fromkeys(("pid", "start_time", "owner", "namespaces"), int),
    **dict.fromkeys(("tolerant", "poststart"), bool),
    "annotations": dict,
    "cgroup": tuple,
}
_PLACE = [(str, str, int)]
# Of config.json, in which everything was checked when it was read.
_OBJECTS = ("process", "root", "hooks", "annotations", "linux")


def directory(root: str, identifier: str) -> str:
    """Return the directory of a container; raises BadState for an id that cannot be one."""
    if not identifier or identifier in (".", "..") or not _ALLOWED.issuperset(identifier):
        raise BadState(
            f"invalid container ID format: {identifier!r}",
            "letters, digits, _, +, - and . are allowed",
        )
    return f"{root}/{identifier}"


def owns(path: str) -> bool:
    """Tell whether the directory is a container of the native engine.

    One whose create was killed at once holds nothing, or the beginning of state.json.
    """
    if os.path.exists(f"{path}/{STATE}"):
        return True
    try:
        return all(name.startswith(f"{STATE}.") for name in os.listdir(path))
    except (FileNotFoundError, NotADirectoryError):
        return False


def claim(root: str, identifier: str) -> str:
    """Make the container's directory; raises BadState when the id is taken."""
    path = directory(root, identifier)
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        text = f"container with given ID already exists: {identifier}"
        raise BadState(text) from None
    except FileNotFoundError:
        try:
            os.makedirs(root, 0o711, exist_ok=True)
        except PermissionError as error:
            hint = "set XDG_RUNTIME_DIR, or --root, to a directory of yours"
            raise KrunError(f"{error.filename}: {error.strerror}", hint) from error
        return claim(root, identifier)
    return path


def write_file(path: str, text: str) -> None:
    """Write a file whole or not at all: a temporary one, and rename.

    It is not synced: nothing of a container outlives the power, which is all that fsync(2) adds
    to rename(2) (decision 24).
    """
    temporary = f"{path}.{os.getpid()}.tmp"
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        fd = os.open(temporary, flags, 0o600)
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from None
    try:
        data = text.encode("utf-8", "surrogateescape")
        while data:
            data = data[os.write(fd, data) :]
        os.rename(temporary, path)
    except OSError as error:
        os.unlink(temporary)
        raise OSError(error.errno, error.strerror, path) from None
    finally:
        os.close(fd)


def write_pid(path: str, pid: int) -> None:
    """Write a pid file.

    A device or a FIFO is written to: a rename would put a file in the place of /dev/null.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, str(pid).encode())
        except OSError as error:
            raise OSError(error.errno, error.strerror, path) from None
        finally:
            os.close(fd)
    else:
        write_file(path, str(pid))


def save(path: str, state: State) -> None:
    """Store the state in the container's directory."""
    document = state._asdict()
    document["cgroup"] = [list(one) for one in state.cgroup]
    write_file(f"{path}/{STATE}", jsontext.dumps(document))


def document(state: State, status: str) -> dict[str, Any]:
    """Return the container's state (runtime.md, State), with runc's additions."""
    return {
        "ociVersion": OCI_VERSION,
        "id": state.id,
        "pid": state.pid if status != "stopped" else 0,
        "status": status,
        "bundle": state.bundle,
        "rootfs": state.rootfs,
        "created": state.created,
        "annotations": state.annotations,
        "owner": "",
    }


def hook_state(state: State, status: str, pid: int) -> dict[str, Any]:
    """Return the state document that hooks read (runtime.md, State)."""
    return {
        "ociVersion": OCI_VERSION,
        "id": state.id,
        "status": status,
        "pid": pid,
        "bundle": state.bundle,
        "annotations": state.annotations,
    }


def text(document: dict[str, Any]) -> str:
    """Return what the verb state prints of a document."""
    return jsontext.dumps(document, indent="  ") + "\n"


def save_for_launcher(path: str, state: State) -> None:
    """Store what packaging/launcher.sh.in reads: init, its freezer, its state while it runs.

    A container that shares its pid namespace has none: killing it is more than one signal.
    """
    freezer = cgroupfs.freezer_file(state.cgroup) or "-"
    if not state.namespaces & CLONE_NEWPID or set(freezer) & set(" \t\n\\"):
        return
    running = text(document(state, "running"))
    if len(running) <= _LONGEST:
        line = f"{state.pid} {state.start_time} {freezer}\n"
        write_file(f"{path}/{LAUNCHER}", line + running)


def load(root: str, identifier: str) -> State:
    """Return the stored state; raises NotFound, and KrunError where the file is damaged."""
    path = f"{directory(root, identifier)}/{STATE}"
    try:
        document = jsontext.loads(proc.read(path))
        places = [cgroupfs.Directory(*one) for one in document["cgroup"]]
        state = State(**{**document, "cgroup": tuple(places)})
        kinds = {name: type(value) for name, value in state._asdict().items()}
        if kinds != _KINDS or [tuple(map(type, one)) for one in places] != _PLACE * len(places):
            raise ValueError("a value is of another type")
        if state.id != identifier or state.pid < 0:
            raise ValueError("it is another container's")
    except FileNotFoundError:
        raise NotFound(f"container {identifier}: container does not exist") from None
    except (ValueError, TypeError, KeyError) as error:
        raise _damaged(path, identifier, error) from error
    return state


def _damaged(path: str, identifier: str, error: Exception) -> KrunError:
    way_out = f"krun delete --force {identifier} removes the container"
    return KrunError(f"{path} is damaged: {error}", way_out)


def load_config(root: str, identifier: str) -> Any:
    """Return the translated configuration; raises NotFound, KrunError where it is damaged."""
    path = f"{directory(root, identifier)}/{CONFIG}"
    try:
        document = jsontext.loads(proc.read(path))
        if any(type(document.get(name) or {}) is not dict for name in _OBJECTS):
            raise ValueError("a value is of another type")
    except FileNotFoundError:
        raise NotFound(f"container {identifier}: container does not exist") from None
    except (ValueError, AttributeError) as error:
        raise _damaged(path, identifier, error) from error
    return document


def status(root: str, state: State) -> str:
    """Derive the status: creating, created, running, paused or stopped."""
    path = directory(root, state.id)
    if state.pid == 0:
        return "creating" if os.path.exists(f"{path}/{handshake.NEW_FIFO}") else "stopped"
    if not proc.alive(state.pid, state.start_time):
        return "stopped"
    if os.path.exists(f"{path}/{handshake.NEW_FIFO}"):
        return "creating"
    if cgroupfs.frozen(state.cgroup):
        return "paused"
    return "created" if handshake.waiting(path) else "running"


def open_init(root: str, state: State) -> int:
    """Return a pidfd of init; raises BadState when it is gone."""
    try:
        fd = os.pidfd_open(state.pid)
    except (ProcessLookupError, OSError):
        raise BadState("container not running") from None
    # Only now is the pid held: what is checked is what the descriptor means.
    if not proc.alive(state.pid, state.start_time):
        os.close(fd)
        raise BadState("container not running")
    return fd


def remove(root: str, identifier: str) -> None:
    """Remove the container's directory, state.json last so that a killed delete can go on."""
    path = directory(root, identifier)
    try:
        names = os.listdir(path)
    except FileNotFoundError:
        return
    for name in sorted(names, key=lambda one: one == STATE):
        try:
            os.unlink(f"{path}/{name}")
        except FileNotFoundError:
            continue
        except IsADirectoryError:
            remove(path, name)
    try:
        os.rmdir(path)
    except FileNotFoundError:
        return
