"""The creating side: make what the container needs, bear its init process, lead it to readiness."""

from __future__ import annotations

import _signal
import os
import time
from stat import S_ISFIFO

from krun import handshake, log, store
from krun.apply.mounts import Trees
from krun.birth import check_descriptors, kill_child, move_unified, seccomp_program
from krun.errors import KrunError
from krun.execution import Ending
from krun.linux import cgroupfs, proc
from krun.linux import flags as k
from krun.linux.hold import SUPPORTED, image, memory_file
from krun.linux.mount import mount_setattr, open_tree
from krun.linux.namespaces import clone, write_id_maps
from krun.plan.devices import DEFAULT_DEVICES
from krun.record import Record
from krun.stage import Setting, give_birth

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from krun.plan.model import Cgroup, IdMap, Plan, Unit
    from krun.systemd import Placeholder


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
    if plan.rdt is not None:
        from krun.linux import resctrl

        group, own = resctrl.find(plan.rdt, plan.id, resctrl.mountpoint())
        state = state._replace(rdt=group, rdt_own=own)
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
    word = told = -1
    if options.direct:
        handshake.mark(path)
        go, word = os.pipe()
        told, report = os.pipe()
    else:
        go, report = handshake.make_fifo(path)
    seccomp = seccomp_program(plan.seccomp, plan.seccomp_strict)
    # Ctrl-C is heard once it is known what there is to take back.
    mask = _signal.pthread_sigmask(_signal.SIG_BLOCK, (_signal.SIGINT,))
    try:
        present, made = cgroupfs.create(places, options.rootless, scope=unit is not None)
        undo.steps.append(lambda: _remove_cgroups(made))
        undo.steps.append(_kill_unnoted)
    finally:
        _signal.pthread_sigmask(_signal.SIG_SETMASK, mask)
    cgroupfs.refuse_frozen(present)
    if options.cgroups:
        limit(plan.cgroup, present, options.rootless)
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
    console = -1
    if plan.process.terminal:
        console = _connect_console(options)
    hooks = plan.hooks
    runtime = [*(hooks.get("prestart") or ()), *(hooks.get("createRuntime") or ())]
    outputs = None
    if hooks.get("createContainer") or hooks.get("startContainer"):
        from krun.hooks import open_outputs

        # Inside, and for the root of a user namespace, the files are out of reach.
        outputs = open_outputs(plan.annotations)
    down_reader, down = os.pipe()
    up, up_writer = os.pipe()
    others = tuple(fd for fd in (down, up, word, told) if fd != -1)
    setting = Setting(
        plan,
        trees,
        door,
        found,
        tuple(_cgroup_path(one, present) for one in found),
        seccomp,
        bool(runtime),
        tuple(hooks.get("createContainer") or ()),
        tuple(hooks.get("startContainer") or ()),
        {},
        outputs,
        console,
        options.console_fd != -1,
        options.no_pivot,
        options.new_keyring,
        options.preserve_fds,
        plan.keep_groups or _denies_setgroups(plan),
        bool(plan.namespaces.uid_map) and os.geteuid() != 0,
    )
    ending = Ending(program, go, report, options.builtin)
    setting = setting._replace(hook_state=store.hook_state(state, "creating", 1))
    pid = give_birth(setting, handshake.Channel(down_reader, up_writer, others), ending)
    # Here and below in runc's words, for who looks for them in a debug log.
    log.debug(f"nsexec container setup: init is process {pid}")
    undo.steps.append(lambda: kill_child(pid, present))
    if plan.rdt is not None:
        from krun.linux import resctrl

        undo.steps.append(lambda: resctrl.remove(state.rdt_own))
        resctrl.make(plan.rdt, state.rdt, plan.id)
        resctrl.join(state.rdt, plan.id, pid)
    for fd in (down_reader, up_writer, go, report, program, console, *(outputs or ())):
        if fd != -1:
            os.close(fd)
    _close_trees(trees)
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
        store.write_file(options.pid_file, str(pid))
    return Born(state, word, told)


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


def open_trees(plan: Plan) -> Trees:
    """Open what only this process may: all sources for a user namespace, and idmapped mounts."""
    trees = Trees()
    user = plan.namespaces.listed & k.CLONE_NEWUSER and os.geteuid() == 0
    if user:
        trees.root = open_tree(plan.rootfs, recursive=True)
        trees.devices = _device_trees(plan)
    for number, one in enumerate(plan.mounts):
        if one.kind != "bind" or not (user or one.idmap):
            continue
        if one.copy_symlink and os.path.islink(one.source):
            continue
        try:
            tree = open_tree(one.source, one.recursive, one.source_nofollow)
        except OSError as error:
            text = f"mount {one.source} on {one.destination}: {error.strerror}"
            raise KrunError(text) from error
        if one.idmap is not None:
            _map_ids(tree, one.idmap, one.destination)
        trees.mounts[number] = tree
    return trees


def _device_trees(plan: Plan) -> dict[str, int]:
    """Make the nodes of the configuration for a new user namespace; the default ones are bound."""
    plain = {path for path, _, _ in DEFAULT_DEVICES}
    wanted = [one for one in plan.devices if one.path not in plain and not S_ISFIFO(one.mode)]
    if not wanted or not plan.namespaces.uid_map:
        return {}
    from krun import nodes

    return nodes.make(wanted, (plan.namespaces.uid_map, plan.namespaces.gid_map))


def _map_ids(tree: int, idmap: IdMap, path: str) -> None:
    """Map the ids of a mount (mount_setattr(2), MOUNT_ATTR_IDMAP)."""
    userns = user_namespace(idmap.uid_map, idmap.gid_map)
    try:
        mount_setattr(tree, k.MOUNT_ATTR_IDMAP, userns=userns, recursive=idmap.recursive, path=path)
    except OSError as error:
        text = f"mount on {path}: id mapping: {error.strerror}"
        raise KrunError(text, "the file system may not support idmapped mounts") from error
    finally:
        os.close(userns)


def user_namespace(uid_map: str, gid_map: str) -> int:
    """Return a descriptor of a new user namespace with these mappings."""
    reader, writer = os.pipe()
    pid = clone(k.CLONE_NEWUSER)
    if pid == 0:
        os.close(writer)
        os.read(reader, 1)
        os._exit(0)
    os.close(reader)
    try:
        write_id_maps(pid, uid_map, gid_map, False)
        return os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(writer)
        os.waitpid(pid, 0)


def _close_trees(trees: Trees) -> None:
    for fd in (trees.root, *trees.mounts.values(), *trees.devices.values()):
        if fd != -1:
            os.close(fd)


def _denies_setgroups(plan: Plan) -> bool:
    """Tell whether setgroups is denied: an ordinary user maps one group without newgidmap."""
    return bool(plan.namespaces.uid_map) and os.geteuid() != 0 and not _needs_newidmap(plan)


def _needs_newidmap(plan: Plan) -> bool:
    """Tell whether an ordinary user's mappings go beyond the own ids."""
    own_user = f" {os.geteuid()} 1"
    own_group = f" {os.getegid()} 1"
    namespaces = plan.namespaces
    return not (
        namespaces.uid_map.count("\n") == 0
        and namespaces.uid_map.endswith(own_user)
        and namespaces.gid_map.count("\n") == 0
        and namespaces.gid_map.endswith(own_group)
    )


def _admit(plan: Plan, pid: int, places: tuple[cgroupfs.Directory, ...], options: Options) -> None:
    """Give init its ids, its cgroup and its oom score: it waits for this."""
    namespaces = plan.namespaces
    if namespaces.uid_map:
        _write_maps(plan, pid)
    score = plan.process.oom_score_adj
    if score is not None:
        try:
            cgroupfs.write(f"/proc/{pid}/oom_score_adj", str(score))
        except PermissionError as error:
            # Lowering it takes CAP_SYS_RESOURCE, which an ordinary user never has.
            if not options.rootless:
                raise KrunError(f"oomScoreAdj {score}: {error.strerror}") from error
    move_unified(pid, places, options.rootless)


def _write_maps(plan: Plan, pid: int) -> None:
    namespaces = plan.namespaces
    if os.geteuid() != 0 and _needs_newidmap(plan):
        _run_newidmap("newuidmap", pid, namespaces.uid_map)
        _run_newidmap("newgidmap", pid, namespaces.gid_map)
        return
    write_id_maps(pid, namespaces.uid_map, namespaces.gid_map, os.geteuid() != 0)


def _run_newidmap(name: str, pid: int, mapping: str) -> None:
    """Write a mapping through the set-uid program that knows /etc/subuid (newuidmap(1))."""
    import shutil

    path = shutil.which(name)
    if path is None:
        raise KrunError(f"{name} is not installed", "install uidmap (Debian) or shadow-utils")
    child = os.fork()
    if child == 0:
        try:
            os.execv(path, [name, str(pid), *mapping.split()])
        finally:
            os._exit(127)
    _, status = os.waitpid(child, 0)
    if status:
        text = f"{name} refused the mapping {mapping!r}"
        raise KrunError(text, f"see /etc/sub{name[3:6]} for what this user may map")


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
