"""seccomp filters: compiled by the distribution's libseccomp, kept by hash, loaded by seccomp(2).

libseccomp takes several milliseconds to compile podman's default profile; the program that comes
out depends only on the profile, the library and the architecture.  It is kept in a directory that
only its owner can write, under the hash of those three, and checked against its own hash on load.
"""

from __future__ import annotations

import os
from stat import S_ISREG

from krun.errors import KrunError
from krun.linux import flags as k
from krun.linux.libc import Library, pinned, syscall

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from krun.plan.seccomp import Filter

LIBRARY = "libseccomp.so.2"
_DIRECTORIES = (
    f"/usr/lib/{k.MACHINE}-linux-gnu",
    f"/lib/{k.MACHINE}-linux-gnu",
    "/usr/lib64",
    "/lib64",
    "/usr/lib",
)

_DIGEST = 32
_FORMAT = b"krun-seccomp-2"

_SCMP_ERROR = -1


def cache_directory() -> str:
    """Return where compiled filters are kept."""
    if os.geteuid() == 0:
        return "/var/cache/krun/seccomp"
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return f"{base}/krun/seccomp"


def program(section: dict[str, Any], directory: str, strict: bool = False) -> bytes:
    """Return the BPF program of linux.seccomp, from the cache or compiled now.

    When strict, a name that libseccomp does not know is an error: raises KrunError.
    """
    from krun.jsontext import dumps

    library = _library_identity()
    wanted = dumps(section, sort=True).encode()
    rigour = (b"strict",) if strict else ()
    key = digest(b"\0".join((_FORMAT, k.MACHINE.encode(), library, wanted, *rigour)))
    path = f"{directory}/{key.hex()}"
    found = _cached(path, key) if library else None
    if found is not None:
        return found
    from krun.plan.seccomp import plan_filter

    compiled = compile_filter(plan_filter(section), strict)
    if library:
        _keep(directory, path, key, compiled)
    return compiled


def digest(data: bytes) -> bytes:
    """Return the BLAKE2b hash; the C module alone, hashlib would load OpenSSL (3 ms)."""
    import _blake2

    answer: bytes = _blake2.blake2b(data, digest_size=_DIGEST).digest()
    return answer


def _library_identity() -> bytes:
    """Return path, inode, size and time of the library, b"" when it is in no usual place."""
    for directory in _DIRECTORIES:
        path = f"{directory}/{LIBRARY}"
        try:
            found = os.stat(path)
        except OSError:
            continue
        return f"{path} {found.st_ino} {found.st_size} {found.st_mtime_ns}".encode()
    return b""


def _cached(path: str, key: bytes) -> bytes | None:
    """Return the program in the cache, None unless file and content are ours."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        found = os.fstat(fd)
        if not S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
            return None
        data = os.read(fd, 1 << 20)
    finally:
        os.close(fd)
    code = data[_DIGEST:]
    if not code or len(code) % 8 or data[:_DIGEST] != digest(key + code):
        return None
    return code


def _keep(directory: str, path: str, key: bytes, code: bytes) -> None:
    """Put a program into the cache; a cache that cannot be written is no error."""
    try:
        os.makedirs(directory, 0o700, exist_ok=True)
        temporary = f"{path}.{os.getpid()}"
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            # Not synced: what the power's loss makes of it does not match its digest.
            os.write(fd, digest(key + code) + code)
        finally:
            os.close(fd)
        os.rename(temporary, path)
    except OSError:
        return


def _int(value: int) -> int:
    """Return a C int that came back as a long."""
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value & 0x80000000 else value


def compile_filter(wanted: Filter, strict: bool = False) -> bytes:
    """Compile a filter with libseccomp; raises KrunError when the library is missing or objects."""
    try:
        library = Library(LIBRARY)
    except OSError as error:
        text = f"seccomp: {LIBRARY}: {error}"
        raise KrunError(text, "install libseccomp2 (Debian) or libseccomp") from error
    context = library.seccomp_init(wanted.default)
    if not context:
        raise KrunError("seccomp: the default action is not supported by this libseccomp")
    try:
        for name in wanted.architectures:
            token = library.seccomp_arch_resolve_name(name.encode()) & 0xFFFFFFFF
            if not token:
                # An architecture that the library does not know cannot run here.
                continue
            status = _int(library.seccomp_arch_add(context, token))
            if status and status != -17:
                raise KrunError(f"seccomp: add architecture {name}: {os.strerror(-status)}")
        for rule in wanted.rules:
            _add(library, context, rule, strict)
        return _newer_calls(library, wanted) + _export(library, context)
    finally:
        library.seccomp_release(context)


def _newer_calls(library: Library, wanted: Filter) -> bytes:
    """Return what the filter begins with for calls that are newer than it."""
    if not wanted.known:
        return b""
    from krun.plan.seccomp import newer_calls

    last = {}
    for architecture in dict.fromkeys((k.MACHINE, *wanted.architectures)):
        token = library.seccomp_arch_resolve_name(architecture.encode()) & 0xFFFFFFFF
        if not token:
            continue
        last[architecture] = max(
            _int(library.seccomp_syscall_resolve_name_arch(token, name.encode()))
            for name in wanted.known
        )
    return newer_calls(last)


def _add(library: Library, context: int, rule: Any, strict: bool) -> None:
    """Add one rule for each of its system calls; unknown names are skipped, as runc does.

    Raises KrunError for one of them when strict.
    """
    groups = [rule.comparisons]
    indexes = [one.argument for one in rule.comparisons]
    if len(set(indexes)) < len(indexes):
        # libseccomp takes one condition an argument; several on one argument are alternatives.
        groups = [(one,) for one in rule.comparisons]
    for name in rule.names:
        number = _int(library.seccomp_syscall_resolve_name(name.encode()))
        if number == _SCMP_ERROR:
            if strict:
                raise KrunError(f"seccomp: {name} is not a system call")
            continue
        for group in groups:
            conditions = b"".join(
                one.argument.to_bytes(4, "little")
                + one.operator.to_bytes(4, "little")
                + one.value.to_bytes(8, "little")
                + one.value_two.to_bytes(8, "little")
                for one in group
            )
            status = _int(
                library.seccomp_rule_add_array(
                    context, rule.action, number, len(group), conditions or None
                )
            )
            if status and status != -17:
                raise KrunError(f"seccomp: rule for {name}: {os.strerror(-status)}")


def _export(library: Library, context: int) -> bytes:
    fd = os.memfd_create("seccomp", 1)
    try:
        status = _int(library.seccomp_export_bpf(context, fd))
        if status:
            raise KrunError(f"seccomp: export: {os.strerror(-status)}")
        return os.pread(fd, 1 << 20, 0)
    finally:
        os.close(fd)


def load(code: bytes, flags: int) -> int:
    """Load a program; returns the listener's descriptor, 0 without one."""
    # struct sock_fprog: the number of instructions, and where they are.
    holder, address = pinned(code)
    fprog = (len(code) // 8).to_bytes(8, "little") + address.to_bytes(8, "little")
    listener = syscall(k.SYS_seccomp, k.SECCOMP_SET_MODE_FILTER, flags, fprog)
    del holder
    return listener
