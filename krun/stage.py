"""The init process, from its birth in the new namespaces until it becomes the payload.

Nothing is imported once the root has changed: the host's files are gone then.
"""

from __future__ import annotations

import errno
import os
import stat

from krun import handshake
from krun.errors import CannotExecute, KrunError
from krun.linux import flags as k
from krun.linux import privileges
from krun.linux.cgroupfs import enter
from krun.linux.hold import execute
from krun.linux.libc import syscall
from krun.linux.namespaces import clone, setns, unshare
from krun.linux.path import make_directories
from krun.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

    from krun import apply
    from krun.linux.cgroupfs import Door, Hierarchy
    from krun.plan.model import Plan, Process

# With a new user namespace these are made by its root, who then owns what is in them (mqueue).
LATER = k.CLONE_NEWNS | k.CLONE_NEWIPC | k.CLONE_NEWNET | k.CLONE_NEWUTS

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class Channel(Record):
    """The init process's ends of the pipes to create.

    others are create's own ends, which init closes: its end of file must mean create's death.
    """

    down: int
    up: int
    others: tuple[int, ...] = ()


class Ending(Record):
    """How the process becomes the payload.

    program is a descriptor of hold (-1: not on this machine); go is what it waits on (-1: it
    does not), report is where failures go.  builtin, when given, is called instead of execve.
    """

    program: int
    go: int
    report: int
    builtin: Callable[[list[str], dict[str, str]], int] | None = None


class Rights(Record):
    """What bounds a process of the container besides its own description."""

    seccomp: tuple[bytes, int] | None
    personality: int | None
    keep_fds: int
    keep_groups: bool


class Setting(Record):
    """What the init process inherits by memory and by descriptor."""

    plan: Plan
    trees: apply.Trees
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


def give_birth(setting: Setting, channel: Channel, ending: Ending) -> int:
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


def born(flags: int, door: Door) -> int:
    """Clone a process into the cgroup, by its v2 directory where that is allowed."""
    _note_own_file()
    if door.unified != -1:
        try:
            return clone(flags, door.unified)
        except OSError as error:
            # Rootless, or a v2 cgroup that has controllers below: create moves it by pid.
            if error.errno not in (errno.EACCES, errno.EBUSY, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
    return clone(flags)


def _with_stage(setting: Setting, channel: Channel, ending: Ending, new: int) -> int:
    reader, writer = os.pipe()
    stage = os.fork()
    if stage == 0:
        try:
            privileges.set_dumpable(setting.traceable)
            join_namespaces(setting.plan)
            if new & k.CLONE_NEWTIME:
                unshare(k.CLONE_NEWTIME)
                if offsets := setting.plan.namespaces.time_offsets:
                    _write("/proc/self/timens_offsets", offsets)
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


def join_namespaces(plan: Plan) -> None:
    """Join the namespaces that the configuration names by path, the user namespace first."""
    fds = []
    for one in plan.namespaces.join:
        try:
            fds.append(os.open(one.path, os.O_RDONLY | os.O_CLOEXEC))
        except OSError as error:
            raise KrunError(f"namespace {one.path}: {error.strerror}") from error
    for fd, one in zip(fds, plan.namespaces.join, strict=True):
        try:
            setns(fd, one.flag, one.path)
        except OSError as error:
            raise KrunError(f"join namespace {one.path}: {error.strerror}") from error
        os.close(fd)


def init(setting: Setting, channel: Channel, ending: Ending, joined: bool) -> NoReturn:
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


def _await_go(channel: Channel) -> None:
    """Wait for create's word; its death ends the wait."""
    if os.read(channel.down, 1) != handshake.GO:
        os._exit(1)


def _build(setting: Setting, channel: Channel, ending: Ending, joined: bool) -> None:
    """Build the container around this process, and enter it."""
    # Imported by create, which has its own use for it; exec has none.
    from krun import apply

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
        _await_go(channel)
        privileges.set_ids(0, 0, (), setting.keep_groups)
        privileges.set_dumpable(False)
        if namespaces.new & k.CLONE_NEWUSER:
            unshare(namespaces.new & LATER)
    if namespaces.new & k.CLONE_NEWCGROUP:
        unshare(k.CLONE_NEWCGROUP)
    if setting.new_keyring:
        _new_keyring(plan.id)
    host = -1
    if not namespaces.listed & k.CLONE_NEWNS:
        # Nothing is ever mounted in the host's namespace (decision 29).
        host = os.open("/proc/thread-self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
        unshare(k.CLONE_NEWNS)
    root = apply.root_filesystem(plan, setting.trees)
    apply.attach_mounts(root, plan, setting.trees, setting.cgroups, setting.cgroup_paths)
    apply.make_devices(root, plan.devices, plan.links, setting.trees.devices)
    console = -1
    if plan.process.terminal:
        from krun import console as terminals

        console = terminals.open_terminal(
            root, plan.process.console_size, setting.console, carried=setting.carried
        )
    if not namespaces.listed & k.CLONE_NEWUSER:
        # The state is stored, delete can find this process: it may outlive create now.
        _await_go(channel)
    if setting.runtime_hooks:
        os.write(channel.up, handshake.HOOKS)
        _await_go(channel)
    if setting.container_hooks:
        from krun.hooks import run_hooks

        # They are run in the container's root, as runc's are.
        os.fchdir(root)
        run_hooks(
            "createContainer", setting.container_hooks, setting.hook_state, setting.hook_outputs
        )
    _make_cwd(root, plan.process)
    apply.set_names(plan)
    if namespaces.new & k.CLONE_NEWNET:
        apply.raise_loopback()
    apply.write_sysctls(plan.sysctl)
    apply.make_readonly(root, plan.readonly_paths)
    apply.mask_paths(root, plan.masked_paths)
    apply.finish_mounts(root, plan, setting.trees)
    set_labels(plan.process)
    apply.change_root(root, setting.no_pivot)
    os.close(root)
    if host != -1:
        apply.return_to(host)
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


def set_labels(process: Process) -> None:
    """Ask for the AppArmor profile and SELinux label from the next execve on."""
    if process.apparmor:
        what = f"process.apparmorProfile {process.apparmor}"
        _set_label("apparmor/exec", f"exec {process.apparmor}", what)
    if process.selinux:
        _set_label("exec", process.selinux, f"process.selinuxLabel {process.selinux}")


def _set_label(name: str, value: str, what: str) -> None:
    # The host's /proc: a container's own might be anything (CVE-2023-28642).
    for path in (f"/proc/thread-self/attr/{name}", "/proc/thread-self/attr/exec"):
        try:
            _write(path, value)
        except OSError as error:
            if error.errno == errno.ENOENT and path.endswith("apparmor/exec"):
                continue
            hint = "does this machine have it, and its security module?"
            raise KrunError(f"{what}: {error.strerror}", hint) from error
        return


def _write(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def take_terminal() -> None:
    """Make the terminal on standard input the controlling one of this session."""
    syscall(k.SYS_ioctl, 0, k.TIOCSCTTY, 0)


def take_stdio(fd: int) -> None:
    """Make the terminal standard input, output and error."""
    for number in (0, 1, 2):
        os.dup2(fd, number)
    if fd > 2:
        os.close(fd)


def become(setting: Setting, channel: Channel, ending: Ending) -> NoReturn:
    """Take the payload's credentials, report, and become the payload."""
    plan = setting.plan
    process = plan.process
    rights = Rights(setting.seccomp, plan.personality, setting.keep_fds, setting.keep_groups)
    set_memory_policy(plan.memory_policy)
    prepare(process, rights, channel)
    environ = environment(process)
    path = find_executable(process.args[0], environ)
    seal(process, rights, channel)
    os.write(channel.up, handshake.READY)
    finish(path, environ, setting, ending, channel)


def prepare(process: Process, rights: Rights, channel: Channel) -> None:
    """Take the payload's limits and credentials, and its working directory.

    Nothing but the payload's descriptors passes execve from here on.
    """
    own_null()
    # Here, as a filter may not know close_range(2); what is opened from now on is close-on-exec.
    privileges.close_on_exec_from(3 + rights.keep_fds)
    set_limits(process, rights.personality)
    if process.no_new_privileges:
        privileges.set_no_new_privs()
    else:
        # Without no_new_privs loading a filter takes CAP_SYS_ADMIN, which goes away next.
        load_seccomp(rights.seccomp, channel)
    own_stdio(process.uid, process.gid)
    try:
        # A directory that only root may pass is fine as the working directory (runc).
        os.chdir(process.cwd)
        entered = True
    except OSError:
        entered = False
    drop_privileges(process, rights.keep_groups)
    enter_cwd(process, entered)


def seal(process: Process, rights: Rights, channel: Channel) -> None:
    """Load the filter last."""
    restore_signals()
    if process.no_new_privileges:
        load_seccomp(rights.seccomp, channel)


def finish(
    path: str,
    environ: list[bytes],
    setting: Setting,
    ending: Ending,
    channel: Channel,
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
        refuse_own_interpreter(path)
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


def execs_by_capability(process: Process) -> bool:
    """Tell whether execve may need a capability that hold, a program of its own, would lack.

    An ordinary user's capabilities end with execve unless they are ambient.
    """
    sets = process.capabilities
    return bool(process.uid and sets and sets.effective & ~sets.ambient & _DAC)


_DAC = 1 << k.CAPABILITIES.index("DAC_OVERRIDE") | 1 << k.CAPABILITIES.index("DAC_READ_SEARCH")


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
    run_hooks("startContainer", setting.start_hooks, setting.hook_state, outputs, environ)


def run_builtin(process: Process, environ: list[bytes], ending: Ending) -> NoReturn:
    """Run the built-in monitor in this process, with the descriptors of the payload alone."""
    assert ending.builtin is not None
    for fd in (ending.go, ending.report, ending.program):
        if fd != -1:
            os.close(fd)
    variables = dict(one.decode("utf-8", "surrogateescape").split("=", 1) for one in environ)
    os._exit(ending.builtin(list(process.args), variables) & 0xFF)


def set_limits(process: Process, personality: int | None) -> None:
    """Set what needs privileges: limits, scheduling, personality, oom_score_adj is the parent's."""
    for limit in process.rlimits:
        try:
            privileges.setrlimit(0, limit.resource, limit.soft, limit.hard)
        except OSError as error:
            names = {number: name for name, number in k.RLIMITS.items()}
            text = f"{names[limit.resource]} soft {limit.soft} hard {limit.hard}: {error.strerror}"
            raise KrunError(f"set rlimit {text}") from error
    if process.scheduler is not None:
        _set_scheduler(process.scheduler)
    if process.io_priority is not None:
        syscall(k.SYS_ioprio_set, 1, 0, process.io_priority, path="ioPriority")
    if process.affinity_final:
        os.sched_setaffinity(0, process.affinity_final)
    if personality is not None:
        syscall(k.SYS_personality, personality, path="personality")


def _set_scheduler(attributes: bytes) -> None:
    """Set the scheduling policy, struct sched_attr (sched_setattr(2))."""
    try:
        syscall(k.SYS_sched_setattr, 0, attributes, 0)
    except OSError as error:
        hint = ""
        if error.errno == errno.EPERM:
            hint = "CAP_SYS_NICE, or a real-time share of the cpu cgroup, is missing"
        raise KrunError(f"process.scheduler: {error.strerror}", hint) from error


def set_memory_policy(policy: tuple[int, tuple[int, ...]] | None) -> None:
    """Set the NUMA memory policy, which execve keeps (set_mempolicy(2))."""
    if policy is None:
        return
    mode, nodes = policy
    mask = sum(1 << node for node in nodes)
    # The kernel reads one bit less than maxnode says.
    width = max(nodes, default=-1) // 64 * 8 + 8 if nodes else 0
    data = mask.to_bytes(width, "little") if width else None
    try:
        syscall(k.SYS_set_mempolicy, mode, data, width * 8 + 1 if width else 0)
    except OSError as error:
        raise KrunError(f"linux.memoryPolicy: {error.strerror}") from error


def load_seccomp(seccomp: tuple[bytes, int] | None, channel: Channel) -> None:
    """Load the compiled filter; tell create the listener's number."""
    if seccomp is None:
        return
    from krun.linux.seccomp import load

    listener = load(*seccomp)
    if listener:
        os.write(channel.up, b"%s%d\n" % (handshake.LISTENER, listener))
        # create takes a copy by pidfd_getfd and says so.
        _await_go(channel)
        os.close(listener)


def own_null() -> None:
    """Exchange standard descriptors that are the host's null device for the container's own.

    containerd's shim opens it read-only for all three of a pod's sandbox, whose writes would fail.
    """
    null = -1
    for fd in (0, 1, 2):
        if not _is_null(fd):
            continue
        if null == -1:
            try:
                null = os.open("/dev/null", os.O_RDWR | os.O_NOFOLLOW | os.O_NOCTTY | os.O_CLOEXEC)
            except OSError:
                return
            if not _is_null(null):
                # The image's own idea of a null device.
                break
        os.dup2(null, fd)
    if null != -1:
        os.close(null)


def _is_null(fd: int) -> bool:
    """Tell whether a descriptor is the null device."""
    try:
        found = os.fstat(fd)
    except OSError:
        return False
    return stat.S_ISCHR(found.st_mode) and found.st_rdev == _NULL


def own_stdio(uid: int, gid: int) -> None:
    """Give standard input, output and error to the payload's user and group, who may reopen them.

    The null device is nobody's, and a device keeps its group, such as tty.
    """
    for fd in (0, 1, 2):
        try:
            found = os.fstat(fd)
        except OSError:
            continue
        group = found.st_gid if stat.S_ISCHR(found.st_mode) else gid
        if (found.st_uid, found.st_gid) == (uid, group) or found.st_rdev == _NULL:
            continue
        try:
            os.fchown(fd, uid, -1 if group == found.st_gid else group)
        except OSError as error:
            # A read-only file system, a file of ids that are not mapped here, a strange device.
            if error.errno not in (errno.EPERM, errno.EROFS, errno.EINVAL):
                raise


_NULL = os.makedev(1, 3)


def drop_privileges(process: Process, keep_groups: bool) -> None:
    """Become the payload's user with the payload's capabilities."""
    sets = process.capabilities
    available = privileges.permitted()
    if sets is not None:
        privileges.drop_bounding(sets.bounding)
        privileges.set_keepcaps(True)
    privileges.set_ids(process.uid, process.gid, process.groups, keep_groups)
    if sets is not None:
        privileges.set_keepcaps(False)
        privileges.capset(
            sets._replace(
                effective=sets.effective & available,
                permitted=sets.permitted & available,
                inheritable=sets.inheritable & available,
                ambient=sets.ambient & available & sets.permitted & sets.inheritable,
            )
        )
    if process.umask is not None:
        os.umask(process.umask)
    else:
        os.umask(0o022)


def enter_cwd(process: Process, entered: bool) -> None:
    """Change to the working directory unless entered, and make sure that it is below the root.

    A path such as /proc/self/fd/7 could name a directory of the host that somebody left open
    (CVE-2024-21626); getcwd(2) cannot spell such a place from the root.
    """
    try:
        if not entered:
            os.chdir(process.cwd)
    except OSError as error:
        reason = os.strerror(error.errno or 0).lower()
        text = f"chdir to cwd {process.cwd} set in config.json failed: {reason}"
        raise CannotExecute(text, 127 if error.errno == errno.ENOENT else 126) from error
    try:
        inside = os.getcwd().startswith("/")
    except OSError:
        inside = False
    if not inside:
        raise KrunError(f"cwd {process.cwd} is outside of the container's root")


def environment(process: Process) -> list[bytes]:
    """Return the environment: the last of equal names wins, HOME is the user's."""
    variables: dict[str, str] = {}
    for one in process.env:
        name, equals, value = one.partition("=")
        if equals and name:
            variables[name] = value
    # An empty one counts as none, as with runc.
    if not variables.get("HOME"):
        variables["HOME"] = home_directory(process.uid)
    return [os.fsencode(f"{name}={value}") for name, value in variables.items()]


def home_directory(uid: int) -> str:
    """Return the home directory of uid in the container's /etc/passwd, / by default."""
    try:
        # A fifo in its place would hold the open for ever.
        fd = os.open("/etc/passwd", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return "/"
    try:
        text = os.read(fd, 1 << 20).decode("utf-8", "surrogateescape")
    except OSError:
        return "/"
    finally:
        os.close(fd)
    for line in text.splitlines():
        fields = line.split(":")
        if len(fields) >= 6 and fields[2] == str(uid):
            return fields[5] or "/"
    return "/"


def find_executable(name: str, environ: list[bytes]) -> str:
    """Return the path that execve gets; raises CannotExecute."""
    if "/" in name:
        _check_executable(name, name)
        return name
    path = DEFAULT_PATH
    for one in environ:
        if one.startswith(b"PATH="):
            path = os.fsdecode(one[5:])
    denied = False
    for directory in path.split(":"):
        candidate = os.path.join(directory or ".", name)
        try:
            _check_executable(candidate, name)
        except CannotExecute as error:
            denied = denied or error.exit_code == 126
            continue
        return candidate
    if denied:
        raise CannotExecute(f'exec: "{name}": permission denied', 126)
    raise CannotExecute(f'exec: "{name}": executable file not found in $PATH', 127)


def _check_executable(path: str, name: str) -> None:
    try:
        found = os.stat(path)
    except OSError as error:
        text = f'exec: "{name}": stat {path}: {os.strerror(error.errno or 0).lower()}'
        raise CannotExecute(text, 127 if error.errno == errno.ENOENT else 126) from error
    if found.st_mode & 0o170000 == 0o040000:
        raise CannotExecute(f'exec: "{name}": is a directory', 126)
    if not os.access(path, os.X_OK, effective_ids=True) and _denies(found, path):
        raise CannotExecute(f'exec: "{name}": permission denied', 126)


def _denies(found: os.stat_result, path: str) -> bool:
    """Tell whether mode or mount deny execution, for a filter that does not know faccessat2(2).

    The payload's own is in force by now; whatever else there is, execve finds.
    """
    uid = os.geteuid()
    bits = 0o001
    if found.st_uid == uid:
        bits = 0o100
    elif found.st_gid in (os.getegid(), *os.getgroups()):
        bits = 0o010
    if uid == 0:
        bits = 0o111
    try:
        flags = os.statvfs(path).f_flag
    except OSError:
        flags = 0
    return not found.st_mode & bits or bool(flags & os.ST_NOEXEC)


def refuse_own_interpreter(path: str) -> None:
    """Refuse to exec the file that runs this process (CVE-2019-5736), where hold cannot."""
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        mine, other = _own_file, os.fstat(fd)
    finally:
        os.close(fd)
    if (other.st_dev, other.st_ino) == mine:
        raise CannotExecute(f'exec: "{path}": permission denied', 126)


def _note_own_file() -> None:
    """Look at the file that runs this process, while /proc is the host's.

    Not when this module is loaded: the warm start has loaded it as another program.
    """
    global _own_file
    if _own_file == (0, 0):
        found = os.stat("/proc/self/exe")
        _own_file = (found.st_dev, found.st_ino)


_own_file = (0, 0)


def restore_signals() -> None:
    """Undo what the interpreter ignores; ignored signals stay so through execve."""
    from _signal import SIG_DFL, SIGPIPE, SIGXFSZ, signal

    signal(SIGPIPE, SIG_DFL)
    signal(SIGXFSZ, SIG_DFL)
