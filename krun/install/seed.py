"""The seed: an interpreter with krun's modules loaded, whose memory becomes a program.

`sow` runs in a process of krun install's.  It loads the modules, forks a child with one thread
whose stack lies among the mappings (the first thread's stack is the kernel's to place), and the
child rests in `wake.rest` until krun install has read its memory.  In each process made from that
memory `awake` runs next: it takes over this process's arguments and environment, where the
child's own were left, and begins the verb.
"""

from __future__ import annotations

import _signal
import _thread
import gc
import posix
import sys
from _ctypes import FUNCFLAG_PYTHONAPI, CFuncPtr, addressof, dlsym

from krun.install import wake
from krun.linux import libc

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

PROT_READ, PROT_WRITE, PROT_EXEC = 1, 2, 4
_MAP_PRIVATE_ANONYMOUS = 0x22
_SYS_mmap = 9
_SYS_mprotect = 10
_SYS_rt_sigaction = 13
_SYS_prctl = 157
_PR_SET_PDEATHSIG = 1
_SIG_IGN = 1
# Bytes of address space from the code's start; what is moved finds its place there.
ROOM = 1 << 20
# As the kernel gives to a first thread: how deep Python may call is measured by it.
_STACK = 8 << 20
# They keep what they found at import (the environment, a seed of random numbers, a thread), which
# would be the same in every process.
UNWANTED = ("random", "subprocess", "tempfile", "threading", "uuid")
# Loaded when they are needed: they bring such modules, all of os among them.
LEFT_OUT = ("krun.systemd",)

_Word = libc._c_long
_String = libc._c_char_p


class _Held(CFuncPtr):
    """A C function that is called with the interpreter's lock held, and returns long."""

    _flags_ = FUNCFLAG_PYTHONAPI
    _restype_ = _Word


def _files() -> list[tuple[str, int, int]]:
    """Return path, size and time of each file that is mapped: the interpreter and its libraries."""
    fd = posix.open("/proc/self/maps", posix.O_RDONLY | posix.O_CLOEXEC)
    text = b""
    while part := posix.read(fd, 1 << 16):
        text += part
    posix.close(fd)
    paths = {line.split(None, 5)[5] for line in text.splitlines() if b" /" in line}
    statuses = [(path.decode(), posix.stat(path)) for path in sorted(paths)]
    return [(path, status.st_size, status.st_mtime_ns) for path, status in statuses]


def _load(names: Iterable[str]) -> None:
    for name in names:
        if name in LEFT_OUT:
            continue
        try:
            __import__(name)
        except ModuleNotFoundError as error:
            # An optional package; the verb that needs it says so.
            if error.name is not None and error.name.partition(".")[0] == "krun":
                raise
    unwanted = [name for name in UNWANTED if name in sys.modules]
    if "os" in sys.modules and type(sys.modules["os"]) is type(sys):
        unwanted.append("os")
    if unwanted:
        raise ImportError(f"krun's modules have loaded {', '.join(unwanted)}")


class Seed:
    """The code in this process, and what `awake` needs to know."""

    def __init__(self, words: int) -> None:
        """Put the code into memory; `words` is the length of the plain interpreter's command."""
        self.words = words
        protection = PROT_READ | PROT_WRITE
        self.base = libc.syscall(_SYS_mmap, 0, ROOM, protection, _MAP_PRIVATE_ANONYMOUS, -1, 0)
        code = wake.code()
        for i, byte in enumerate(code):
            libc._c_char.from_address(self.base + i).value = bytes((byte,))
        libc.syscall(_SYS_mprotect, self.base, wake.PAGE, PROT_READ | PROT_EXEC)
        self.rest = _Held(self.base + wake.labels()["rest"])
        self.environ = dlsym(libc._SELF, "environ")
        self.files = _files()

    def addresses(self) -> str:
        """Return the code's address and those of two of glibc's variables (0: not there)."""
        found = [self.base]
        for name in ("__curbrk", "__rseq_offset"):
            try:
                found.append(dlsym(libc._SELF, name))
            except OSError:
                found.append(0)
        return " ".join(map(str, found))

    def awake(self) -> None:
        """Take over what the kernel gave to this process; raises OSError."""
        stack = _Word.from_address(self.base + wake.ARGUMENTS).value
        count = _Word.from_address(stack).value
        place = stack + 16 + 8 * count
        _Word.from_address(self.environ).value = place
        environment = posix.environ
        environment.clear()
        while (entry := _String.from_address(place).value) is not None:
            name, equals, value = entry.partition(b"=")
            if equals:
                environment.setdefault(name, value)
            place += 8
        argv = [_String.from_address(stack + 16 + 8 * i).value for i in range(count - 1)]
        if count <= self.words:
            posix.write(2, b"krun: this program is for krun's launcher alone: run that\n")
            posix._exit(1)
        if not self.is_current():
            posix.execve(argv[0], argv, environment)
        arguments = argv[self.words :]
        sys.argv[1:] = [word.decode("utf-8", "surrogateescape") for word in arguments]
        # What the interpreter does when it starts.
        _signal.signal(_signal.SIGPIPE, _signal.SIG_IGN)
        _signal.signal(_signal.SIGXFSZ, _signal.SIG_IGN)
        action = libc.buffer(32)
        libc.syscall(_SYS_rt_sigaction, int(_signal.SIGINT), None, action, 8)
        if _Word.from_address(addressof(action)).value == _SIG_IGN:
            _signal.signal(_signal.SIGINT, _signal.SIG_IGN)
        if posix.isatty(1):
            sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]

    def is_current(self) -> bool:
        """Return whether the interpreter and its libraries are still those in memory."""
        try:
            for path, size, time in self.files:
                status = posix.stat(path)
                if status.st_mtime_ns != time or status.st_size != size:
                    return False
        except OSError:
            return False
        return True


def _grow(seed: Seed, verb: Callable[[], None]) -> None:
    """Fork the child that rests; in it, and in what is made from it, nothing returns."""
    try:
        # Threads to come have what is usual; nothing that is loaded is looked at again.
        _thread.stack_size(0)
        gc.collect()
        gc.freeze()
        parent = posix.getpid()
        child = posix.fork()
        if child:
            posix.write(1, f"{child} {seed.addresses()}\n".encode())
            posix.waitpid(child, 0)
            posix._exit(0)
        _end_with_parent(parent)
        seed.rest()
        seed.awake()
        verb()
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
    finally:
        posix._exit(1)


def _end_with_parent(parent: int) -> None:
    libc.syscall(_SYS_prctl, _PR_SET_PDEATHSIG, int(_signal.SIGKILL), 0, 0, 0)
    if posix.getppid() != parent:
        posix._exit(1)


def sow(names: Iterable[str], words: int, parent: int) -> None:
    """Load modules and rest; ends with its child, or with the process `parent`."""
    _end_with_parent(parent)
    from krun.__main__ import console

    _load(names)
    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)
    seed = Seed(words)
    sys.argv[:] = ["-c"]
    _thread.stack_size(_STACK)
    _thread.start_new_thread(_grow, (seed, console))
    lock = _thread.allocate_lock()
    lock.acquire()
    lock.acquire()
