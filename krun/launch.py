"""The creating side: make what the container needs, bear its init process, lead it to readiness."""

from __future__ import annotations

import _signal
import os
import time

from krun import handshake, log, store
from krun.birth import check_descriptors, kill_child, move_unified, seccomp_program
from krun.errors import KrunError
from krun.execution import Ending
from krun.idmaps import denies_setgroups, write_maps
from krun.linux import cgroupfs, proc
from krun.linux import flags as k
from krun.linux.hold import SUPPORTED, image, memory_file
from krun.record import Record
from krun.stage import Setting, give_birth
from krun.trees import close_trees, open_trees

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from krun.plan.model import Cgroup, Plan, Unit
    from krun.systemd import Placeholder
    from krun.trees import Trees


class Options(Record):
    """What the command line says about a container's making."""

    console_socket: str = ""
    pid_file: str = ""
    no_pivot: bool = False
    new_keyring: bool = True
    preserve_fds: int = 0
    rootless: bool = False
    builtin: Callable[[list[str], dict[str, str]], int] | None = None
    console_fd: int = -1
    direct: bool = False
    cgroups: bool = True
    notify: bool = False


class Born(Record):
    """A container whose init is ready.

    For a direct start, `word` is a pipe to init instead of the fifo, `report` one from it.
    """

    state: store.State
    word: int
    report: int


class Undo:
    """What a failed create takes back, last made first."""

    def __init__(self) -> None:
        self.steps: list[Callable[[], None]] = []

    def run(self) -> None:
        """Take everything back; goes on after failures."""
        for step in reversed(self.steps):
            try:
                step()
            except OSError:
                continue


def create(root: str, plan: Plan, spec: dict[str, Any], options: Options) -> Born:
    """Make a container up to the moment before its payload runs.

    With options.direct the init process waits on a pipe of this process instead of the fifo (run).
    """
    undo = Undo()
    store.claim(root, plan.id)
    undo.steps.append(lambda: store.remove(root, plan.id))
    try:
        return _create(root, plan, spec, options, undo)
    except BaseException:
        undo.run()
        raise


def _create(root: str, plan: Plan, spec: dict[str, Any], options: Options, undo: Undo) -> Born:
    path = store.directory(root, plan.id)
    check_descriptors(options.preserve_fds)
    found = cgroupfs.hierarchies()
    unit = plan.cgroup.unit if options.cgroups else None
    places: tuple[cgroupfs.Directory, ...] = ()
    if options.cgroups and unit is None:
        places = cgroupfs.directories(plan.cgroup.path, found)
    state = _first_state(plan, options, places, unit)
    # Known before anything is made, so that delete finds whatever a killed create leaves.
    store.save(path, state)
    store.write_file(f"{path}/{store.CONFIG}", _config_text(spec))
    if options.notify:
        from krun import notify

        notify.make(path)
    keeper = None
    if unit is not None:
        keeper, scope = _scope(unit, plan.id, undo)
        places = cgroupfs.directories(scope, found)
    word, told, go, report = _open_gate(path, options.direct)
    seccomp = seccomp_program(plan.seccomp, plan.seccomp_strict)
    present = _make_cgroups(plan, places, options, undo)
    state = state._replace(cgroup=present)
    if keeper is not None:
        store.save(path, state)
        undo.steps.append(lambda: kill_child(keeper.pid, present))
    trees = open_trees(plan)
    # With a limit of one task the keeper leaves no room to be born on v2; moving is not limited.
    door = cgroupfs.open_door(present, options.rootless, born=keeper is None)
    # With startContainer hooks the init process itself waits; hold only execs.
    waits = -1 if plan.hooks.get("startContainer") else go
    program = memory_file(image(waits, report)) if SUPPORTED else -1
    console = _connect_console(options) if plan.process.terminal else -1
    setting = _setting(
        plan,
        options,
        state,
        trees=trees,
        door=door,
        found=found,
        seccomp=seccomp,
        console=console,
    )
    down_reader, down = os.pipe()
    up, up_writer = os.pipe()
    others = tuple(fd for fd in (down, up, word, told) if fd != -1)
    ending = Ending(program, go, report, options.builtin)
    pid = give_birth(setting, handshake.Channel(down_reader, up_writer, others), ending)
    # Here and below in runc's words, for who looks for them in a debug log.
    log.debug(f"nsexec container setup: init is process {pid}")
    undo.steps.append(lambda: kill_child(pid, present))
    if plan.hooks.get("poststop"):
        # Before the state goes: what other hooks have made is taken back (runtime.md, Lifecycle 5).
        undo.steps.insert(1, lambda: _run_poststop(plan, state, pid))
    if plan.rdt is not None:
        from krun.linux import resctrl

        undo.steps.append(lambda: resctrl.remove(state.rdt_own))
        resctrl.make(plan.rdt, state.rdt, plan.id)
        resctrl.join(state.rdt, plan.id, pid)
    outputs = setting.hook_outputs or ()
    for fd in (down_reader, up_writer, go, report, program, console, *outputs):
        if fd != -1:
            os.close(fd)
    close_trees(trees)
    cgroupfs.close_door(door)
    born = proc.stat(pid)
    state = state._replace(pid=pid, start_time=born.start_time if born else 0)
    store.save(path, state)
    _admit(plan, pid, present, options)
    _send_go(down)
    log.debug("child process in init()")
    # While init is at work.
    store.save_for_launcher(path, state)
    _lead(up, down, pid, plan, state)
    if keeper is not None:
        keeper.end()
    os.close(up)
    os.close(down)
    if options.direct:
        handshake.unmark(path)
    else:
        handshake.publish_fifo(path)
    if options.pid_file:
        store.write_pid(options.pid_file, pid)
    return Born(state, word, told)


def _first_state(
    plan: Plan, options: Options, places: tuple[cgroupfs.Directory, ...], unit: Unit | None
) -> store.State:
    """Return the state of a container of which nothing is made yet."""
    state = store.State(
        plan.id,
        0,
        0,
        plan.bundle,
        plan.rootfs,
        _now(),
        plan.annotations,
        os.getuid(),
        plan.namespaces.listed,
        places,
        options.rootless,
        unit.name if unit else "",
        poststart=bool(plan.hooks.get("poststart")),
    )
    if plan.rdt is None:
        return state
    from krun.linux import resctrl

    group, own = resctrl.find(plan.rdt, plan.id, resctrl.mountpoint())
    return state._replace(rdt=group, rdt_own=own)


def _open_gate(path: str, direct: bool) -> tuple[int, int, int, int]:
    """Open what init waits at: pipes of this process, or the fifo, whose ends here are -1.

    Returns two descriptors to keep, of the word and of the report, and the two that init has.
    """
    if not direct:
        return (-1, -1, *handshake.make_fifo(path))
    handshake.mark(path)
    go, word = os.pipe()
    told, report = os.pipe()
    return word, told, go, report


def _make_cgroups(
    plan: Plan, places: tuple[cgroupfs.Directory, ...], options: Options, undo: Undo
) -> tuple[cgroupfs.Directory, ...]:
    """Make the cgroups and write their limits; returns those that there are."""
    scope = plan.cgroup.unit is not None and options.cgroups
    # Ctrl-C is heard once it is known what there is to take back.
    mask = _signal.pthread_sigmask(_signal.SIG_BLOCK, (_signal.SIGINT,))
    try:
        present, made = cgroupfs.create(places, options.rootless, scope=scope)
        undo.steps.append(lambda: _remove_cgroups(made))
        undo.steps.append(_kill_unnoted)
    finally:
        _signal.pthread_sigmask(_signal.SIG_SETMASK, mask)
    cgroupfs.refuse_frozen(present)
    if options.cgroups:
        limit(plan.cgroup, present, options.rootless)
    return present


def _setting(
    plan: Plan,
    options: Options,
    state: store.State,
    *,
    trees: Trees,
    door: cgroupfs.Door,
    found: tuple[cgroupfs.Hierarchy, ...],
    seccomp: tuple[bytes, int] | None,
    console: int,
) -> Setting:
    """Put together what init inherits."""
    hooks = plan.hooks
    container = tuple(hooks.get("createContainer") or ())
    start = tuple(hooks.get("startContainer") or ())
    outputs = None
    if container or start:
        from krun.hooks import open_outputs

        # Inside, and for the root of a user namespace, the files are out of reach.
        outputs = open_outputs(plan.annotations)
    return Setting(
        plan,
        trees,
        door,
        found,
        tuple(_cgroup_path(one, state.cgroup) for one in found),
        seccomp,
        bool(hooks.get("prestart") or hooks.get("createRuntime")),
        container,
        start,
        store.hook_state(state, "creating", 1),
        outputs,
        console,
        options.console_fd != -1,
        options.no_pivot,
        options.new_keyring,
        options.preserve_fds,
        plan.keep_groups or denies_setgroups(plan),
        bool(plan.namespaces.uid_map) and os.geteuid() != 0,
    )


def _now() -> str:
    """Return the time in the form of RFC 3339, to the nanosecond as runc does."""
    seconds, nanoseconds = divmod(time.time_ns(), 1_000_000_000)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{nanoseconds:09}Z"


def _scope(unit: Unit, identifier: str, undo: Undo) -> tuple[Placeholder, str]:
    """Let systemd make the container's scope; returns who keeps it until init is in it."""
    from krun import systemd

    keeper = systemd.Placeholder()
    undo.steps.append(keeper.end)
    with systemd.Manager() as manager:
        path = manager.start(unit, keeper.pid, f"krun container {identifier}")

    def stop() -> None:
        try:
            with systemd.Manager() as again:
                again.stop(unit.name)
        except KrunError:
            # The failure that led here is the one to tell of.
            return

    undo.steps.append(stop)
    return keeper, path


def _config_text(spec: dict[str, Any]) -> str:
    from krun.jsontext import dumps

    return dumps(spec)


def go(born: Born, plan: Plan) -> None:
    """Let a direct container's payload go; raises CannotExecute when it cannot."""
    os.write(born.word, handshake.GO)
    os.close(born.word)
    said = b""
    while more := os.read(born.report, 8192):
        said += more
    os.close(born.report)
    if said:
        handshake.raise_report(said, plan.process.args[0])
    if plan.hooks.get("poststart"):
        from krun.hooks import run_hooks

        document = store.hook_state(born.state, "running", born.state.pid)
        run_hooks("poststart", plan.hooks["poststart"], document)


def _connect_console(options: Options) -> int:
    if options.console_fd != -1:
        return options.console_fd
    if not options.console_socket:
        text = "process.terminal needs --console-socket"
        raise KrunError(text, "or set terminal to false in config.json")
    from krun.console import connect

    return connect(options.console_socket)


def limit(cgroup: Cgroup, places: tuple[cgroupfs.Directory, ...], tolerant: bool) -> None:
    """Write the limits of a plan."""
    cgroupfs.apply(cgroup.writes, places, tolerant)
    if cgroup.realtime:
        cgroupfs.give_realtime(places)
    if not cgroup.devices:
        return
    try:
        cgroupfs.allow_devices(cgroup.devices, places)
    except OSError as error:
        if not tolerant:
            raise KrunError(f"device rules: {error.filename}: {error.strerror}") from error


def _cgroup_path(hierarchy: cgroupfs.Hierarchy, places: tuple[cgroupfs.Directory, ...]) -> str:
    key = ",".join(hierarchy.controllers)
    for place in places:
        if place.key == key:
            return place.path
    return ""


def _admit(plan: Plan, pid: int, places: tuple[cgroupfs.Directory, ...], options: Options) -> None:
    """Give init its ids, its cgroup and its oom score: it waits for this."""
    namespaces = plan.namespaces
    if namespaces.uid_map:
        write_maps(plan, pid)
    score = plan.process.oom_score_adj
    if score is not None:
        try:
            cgroupfs.write(f"/proc/{pid}/oom_score_adj", str(score))
        except PermissionError as error:
            # Lowering it takes CAP_SYS_RESOURCE, which an ordinary user never has.
            if not options.rootless:
                raise KrunError(f"oomScoreAdj {score}: {error.strerror}") from error
    move_unified(pid, places, options.rootless)


def _send_go(down: int) -> None:
    try:
        os.write(down, handshake.GO)
    except BrokenPipeError:
        # What init said about its end is on the other pipe.
        return


def _lead(up: int, down: int, pid: int, plan: Plan, state: store.State) -> None:
    """Follow init's messages until it is ready; raises what it failed with."""
    ready = False
    while True:
        said = cgroupfs.read_from(up, state.cgroup)
        if not said:
            break
        while said:
            kind = said[:1]
            if kind == handshake.FAILED:
                while more := os.read(up, 8192):
                    said += more
                handshake.raise_report(said, "")
            if kind == handshake.READY:
                ready = True
                said = said[1:]
                log.debug("init: closing the pipe to signal completion")
            elif kind == handshake.HOOKS:
                said = said[1:]
                _run_runtime_hooks(plan, state, pid)
                _send_go(down)
            else:
                number, _, said = said[1:].partition(b"\n")
                send_listener(plan.seccomp or {}, state, "creating", pid, int(number))
                _send_go(down)
    if not ready:
        text = "the container's init process was killed while it was being made"
        few = cgroupfs.oom_kills(state.cgroup)
        raise KrunError(text, "linux.resources.memory.limit is too low" if few else "")


def _run_runtime_hooks(plan: Plan, state: store.State, pid: int) -> None:
    from krun.hooks import run_hooks

    document = store.hook_state(state, "creating", pid)
    for kind in ("prestart", "createRuntime"):
        run_hooks(kind, plan.hooks.get(kind) or (), document)


def _run_poststop(plan: Plan, state: store.State, pid: int) -> None:
    from krun.hooks import run_each

    run_each("poststop", plan.hooks["poststop"], store.hook_state(state, "stopped", pid))


def send_listener(
    section: dict[str, Any], state: store.State, status: str, pid: int, number: int
) -> None:
    """Send a process's seccomp listener to listenerPath (config-linux.md, containerProcessState).

    section is linux.seccomp; number is the descriptor in the process pid, of a container in status.
    """
    from krun.console import connect, send_descriptor
    from krun.jsontext import dumps
    from krun.linux.libc import syscall

    path = section.get("listenerPath")
    if not path:
        raise KrunError("linux.seccomp.listenerPath is required for SCMP_ACT_NOTIFY")
    pidfd = os.pidfd_open(pid)
    try:
        listener = syscall(k.SYS_pidfd_getfd, pidfd, number, 0)
    finally:
        os.close(pidfd)
    document = {
        "ociVersion": store.OCI_VERSION,
        "fds": ["seccompFd"],
        "pid": pid,
        "metadata": section.get("listenerMetadata", ""),
        "state": store.hook_state(state, status, state.pid or pid),
    }
    agent = "failed to connect with seccomp agent specified in the seccomp profile:"
    connection = connect(path, agent)
    try:
        send_descriptor(connection, listener, dumps(document).encode())
    finally:
        os.close(connection)
        os.close(listener)


def _kill_unnoted() -> None:
    """Kill an init that was born when Ctrl-C came, before its pid was noted."""
    own = proc.read("/proc/self/cmdline")
    for pid in proc.read(f"/proc/self/task/{os.getpid()}/children").split():
        # It is this program still; other children are of whoever became krun by execve.
        if proc.read(f"/proc/{pid}/cmdline") == own:
            kill_child(int(pid), ())


def _remove_cgroups(places: tuple[cgroupfs.Directory, ...]) -> None:
    for place in places:
        cgroupfs.remove_tree(place.path)
