"""Become the monitor of a payload: prepare while privileged, then run.

    prepared = prepare(settings)      before pivot_root and the credentials are dropped
    status = prepared.run(argv, env)  inside, as the container's init

`settings`: memory (bytes of guest-physical room, 0 for plenty), device, statistics, coredump,
kill_unimplemented, verbose, init (as pid 1, reap and forward for the payload), ring (3, or 0 for
hosts where that is faster), seccomp (bool), log_to.
"""

from __future__ import annotations

import os
import struct

from krun.errors import CannotExecute, KrunError
from krun.monitor.builtin import confine, hostcall, kvm, procfs, signals, syscalls, table, vdso
from krun.monitor.builtin.areas import OutOfMemory
from krun.monitor.builtin.elf import BadExecutable
from krun.monitor.builtin.process import Process, Settings
from krun.monitor.builtin.program import open_program

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# Imported when they are needed, or by preload where there will be no files to import from.
LATER = (
    "attributes",
    "blocking",
    "children",
    "clone",
    "coredump",
    "execute",
    "files",
    "futex",
    "ioctl",
    "ipc",
    "limits",
    "mappings",
    "polling",
    "reaper",
    "signalcalls",
    "sleep",
    "sockets",
    "statistics",
    "transfers",
)
# Two for each thread that there can be.
RESERVE = 4096


class Prepared:
    """An opened device: what needed more than the payload may have."""

    def __init__(self, device: int, settings: Settings) -> None:
        self.device = device
        self.settings = settings
        status = os.stat("/proc/self/exe") if os.path.exists("/proc/self/exe") else None
        self.titles = procfs.titles()
        # Ring 0 is emulated where it is used, which takes longer than the system call.
        self.vdso = vdso.prepare() if settings.ring else None
        self.interpreter = (status.st_dev, status.st_ino) if status else (-1, -1)

    def run(self, argv: list[str] | list[bytes], environ: list[str]) -> int:
        """Run argv[0] (a path) in its machine; the payload's status, 128 + n after a signal.

        Raises CannotExecute, KrunError.  A process that more than one thread or fork made ends
        without returning.
        """
        arguments = [os.fsencode(word) for word in argv]
        variables = [os.fsencode(word) for word in environ]
        path = arguments[0]
        if self.settings.init:
            from krun.monitor.builtin import reaper

            if reaper.needed():
                reaper.split(waiting_mask())
        try:
            program, interpreter, arguments = open_program(path, arguments)
        except FileNotFoundError as error:
            raise CannotExecute(f"{os.fsdecode(path)}: no such file or directory", 127) from error
        except OSError as error:
            raise CannotExecute(f"{os.fsdecode(path)}: {error.strerror}", 126) from error
        except BadExecutable as error:
            raise CannotExecute(f"{os.fsdecode(path)}: exec format error: {error}", 126) from error
        floor = reserve_descriptors()
        self.device = kvm.high(self.device, floor)
        handlers = syscalls.Handlers(self.settings.statistics, self.settings.kill_unimplemented)
        payload = Process(self.device, floor, self.settings, handlers)
        payload.titles = self.titles
        payload.vdso = self.vdso
        payload.hidden_file = self._hidden()
        payload.limits[7] = (floor, floor)
        payload.limits[4] = payload_core_limit()
        if self.settings.seccomp:
            confine.apply()
        try:
            thread = payload.become(
                program, interpreter, arguments, variables, path, waiting_mask()
            )
        except OutOfMemory as error:
            raise KrunError(
                f"{os.fsdecode(path)}: no memory to load it",
                "raise the guest's memory setting or the container's limit",
            ) from error
        except OSError as error:
            raise KrunError(f"builtin monitor: {error.strerror or error}") from error
        # From here on fd 1 and 2 are the payload's.
        try:
            return payload.carry(thread)
        except KrunError as error:
            payload.say(str(error))
        except OutOfMemory:
            payload.say("out of guest memory")
        except OSError as error:
            payload.say(f"{error.strerror or error}")
        except Exception as error:
            # A fault of the monitor's own: no traceback into what may be the payload's output.
            payload.say(f"internal error: {type(error).__name__}: {error}")
        if payload.child:
            os._exit(1)
        return 1

    def _hidden(self) -> tuple[int, int]:
        """The interpreter's file, unless the payload can reach it by a path of its own."""
        import sys

        try:
            status = os.stat(sys.executable)
        except (OSError, ValueError):
            return self.interpreter
        reachable = (status.st_dev, status.st_ino) == self.interpreter
        return (-1, -1) if reachable else self.interpreter


def waiting_mask() -> int:
    """The signals that were blocked when the payload was started."""
    data = bytearray(8)
    hostcall.call(signals.SYS_rt_sigprocmask, 0, 0, hostcall.address_of(data), 8)
    return int.from_bytes(data, "little")


def payload_core_limit() -> tuple[int, int]:
    """The payload's RLIMIT_CORE; the host kernel must dump no core of the monitor itself."""
    data = bytearray(16)
    hostcall.call(302, 0, 4, 0, hostcall.address_of(data))
    soft, hard = struct.unpack("<QQ", data)
    nothing = bytearray(struct.pack("<QQ", 0, hard))
    hostcall.call(302, 0, 4, hostcall.address_of(nothing), 0)
    return soft, hard


def reserve_descriptors() -> int:
    """Make room for the monitor's descriptors above the payload's; the first of them."""
    data = bytearray(16)
    address = hostcall.address_of(data)
    hostcall.call(302, 0, 7, 0, address)
    soft, hard = struct.unpack("<QQ", data)
    soft, hard = min(int(soft), 1 << 30), min(int(hard), 1 << 30)
    for wanted in ((soft + RESERVE, max(hard, soft + RESERVE)), (hard, hard)):
        if wanted[0] <= soft + 63:
            continue
        new = bytearray(struct.pack("<QQ", *wanted))
        if hostcall.call(302, 0, 7, hostcall.address_of(new), 0) == 0:
            return soft
    return soft - min(RESERVE, max(soft // 4, 16))


def prepare(given: dict[str, object]) -> Prepared:
    """Open the device; raises KrunError.

    Done while the host's /dev and rights are there; all else waits for the payload's own limits.
    """
    settings = Settings(given)
    return Prepared(kvm.open_device(settings.device), settings)


def preload() -> None:
    """Import whatever may be needed: after pivot_root there is no Python to import from."""
    __import__("krun.monitor.builtin", fromlist=LATER)
    table.load()


def from_options(km: dict[str, Any], memory: int) -> dict[str, object]:
    """Settings from the options of km that a container chose, and its memory in bytes."""
    width = int(km.get("membusWidth") or 0)
    kind = km.get("device") or "auto"
    coredump = km.get("coredump")
    return {
        "memory": memory or (1 << width if width else 0),
        "device": None if kind == "auto" else f"/dev/{kind}",
        "statistics": km.get("hcallStats"),
        "coredump": "/dev/null" if coredump == "none" else coredump,
        "kill_unimplemented": km.get("killUnimplementedSyscalls"),
        "log_to": km.get("log"),
        "verbose": km.get("verbose"),
    }


def run(argv: list[str] | list[bytes], environ: list[str], settings: dict[str, object]) -> int:
    """Prepare and run in one step."""
    return prepare(settings).run(argv, environ)


__all__ = ["Prepared", "preload", "prepare", "run"]
