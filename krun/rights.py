"""What a process takes on before it becomes the payload: limits, credentials, labels, filter.

The same for init and for exec.  Their order matters: what needs privileges comes before the
credentials, the filter last.
"""

from __future__ import annotations

import errno
import os
import stat

from krun import handshake
from krun.errors import CannotExecute, KrunError
from krun.linux import flags as k
from krun.linux import privileges
from krun.linux.libc import syscall
from krun.linux.proc import write
from krun.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from krun.plan.model import Process


class Rights(Record):
    """What bounds a process of the container besides its own description."""

    seccomp: tuple[bytes, int] | None
    personality: int | None
    keep_fds: int
    keep_groups: bool


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
            write(path, value)
        except OSError as error:
            if error.errno == errno.ENOENT and path.endswith("apparmor/exec"):
                continue
            hint = "does this machine have it, and its security module?"
            raise KrunError(f"{what}: {error.strerror}", hint) from error
        return


def take_terminal() -> None:
    """Make the terminal on standard input the controlling one of this session."""
    syscall(k.SYS_ioctl, 0, k.TIOCSCTTY, 0)


def take_stdio(fd: int) -> None:
    """Make the terminal standard input, output and error."""
    for number in (0, 1, 2):
        os.dup2(fd, number)
    if fd > 2:
        os.close(fd)


def prepare(process: Process, rights: Rights, channel: handshake.Channel) -> None:
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


def seal(process: Process, rights: Rights, channel: handshake.Channel) -> None:
    """Load the filter last."""
    restore_signals()
    if process.no_new_privileges:
        load_seccomp(rights.seccomp, channel)


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


def load_seccomp(seccomp: tuple[bytes, int] | None, channel: handshake.Channel) -> None:
    """Load the compiled filter; tell create the listener's number."""
    if seccomp is None:
        return
    from krun.linux.seccomp import load

    listener = load(*seccomp)
    if listener:
        os.write(channel.up, b"%s%d\n" % (handshake.LISTENER, listener))
        # create takes a copy by pidfd_getfd and says so.
        handshake.await_go(channel)
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
    privileges.drop_bounding(sets.bounding)
    privileges.set_keepcaps(True)
    try:
        privileges.set_ids(process.uid, process.gid, process.groups, keep_groups)
    except OSError as error:
        ids = (process.uid, process.gid, *process.groups)
        hint = "is each of them mapped in the user namespace?" if error.errno == 22 else ""
        text = f"process.user: become {' '.join(map(str, ids))}: {error.strerror}"
        raise KrunError(text, hint) from error
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


def restore_signals() -> None:
    """Undo what the interpreter ignores; ignored signals stay so through execve."""
    from _signal import SIG_DFL, SIGPIPE, SIGXFSZ, signal

    signal(SIGPIPE, SIG_DFL)
    signal(SIGXFSZ, SIG_DFL)
