"""The init process, from its birth in the new namespaces until it becomes the payload.

Nothing is imported once the root has changed: the host's files are gone then.
"""

from __future__ import annotations

import errno
import os

from krun import execution, handshake
from krun.apply import devices, kernel, mounts
from krun.apply import root as roots
from krun.birth import born
from krun.errors import KrunError
from krun.execution import Ending, execs_by_capability, run_builtin
from krun.linux import flags as k
from krun.linux import privileges
from krun.linux.cgroupfs import enter
from krun.linux.hold import execute
from krun.linux.namespaces import setns, unshare
from krun.linux.path import make_directories
from krun.plan.namespaces import first_id
from krun.record import Record
from krun.rights import (
    Rights,
    prepare,
    seal,
    set_labels,
    set_memory_policy,
    take_stdio,
    take_terminal,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

    from krun.linux.cgroupfs import Door, Hierarchy
    from krun.plan.model import Plan, Process
    from krun.trees import Trees

# With a new user namespace these are made by its root, who then owns what is in them (mqueue).
# An ordinary user may not make them before, either (time).
LATER = k.CLONE_NEWNS | k.CLONE_NEWIPC | k.CLONE_NEWNET | k.CLONE_NEWUTS | k.CLONE_NEWTIME


class Setting(Record):
    """What the init process inherits by memory and by descriptor."""

    plan: Plan
    trees: Trees
    door: Door
    cgroups: tuple[Hierarchy, ...]
    cgroup_paths: tuple[str, ...]
    seccomp: tuple[bytes, int] | None
    runtime_hooks: bool
    container_hooks: tuple[Any, ...]
    start_hooks: tuple[Any, ...]
    hook_state: dict[str, Any]
    hook_outputs: Any
    console: int
    carried: bool
    no_pivot: bool
    new_keyring: bool
    keep_fds: int
    keep_groups: bool
    # An ordinary user writes the maps through /proc/PID, which only a traceable process gives away.
    traceable: bool


def give_birth(setting: Setting, channel: handshake.Channel, ending: Ending) -> int:
    """Clone the init process; returns its pid in the parent, never in the child.

    Joining a user, pid or time namespace takes a process of its own, because only its children
    are born there; it clones init as a sibling and ends.
    """
    namespaces = setting.plan.namespaces
    user = k.CLONE_NEWUSER
    before = namespaces.new & user or any(
        one.flag in (user, k.CLONE_NEWPID, k.CLONE_NEWTIME) for one in namespaces.join
    )
    new = namespaces.new & ~k.CLONE_NEWCGROUP
    if new & user:
        new &= ~LATER
    if not new & k.CLONE_NEWTIME and not (namespaces.join and before):
        pid = born(new, setting.door)
        if pid == 0:
            init(setting, channel, ending, joined=False)
        return pid
    return _with_stage(setting, channel, ending, new)


def _with_stage(setting: Setting, channel: handshake.Channel, ending: Ending, new: int) -> int:
    reader, writer = os.pipe()
    stage = os.fork()
    if stage == 0:
        try:
            privileges.set_dumpable(setting.traceable)
            join_namespaces(setting.plan)
            if new & k.CLONE_NEWTIME:
                unshare(k.CLONE_NEWTIME)
                _write_time_offsets(_open_time_offsets(), setting.plan.namespaces.time_offsets)
            pid = born(new & ~k.CLONE_NEWTIME | k.CLONE_PARENT, setting.door)
            if pid == 0:
                os.close(reader)
                os.close(writer)
                init(setting, channel, ending, joined=True)
            os.write(writer, b"%d" % pid)
        except BaseException as error:
            os.write(writer, handshake.failure(error))
        os._exit(0)
    os.close(writer)
    try:
        said = os.read(reader, 8192)
        os.waitpid(stage, 0)
    finally:
        os.close(reader)
    if not said.isdigit():
        handshake.raise_report(said or b"F1 the process that joins namespaces was killed", "")
    return int(said)


def _open_time_offsets() -> int:
    """Open the offsets of the time namespace to come (time_namespaces(7))."""
    return os.open("/proc/self/timens_offsets", os.O_WRONLY | os.O_CLOEXEC)


def _write_time_offsets(fd: int, offsets: str) -> None:
    try:
        if offsets:
            os.write(fd, offsets.encode())
    except OSError as error:
        raise KrunError(f"linux.timeOffsets: {error.strerror}") from error
    finally:
        os.close(fd)


def _enter_time_namespace() -> None:
    """Enter the time namespace that was made for children (time_namespaces(7))."""
    fd = os.open("/proc/self/ns/time_for_children", os.O_RDONLY | os.O_CLOEXEC)
    setns(fd, k.CLONE_NEWTIME)
    os.close(fd)


def join_namespaces(plan: Plan) -> None:
    """Join the namespaces that the configuration names by path, the user namespace first."""
    fds = []
    for one in plan.namespaces.join:
        try:
            # O_NONBLOCK: a fifo of that name would hold the open for ever.
            fds.append(os.open(one.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))
        except OSError as error:
            raise KrunError(f"namespace {one.path}: {error.strerror}") from error
    for fd, one in zip(fds, plan.namespaces.join, strict=True):
        try:
            setns(fd, one.flag, one.path)
        except OSError as error:
            raise KrunError(f"join namespace {one.path}: {error.strerror}") from error
        os.close(fd)


def init(setting: Setting, channel: handshake.Channel, ending: Ending, joined: bool) -> NoReturn:
    """Run the init process to its end."""
    try:
        _build(setting, channel, ending, joined)
        become(setting, channel, ending)
    except BaseException as error:
        try:
            os.write(channel.up, handshake.failure(error))
        except OSError:
            pass
    os._exit(1)


def _build(setting: Setting, channel: handshake.Channel, ending: Ending, joined: bool) -> None:
    """Build the container around this process, and enter it."""
    plan = setting.plan
    namespaces = plan.namespaces
    # Nobody in a shared pid namespace may trace this process or open its files.
    privileges.set_dumpable(setting.traceable)
    for fd in channel.others:
        os.close(fd)
    enter(setting.door)
    os.setsid()
    if not joined:
        join_namespaces(plan)
    if namespaces.listed & k.CLONE_NEWUSER:
        # Without its mappings the process is nobody.
        handshake.await_go(channel)
        clock = -1
        if namespaces.new & k.CLONE_NEWUSER and namespaces.new & k.CLONE_NEWTIME:
            # Out of reach for other ids, as nobody may trace this process.
            clock = _open_time_offsets()
        uid, gid = first_id(namespaces.uid_map), first_id(namespaces.gid_map)
        privileges.set_ids(uid, gid, (), setting.keep_groups)
        privileges.set_dumpable(False)
        if namespaces.new & k.CLONE_NEWUSER:
            unshare(namespaces.new & LATER)
            if clock != -1:
                _write_time_offsets(clock, namespaces.time_offsets)
                _enter_time_namespace()
    if namespaces.new & k.CLONE_NEWCGROUP:
        unshare(k.CLONE_NEWCGROUP)
    if setting.new_keyring:
        _new_keyring(plan.id)
    host = -1
    if not namespaces.listed & k.CLONE_NEWNS:
        # Nothing is ever mounted in the host's namespace (decision 29).
        host = os.open("/proc/thread-self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
        unshare(k.CLONE_NEWNS)
    root = roots.root_filesystem(plan, setting.trees)
    mounts.attach_mounts(root, plan, setting.trees, setting.cgroups, setting.cgroup_paths)
    devices.make_devices(root, plan.devices, plan.links, setting.trees.devices)
    console = -1
    if plan.process.terminal:
        from krun import console as terminals

        console = terminals.open_terminal(
            root, plan.process.console_size, setting.console, carried=setting.carried
        )
    if not namespaces.listed & k.CLONE_NEWUSER:
        # The state is stored, delete can find this process: it may outlive create now.
        handshake.await_go(channel)
    if setting.runtime_hooks:
        os.write(channel.up, handshake.HOOKS)
        handshake.await_go(channel)
    if setting.container_hooks:
        from krun.hooks import run_hooks

        # They are run in the container's root, as runc's are.
        os.fchdir(root)
        run_hooks(
            "createContainer", setting.container_hooks, setting.hook_state, setting.hook_outputs
        )
    _make_cwd(root, plan.process)
    kernel.set_names(plan)
    if namespaces.new & k.CLONE_NEWNET:
        kernel.raise_loopback()
    kernel.write_sysctls(plan.sysctl)
    kernel.make_readonly(root, plan.readonly_paths)
    kernel.mask_paths(root, plan.masked_paths)
    mounts.finish_mounts(root, plan, setting.trees)
    set_labels(plan.process)
    roots.change_root(root, setting.no_pivot)
    os.close(root)
    if host != -1:
        roots.return_to(host)
    else:
        roots.propagate_root(plan)
    if console != -1:
        take_stdio(console)
        take_terminal()


def _make_cwd(root: int, process: Process) -> None:
    """Make the working directory when the image lacks it, as runc does."""
    try:
        os.close(make_directories(root, process.cwd))
    except OSError:
        # chdir tells what is wrong.
        return


def _new_keyring(name: str) -> None:
    try:
        privileges.join_session_keyring(f"_ses.{name}")
    except OSError as error:
        # Kernels without keyrings, or a seccomp filter around krun (crun and runc go on too).
        if error.errno not in (errno.ENOSYS, errno.EPERM, errno.EACCES, errno.EDQUOT):
            raise


def become(setting: Setting, channel: handshake.Channel, ending: Ending) -> NoReturn:
    """Take the payload's credentials, report, and become the payload."""
    plan = setting.plan
    process = plan.process
    rights = Rights(setting.seccomp, plan.personality, setting.keep_fds, setting.keep_groups)
    set_memory_policy(plan.memory_policy)
    prepare(process, rights, channel)
    environ = execution.environment(process)
    path = execution.find_executable(process.args[0], environ)
    seal(process, rights, channel)
    os.write(channel.up, handshake.READY)
    finish(path, environ, setting, ending, channel)


def finish(
    path: str,
    environ: list[bytes],
    setting: Setting,
    ending: Ending,
    channel: handshake.Channel,
) -> NoReturn:
    """Become hold, or wait here where Python is still needed after start."""
    process = setting.plan.process
    args = [os.fsencode(one) for one in process.args]
    early = ending.program != -1 and not execs_by_capability(process)
    if early and not setting.start_hooks and ending.builtin is None:
        for fd in (ending.go, ending.report):
            if fd != -1:
                os.set_inheritable(fd, True)
        execute(ending.program, path, args, environ)
    os.close(channel.up)
    os.close(channel.down)
    try:
        if ending.go != -1 and not _word(ending.go):
            os._exit(1)
        if setting.start_hooks:
            run_start_hooks(setting, environ)
        if ending.builtin is not None:
            run_builtin(process, environ, ending)
        execution.refuse_own_interpreter(path)
        if early:
            # The same exec as above, without the wait that is over.
            os.set_inheritable(ending.report, True)
            execute(ending.program, path, args, environ)
        os.execve(path, args, dict(one.split(b"=", 1) for one in environ))
    except OSError as error:
        number = error.errno or errno.EIO
        os.write(ending.report, (-number).to_bytes(4, "little", signed=True))
    except BaseException as error:
        os.write(ending.report, handshake.failure(error))
    os._exit(127)


def _word(go: int) -> bool:
    while True:
        try:
            return os.read(go, 1) == handshake.GO
        except InterruptedError:
            continue


def run_start_hooks(setting: Setting, environ: list[bytes]) -> None:
    """Run the startContainer hooks, inside, with the payload's environment unless they list one."""
    # create has imported it: nothing can be imported here.
    from krun.hooks import run_hooks

    outputs = setting.hook_outputs
    state = {**setting.hook_state, "status": "created"}
    run_hooks("startContainer", setting.start_hooks, state, outputs, environ)
