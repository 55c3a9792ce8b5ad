"""Scopes of systemd over D-Bus (org.freedesktop.systemd1(5)); the one importer of jeepney.

    create                          systemd                         init
      | placeholder: a child that waits
      | -- StartTransientUnit(PIDs = placeholder) ->|
      |<- JobRemoved done; ControlGroup ------------|
      | limits, birth: as with any cgroup that is there ------------->| enters by itself
      | end the placeholder

systemd makes no scope without a process, and krun needs the cgroup before init is born.  Whoever
kills krun ends the placeholder too, by its pipe, and systemd removes the empty scope.
"""

from __future__ import annotations

import os
import socket

from krun import host
from krun.errors import KrunError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from krun.plan.model import Unit

_NAME = "org.freedesktop.systemd1"
_PATH = "/org/freedesktop/systemd1"
_MANAGER = f"{_NAME}.Manager"
_HINT = "use --cgroup-manager cgroupfs"
# Seconds until systemd is taken for dead; a stop may take its TimeoutStopSec, 90.
_PATIENCE = 100


class _Refused(KrunError):
    """systemd's own no; `name` is D-Bus's name of the error."""

    def __init__(self, name: str, text: str) -> None:
        super().__init__(f"systemd: {text}")
        self.name = name


def addresses() -> list[str]:
    """Return the sockets to try: the bus, then systemd's own, which needs no bus.

    For the system's manager, or that of the user without the host's root.
    """
    from jeepney.bus import get_connectable_addresses

    if host.rootless():
        user = f"/run/user/{_host_uid()}"
        runtime = os.environ.get("XDG_RUNTIME_DIR") or user
        variable, bus, own = "DBUS_SESSION_BUS_ADDRESS", f"{runtime}/bus", runtime
    else:
        variable, bus, own = "DBUS_SYSTEM_BUS_ADDRESS", "/run/dbus/system_bus_socket", "/run"
    found = []
    if os.environ.get(variable):
        try:
            found += get_connectable_addresses(os.environ[variable])
        except (RuntimeError, ValueError) as error:
            raise KrunError(f"{variable}: {error}", _HINT) from error
    return [*found, bus, f"{own}/systemd/private"]


def _host_uid() -> int:
    """Return the caller's uid as the bus sees it, outside of krun's user namespace."""
    own = os.geteuid()
    with open("/proc/self/uid_map", encoding="ascii") as uid_map:
        for line in uid_map:
            inside, outside, count = map(int, line.split())
            if inside <= own < inside + count:
                return outside + own - inside
    return own


class Manager:
    """A connection to systemd."""

    def __init__(self) -> None:
        try:
            import jeepney
        except ImportError:
            text = "jeepney is not installed, and systemd is spoken to with it"
            raise KrunError(text, f"pip install jeepney, or {_HINT}") from None
        self.jeepney = jeepney
        self.sock = self._connect()
        self.parser = jeepney.Parser()
        self.serial = 0
        self.signals: list[Any] = []

    def _connect(self) -> socket.socket:
        tried = addresses()
        for address in tried:
            sock = socket.socket(socket.AF_UNIX)
            sock.settimeout(_PATIENCE)
            try:
                sock.connect(address)
                _authenticate(sock)
            except OSError:
                sock.close()
                continue
            self.private = address.endswith("/systemd/private")
            return sock
        shown = ", ".join(one.replace("\0", "@") for one in tried)
        raise KrunError(f"no systemd answers (tried {shown})", _HINT)

    def __enter__(self) -> Manager:
        # A bus wants to know its clients; systemd's own socket is no bus.
        if not self.private:
            bus = ("/org/freedesktop/DBus", "org.freedesktop.DBus", "org.freedesktop.DBus")
            self._call(bus, "Hello", "", ())
            rule = f"type='signal',sender='{_NAME}',interface='{_MANAGER}',member='JobRemoved'"
            self._call(bus, "AddMatch", "s", (rule,))
        self._manage("Subscribe")
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def _receive(self) -> Any:
        while True:
            message = self.parser.get_next_message()
            if message is not None:
                return message
            try:
                data = self.sock.recv(65536)
            except TimeoutError:
                raise KrunError(f"systemd does not answer in {_PATIENCE} s", _HINT) from None
            except OSError as error:
                raise KrunError(f"D-Bus: {error.strerror}", _HINT) from error
            if not data:
                raise KrunError("systemd closed the connection", _HINT)
            self.parser.add_data(data)

    def _call(self, to: tuple[str, str, str], method: str, signature: str, body: Any) -> Any:
        """Call a method of an object (path, name, interface).

        Returns the members of its answer, raises _Refused.
        """
        jeepney = self.jeepney
        address = jeepney.DBusAddress(*to)
        message = jeepney.new_method_call(address, method, signature or None, body)
        self.serial += 1
        try:
            self.sock.sendall(message.serialise(self.serial))
        except OSError as error:
            raise KrunError(f"D-Bus: {error.strerror}", _HINT) from error
        while True:
            answer = self._receive()
            fields = answer.header.fields
            if fields.get(jeepney.HeaderFields.reply_serial) != self.serial:
                self.signals.append(answer)
                continue
            if answer.header.message_type == jeepney.MessageType.error:
                text = answer.body[0] if answer.body else ""
                raise _Refused(fields.get(jeepney.HeaderFields.error_name, ""), str(text))
            return answer.body

    def _manage(self, method: str, signature: str = "", body: Any = ()) -> Any:
        return self._call((_PATH, _NAME, _MANAGER), method, signature, body)

    def _wait(self, job: str, what: str) -> None:
        """Wait for the end of a job; raises KrunError unless it is done."""
        member = self.jeepney.HeaderFields.member
        while True:
            message = self.signals.pop(0) if self.signals else self._receive()
            if message.header.fields.get(member) != "JobRemoved" or message.body[1] != job:
                continue
            if message.body[3] != "done":
                raise KrunError(f"systemd: {what}: the job ended with {message.body[3]}")
            return

    def start(self, unit: Unit, pid: int, description: str) -> str:
        """Start a scope with this process; returns its cgroup, from the hierarchy's root."""
        own: list[tuple[str, tuple[str, Any]]] = [
            ("Description", ("s", description)),
            ("Delegate", ("b", True)),
            ("PIDs", ("au", [pid])),
            ("DefaultDependencies", ("b", False)),
            # A failed scope does not stay loaded.
            ("CollectMode", ("s", "inactive-or-failed")),
            *((f"{one}Accounting", ("b", True)) for one in ("CPU", "Memory", "IO", "Tasks")),
        ]
        if unit.slice:
            own.append(("Slice", ("s", unit.slice)))
        asked = {name: (signature, value) for name, signature, value in unit.properties}
        own = [one for one in own if one[0] not in asked]
        body: Any = (unit.name, "fail", [*own, *asked.items()], [])
        try:
            (job,) = self._manage("StartTransientUnit", "ssa(sv)a(sa(sv))", body)
        except _Refused as error:
            if error.name != f"{_NAME}.UnitExists":
                raise
            # What a container of this name left behind, failed.
            self.reset(unit.name)
            (job,) = self._manage("StartTransientUnit", "ssa(sv)a(sa(sv))", body)
        self._wait(job, f"start {unit.name}")
        (path,) = self._manage("GetUnit", "s", (unit.name,))
        properties = (path, _NAME, "org.freedesktop.DBus.Properties")
        wanted = (f"{_NAME}.Scope", "ControlGroup")
        ((_, cgroup),) = self._call(properties, "Get", "ss", wanted)
        return str(cgroup)

    def change(self, name: str, properties: list[tuple[str, str, Any]]) -> None:
        """Change properties until the scope ends."""
        pairs = [(one, (signature, value)) for one, signature, value in properties]
        self._manage("SetUnitProperties", "sba(sv)", (name, True, pairs))

    def stop(self, name: str) -> None:
        """Stop a scope, whose processes have been killed; one that is gone is no error."""
        try:
            (job,) = self._manage("StopUnit", "ss", (name, "replace"))
            self._wait(job, f"stop {name}")
        except _Refused as error:
            if error.name != f"{_NAME}.NoSuchUnit":
                raise
        self.reset(name)

    def reset(self, name: str) -> None:
        """Let systemd forget a failed unit, if it knows it."""
        try:
            self._manage("ResetFailedUnit", "s", (name,))
        except _Refused:
            return


def _authenticate(sock: socket.socket) -> None:
    """Begin the protocol as the caller's uid (D-Bus specification, EXTERNAL).

    BEGIN goes with the rest as in sd-bus: systemd's own socket overlooks a call that comes with it.
    """
    uid = str(_host_uid()).encode().hex()
    sock.sendall(f"\0AUTH EXTERNAL {uid}\r\nBEGIN\r\n".encode())
    said = b""
    while not said.endswith(b"\r\n"):
        more = sock.recv(1024)
        if not more:
            raise ConnectionResetError
        said += more
    if not said.startswith(b"OK "):
        raise PermissionError


class Placeholder:
    """A child that is in the scope until init is."""

    def __init__(self) -> None:
        reader, self.writer = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            # Nothing of krun's stays open here: not the fifo, nobody's standard output.
            os.dup2(reader, 0)
            os.closerange(1, os.sysconf("SC_OPEN_MAX"))
            os.read(0, 1)
            os._exit(0)
        os.close(reader)

    def end(self) -> None:
        """End the child."""
        if self.writer != -1:
            os.close(self.writer)
            self.writer = -1
            os.waitpid(self.pid, 0)
