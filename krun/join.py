"""exec: one more process in a running container.

    exec (P0)                 joiner (P1)                               payload (C)
      fork ------------------->|
      cgroup.procs <- P1       |
      -- b"G" ---------------->| setns(pidfd of init, all namespaces)
                               | credentials, seccomp, cwd
      <-- b"R" ----------------| execveat(hold) -- clone(CLONE_PARENT) --> execve
      <-- pid ---------------- |   exits
      <-- end of file, or errno --------------------------------------------|
      waitpid(C)

P1 enters every namespace but stays out of the container's pid namespace, which a process joins
only by being born in it.  So nothing in the container ever sees, traces or opens the files of a
process that holds more than the payload's rights (CVE-2016-9962, CVE-2019-5736).
"""

from __future__ import annotations

import errno
import os

from krun import execution, handshake, log, store
from krun.birth import born, check_descriptors, kill_child, move_unified
from krun.errors import BadState, KrunError
from krun.execution import Ending
from krun.linux import cgroupfs, privileges, proc
from krun.linux import flags as k
from krun.linux.hold import SUPPORTED, execute, image, memory_file
from krun.linux.libc import syscall
from krun.linux.namespaces import clone, enter_root, setns
from krun.record import Record
from krun.rights import (
    Rights,
    prepare,
    seal,
    set_labels,
    set_limits,
    set_memory_policy,
    take_stdio,
    take_terminal,
)
from krun.wait import unlisten

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

    from krun.plan.model import Process


class Options(Record):
    """What the command line says about a process to exec."""

    console_socket: str = ""
    preserve_fds: int = 0
    cgroup: tuple[str, ...] = ()
    ignore_paused: bool = False
    builtin: Callable[[list[str], dict[str, str]], int] | None = None
    # Of the container's configuration: linux.seccomp, and what else its processes share.
    filter: dict[str, Any] | None = None
    personality: int | None = None
    memory_policy: tuple[int, tuple[int, ...]] | None = None
    keep_groups: bool = False


class Joined(Record):
    """A running process of a container; master is its terminal's, -1 when there is none here."""

    pid: int
    master: int


_STOPPED = "cannot exec in a stopped container"


class _NotBorn(KrunError):
    """The payload could not be made; with ENOMEM in a pid namespace whose init is gone."""


def join(
    root: str,
    state: store.State,
    process: Process,
    seccomp: tuple[bytes, int] | None,
    options: Options,
) -> Joined:
    """Run one more process in a container; returns when it runs."""
    if not process.args:
        raise KrunError("exec: process.args must not be empty")
    check_descriptors(options.preserve_fds)
    status = store.status(root, state)
    if status in ("stopped", "creating"):
        raise BadState(f"cannot exec in a {status} container")
    if status == "paused" and not options.ignore_paused:
        raise BadState("cannot exec in a paused container", "use krun resume, or --ignore-paused")
    pidfd = store.open_init(root, state)
    terminal = parent_end = -1
    if process.terminal:
        from krun import console

        if options.console_socket:
            terminal = console.connect(options.console_socket)
        else:
            parent_end, terminal = console.pair()
    down_reader, down = os.pipe()
    up, up_writer = os.pipe()
    told, report = os.pipe()
    program = memory_file(image(-1, report, True, process.terminal)) if SUPPORTED else -1
    channel, ending = (
        handshake.Channel(down_reader, up_writer),
        Ending(program, -1, report, options.builtin),
    )
    places = cgroup_places(state.cgroup, options.cgroup)
    door = _door(places, state, options)
    pid = born(0, door)
    if pid == 0:
        unlisten()
        for fd in (down, up, told, parent_end):
            if fd != -1:
                os.close(fd)
        entry = Entry(state, process, seccomp, options, pidfd, terminal, door)
        _joiner(entry, channel, ending)
    # Here and below in runc's words, for who looks for them in a debug log.
    log.debug(f"nsexec container setup: process {pid} joins {state.id}")
    cgroupfs.close_door(door)
    for fd in (down_reader, up_writer, report, program, terminal, pidfd):
        if fd != -1:
            os.close(fd)
    try:
        _admit(pid, state, process, options, places)
        os.write(down, handshake.GO)
        log.debug("child process in init()")
        watched = () if options.ignore_paused else places
        said = _follow(up, watched, lambda number: _hand_over(state, options, pid, number, down))
        if handshake.FAILED in said[:2]:
            kill_child(pid, places)
            handshake.raise_report(said[said.index(handshake.FAILED) :], process.args[0])
        log.debug("setns_init: about to exec")
        payload = _await_payload(told, pid, process)
    except _NotBorn as error:
        kill_child(pid, places)
        if store.status(root, state) == "stopped":
            raise BadState(_STOPPED) from error
        raise
    except BaseException:
        kill_child(pid, places)
        raise
    finally:
        for fd in (down, up, told):
            os.close(fd)
    master = -1
    if parent_end != -1:
        from krun.console import receive_descriptor

        master = receive_descriptor(parent_end)
        os.close(parent_end)
    return Joined(payload, master)


def _admit(
    pid: int,
    state: store.State,
    process: Process,
    options: Options,
    places: tuple[cgroupfs.Directory, ...],
) -> None:
    """Give the joiner its oom score, and its place where it could not be born there."""
    if process.oom_score_adj is not None:
        try:
            cgroupfs.write(f"/proc/{pid}/oom_score_adj", str(process.oom_score_adj))
        except PermissionError:
            if not state.tolerant:
                raise
    if state.rdt:
        from krun.linux import resctrl

        resctrl.join(state.rdt, state.id, pid)
    unified = tuple(place for place in places if place.version == 2)
    try:
        move_unified(pid, unified, state.tolerant)
    except OSError as error:
        if error.errno != errno.EBUSY or options.cgroup:
            raise
        # A v2 cgroup that has controllers below takes no process itself; init has moved down,
        # and so do we.
        cgroupfs.join(pid, _init_places(state), state.tolerant)


def _door(
    places: tuple[cgroupfs.Directory, ...], state: store.State, options: Options
) -> cgroupfs.Door:
    try:
        return cgroupfs.open_door(places, state.tolerant)
    except FileNotFoundError as error:
        if options.cgroup:
            raise KrunError(f"--cgroup: {error.filename} does not exist") from error
        raise BadState("container not running") from error


def _init_places(state: store.State) -> tuple[cgroupfs.Directory, ...]:
    for line in proc.read(f"/proc/{state.pid}/cgroup").splitlines():
        if line.startswith("0::"):
            place = cgroupfs.ROOT + line[3:]
            return (cgroupfs.Directory("", place, 2),)
    return state.cgroup


def cgroup_places(
    places: tuple[cgroupfs.Directory, ...], below: tuple[str, ...]
) -> tuple[cgroupfs.Directory, ...]:
    """Return the places for --cgroup PATH or CONTROLLERS:PATH, which must stay below.

    Errors are in runc's words; a process enters its cgroup by writing 0 (cgroups(7)).
    """
    if not below:
        return places
    answer = list(places)
    for one in below:
        names, colon, path = one.rpartition(":")
        if ".." in path.split("/"):
            raise KrunError(f"--cgroup {one}: {path} is not a sub cgroup path")
        wanted = set(names.split(",")) if colon else None
        moved = {
            index: place._replace(path=f"{place.path}/{path.strip('/')}".rstrip("/"))
            for index, place in enumerate(places)
            if wanted is None or wanted & set(place.key.split(","))
        }
        if not moved:
            raise KrunError(f"--cgroup {one}: unknown controller {names}")
        # v1 hierarchies that lack it keep the container's own.
        there = {index: place for index, place in moved.items() if os.path.isdir(place.path)}
        if not there:
            file = f"{next(iter(moved.values())).path}/cgroup.procs"
            raise KrunError(
                f"--cgroup {one}: adding pid 0 to cgroups: open {file}: no such file or directory"
            )
        for index, place in there.items():
            answer[index] = place
    return tuple(answer)


def _follow(
    up: int, places: tuple[cgroupfs.Directory, ...], hand_over: Callable[[int], None]
) -> bytes:
    """Follow the joiner until it is ready or has failed; returns what it said last.

    A seccomp listener, by its descriptor there, goes to hand_over.  Raises BadState when the
    places, its cgroup, are frozen before it is ready.
    """
    said = b""
    while more := cgroupfs.read_from(up, places):
        said += more
        if said[:1] == handshake.LISTENER and b"\n" in said:
            number, _, said = said[1:].partition(b"\n")
            hand_over(int(number))
    return said


def _hand_over(state: store.State, options: Options, pid: int, number: int, down: int) -> None:
    """Send the joiner's seccomp listener on, and let the joiner go on."""
    from krun.launch import send_listener

    send_listener(options.filter or {}, state, "running", pid, number)
    os.write(down, handshake.GO)


def _await_payload(told: int, pid: int, process: Process) -> int:
    """Return the payload's pid once it runs; raises what it failed with."""
    report = b""
    while more := os.read(told, 8192):
        report += more
    os.waitpid(pid, 0)
    # The pid and a failure come from two processes, in any order.
    words = [report[at : at + 4] for at in range(0, len(report) // 4 * 4, 4)]
    numbers = [int.from_bytes(word, "little", signed=True) for word in words[:2]]
    payload = next((number for number in numbers if number > 0), 0)
    failure = next((word for word, number in zip(words, numbers, strict=False) if number < 0), b"")
    if not payload:
        reason = os.strerror(-numbers[0]) if numbers else "the joining process was killed"
        raise _NotBorn(f"exec: clone: {reason}")
    if failure or handshake.FAILED in report[4:5]:
        os.waitpid(payload, 0)
        handshake.raise_report(failure or report[4:], process.args[0])
    return payload


class Entry(Record):
    """What the joiner inherits by memory and by descriptor."""

    state: store.State
    process: Process
    seccomp: tuple[bytes, int] | None
    options: Options
    init: int
    terminal: int
    door: cgroupfs.Door


def _joiner(entry: Entry, channel: handshake.Channel, ending: Ending) -> NoReturn:
    """Enter the container and become hold, which bears the payload."""
    try:
        _enter(entry, channel, ending)
    except BaseException as error:
        try:
            os.write(channel.up, handshake.failure(error))
        except OSError:
            pass
    os._exit(1)


def _enter(entry: Entry, channel: handshake.Channel, ending: Ending) -> None:
    state, process, terminal = entry.state, entry.process, entry.terminal
    if process.terminal:
        from krun import console  # noqa: F401  imported before the root is the container's
    privileges.set_dumpable(False)
    cgroupfs.enter(entry.door)
    if os.read(channel.down, 1) != handshake.GO:
        os._exit(1)
    set_labels(process)
    user = state.namespaces & k.CLONE_NEWUSER
    if user and os.geteuid() == 0:
        # Raising a hard limit takes a capability that is left behind with this namespace.
        set_limits(process, None)
        process = process._replace(rlimits=())
    ids = _first_ids(state.pid) if user else (0, 0)
    root = -1
    if not state.namespaces & k.CLONE_NEWNS:
        root = _root_of(state, entry.init)
    if state.namespaces:
        try:
            setns(entry.init, state.namespaces)
        except ProcessLookupError:
            raise BadState(_STOPPED) from None
    os.close(entry.init)
    if root != -1:
        enter_root(root)
    keep_groups = entry.options.keep_groups
    if user:
        keep_groups = keep_groups or _setgroups_denied()
        privileges.set_ids(*ids, (), keep_groups)
        privileges.set_dumpable(False)
    if terminal != -1:
        slave = _terminal(process, terminal, carried=not entry.options.console_socket)
        take_stdio(slave)
        os.close(terminal)
    options = entry.options
    rights = Rights(entry.seccomp, options.personality, options.preserve_fds, keep_groups)
    set_memory_policy(options.memory_policy)
    prepare(process, rights, channel)
    environ = execution.environment(process)
    path = execution.find_executable(process.args[0], environ)
    seal(process, rights, channel)
    os.write(channel.up, handshake.READY)
    hold = ending.program != -1 and not execution.execs_by_capability(process)
    if hold and ending.builtin is None:
        os.set_inheritable(ending.report, True)
        execute(ending.program, path, [os.fsencode(one) for one in process.args], environ)
    _bear(process, path, environ, channel, ending)


def _first_ids(pid: int) -> tuple[int, int]:
    """Return the user and group to join the user namespace of a container's init as."""
    from krun.plan.namespaces import first_id

    try:
        uid_map, gid_map = (proc.read(f"/proc/{pid}/{name}") for name in ("uid_map", "gid_map"))
    except (FileNotFoundError, ProcessLookupError):
        raise BadState(_STOPPED) from None
    return first_id(uid_map), first_id(gid_map)


def _root_of(state: store.State, init: int) -> int:
    """Return a descriptor of init's root, where no mount namespace leads to it; init is a pidfd."""
    path = f"/proc/{state.pid}/root"
    try:
        root = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        # Alive, it still has the number that the path was made of.
        syscall(k.SYS_pidfd_send_signal, init, 0, None, 0)
    except (FileNotFoundError, ProcessLookupError):
        raise BadState(_STOPPED) from None
    return root


def _bear(
    process: Process, path: str, environ: list[bytes], channel: handshake.Channel, ending: Ending
) -> None:
    """Do in Python what hold does: bear the payload in the pid namespace, tell its pid."""
    pid = clone(k.CLONE_PARENT)
    if pid:
        os.write(ending.report, pid.to_bytes(4, "little"))
        os._exit(0)
    os.close(channel.up)
    os.close(channel.down)
    os.setsid()
    if process.terminal:
        take_terminal()
    if ending.builtin is not None:
        execution.run_builtin(process, environ, ending)
    try:
        execution.refuse_own_interpreter(path)
        args = [os.fsencode(one) for one in process.args]
        os.execve(path, args, dict(one.split(b"=", 1) for one in environ))
    except OSError as error:
        number = error.errno or errno.EIO
        os.write(ending.report, (-number).to_bytes(4, "little", signed=True))
    except KrunError as error:
        os.write(ending.report, handshake.failure(error))
    os._exit(127)


def _setgroups_denied() -> bool:
    # Joined already: /proc/self is the host's procfs no more, so the kernel is asked directly.
    try:
        os.setgroups([])
    except PermissionError:
        return True
    return False


def _terminal(process: Process, connection: int, carried: bool) -> int:
    from krun import console

    root = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        slave = console.open_terminal(
            root, process.console_size, connection, mounted=False, carried=carried
        )
    finally:
        os.close(root)
    return slave
