"""look_up(...) -> Payload: find the program that process.args names and see what kind it is.

A monitor's own exit statuses cannot be told from its payload's, so what an OCI runtime reports
(127 not found, 126 not executable) has to be found out before the monitor is started.
"""

from __future__ import annotations

import errno
import os
import stat

from krun import executable, view
from krun.errors import CannotExecute
from krun.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from krun.types import Process, Spec

# What execvp(3) and runc search where the environment has no PATH.
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
NOT_FOUND, NOT_EXECUTABLE = 127, 126
# Mounts whose content comes with the container and is never a program.
_NO_PROGRAMS = ("proc", "sysfs", "cgroup", "cgroup2", "devpts", "mqueue", "securityfs")


class Payload(Record):
    """What will run.

    `argv` begins with an absolute path and has #! lines expanded; `real` is the program's path
    without links; `kind` is elf, snapshot, or unseen (in a file system that is not there yet);
    `named` is the absolute path as looked up, before any #! expansion.
    """

    argv: list[str]
    named: str
    real: str
    kind: str
    dynamic: bool = False
    script: bool = False


def _cannot(name: str, why: str, status: int, hint: str = "") -> CannotExecute:
    return CannotExecute(f'exec: "{name}": {why}', status, hint)


def environment(process: Process, name: str) -> str | None:
    """Return a variable of process.env; the last one counts."""
    prefix = name + "="
    for entry in reversed(process.get("env") or []):
        if entry.startswith(prefix):
            return entry[len(prefix) :]
    return None


def candidates(name: str, process: Process) -> list[str]:
    """Return the absolute paths that a program's name can stand for, in order."""
    cwd = process.get("cwd") or "/"
    if "/" in name:
        return [os.path.join(cwd, name)]
    path = environment(process, "PATH")
    return [
        os.path.join(cwd, directory, name)
        for directory in (DEFAULT_PATH if path is None else path).split(":")
        if directory
    ]


def _find(files: view.View, name: str, process: Process) -> tuple[str, view.Found]:
    """Return the path as looked up, and the regular, executable file there."""
    refused = ""
    for candidate in candidates(name, process):
        try:
            found = files.find(candidate)
        except OSError as error:
            if "/" in name:
                if error.errno in (errno.ENOENT, errno.ENOTDIR):
                    raise _cannot(
                        name, f"stat {name}: no such file or directory", NOT_FOUND
                    ) from error
                raise _cannot(name, f"{error.strerror}".lower(), NOT_EXECUTABLE) from error
            continue
        mode = os.fstat(found.fd).st_mode
        if stat.S_ISREG(mode) and mode & 0o111:
            return os.path.normpath(candidate), found
        os.close(found.fd)
        refused = "is a directory" if stat.S_ISDIR(mode) else "permission denied"
        if "/" in name:
            raise _cannot(name, refused, NOT_EXECUTABLE)
    if refused:
        raise _cannot(name, refused, NOT_EXECUTABLE)
    raise _cannot(name, "executable file not found in $PATH", NOT_FOUND)


def look_up(files: view.View, args: list[str], process: Process) -> Payload:
    """Find args[0] as execvp(3) would inside the container and follow #! lines.

    Raises CannotExecute.
    """
    argv = list(args)
    if not argv or not argv[0]:
        raise _cannot("", "process.args names no program", NOT_FOUND)
    first = ""
    for _ in range(executable.DEPTH_MAX):
        try:
            named, found = _find(files, argv[0], process)
        except view.Unseen as unseen:
            if unseen.fstype in _NO_PROGRAMS:
                raise _cannot(
                    argv[0], f"permission denied: {unseen.fstype} holds no programs", NOT_EXECUTABLE
                ) from unseen
            path = os.path.normpath(candidates(argv[0], process)[0])
            return Payload([path, *argv[1:]], first or path, path, "unseen")
        try:
            fd = view.readable(found)
        finally:
            os.close(found.fd)
        try:
            program = executable.inspect(fd)
        finally:
            os.close(fd)
        first = first or named
        if program.kind == "unknown":
            raise _cannot(
                argv[0],
                f"exec format error: {program.why}",
                NOT_EXECUTABLE,
                "a VM runs x86-64 ELF programs, #! scripts and km snapshots",
            )
        if program.kind != "script":
            argv[0] = named
            script = first != named
            return Payload(argv, first, found.path, program.kind, program.dynamic, script)
        if not program.interpreter.startswith("/"):
            raise _cannot(
                argv[0], f"its interpreter {program.interpreter} is not absolute", NOT_EXECUTABLE
            )
        extra = [program.argument] if program.argument else []
        argv = [program.interpreter, *extra, named, *argv[1:]]
    raise _cannot(args[0], "too many levels of #! interpreters", NOT_EXECUTABLE)


def files_of(spec: Spec, bundle: str) -> view.View:
    """Return the view of a container that is not there yet; raises OSError without a rootfs."""
    root = spec.get("root") or {}
    files = view.View(os.path.join(bundle, root.get("path") or "rootfs"))
    for mount in spec.get("mounts") or []:
        fstype = mount.get("type") or ""
        options = mount.get("options") or []
        source = ""
        if fstype == "bind" or "bind" in options or "rbind" in options:
            source = os.path.join(bundle, mount.get("source") or "")
        files.mount(mount["destination"], source, fstype)
    return files
