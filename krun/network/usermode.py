"""User-mode networks: pasta or slirp4netns, which need no rights on the host.

The engine makes the namespace.  A createRuntime hook (config.md, POSIX-platform Hooks) tells, once
it is there and before the payload runs, in `create` and in `run`, under either engine:

    krun create ── fork ──▶ attendant: listens on attach-MEMBER
      engine ── createRuntime hook ──▶ connects, sends the container's pid
                            attendant starts the program, waits until it is ready
      hook ends ◀── "ok" or what failed ── attendant ends

The program cannot be the hook's child: crun's run waits for all processes that come down to it.
It is the member's helper: its identity is recorded, and it is ended when the container is deleted.
"""

from __future__ import annotations

import os
import sys

from krun import host, jsontext, log
from krun.errors import KrunError
from krun.network import detached, state

TYPE_CHECKING = False
if TYPE_CHECKING:
    import _socket
    from collections.abc import Container
    from typing import Any

    import psutil

    from krun.network.model import Network
    from krun.types import Hook

HELPER = "helper"
_SLIRP = ("/usr/bin/slirp4netns", "/usr/local/bin/slirp4netns")
_PASTA = ("/usr/bin/pasta", "/usr/local/bin/pasta")
# slirp4netns(1): the container's address, and the server that asks the host's name servers.
_SLIRP_ADDRESS, _SLIRP_GATEWAY, _SLIRP_DNS = "10.0.2.100", "10.0.2.2", "10.0.2.3"
_SECONDS = 10


def program() -> str:
    """Return the path of slirp4netns or pasta; raises KrunError when neither can be used.

    pasta does not work for root: it becomes nobody, who may not enter the namespace.  An ordinary
    user without a user namespace may not either while the container's init has yet to execute
    anything: its memory belongs to the user namespace that it came from (ptrace(2), access mode).
    """
    if os.geteuid() != 0:
        raise KrunError(
            "a network of kind user needs root, if only of a user namespace",
            "use rootless podman, or its own --network slirp4netns",
        )
    root = not host.rootless()
    for path in _SLIRP if root else _SLIRP + _PASTA:
        if os.access(path, os.X_OK):
            return path
    raise KrunError(
        f"slirp4netns{'' if root else ' and pasta'} cannot be executed, by which a network of "
        "kind user is made",
        "apt install slirp4netns",
    )


def api_socket(directory: str, member: str) -> str:
    """Return the path of slirp4netns's socket: short (unix(7)), and named after the member."""
    return f"{directory}/slirp-{member}"


def attach_socket(directory: str, member: str) -> str:
    """Return the path of the socket on which the attendant waits for the hook."""
    return f"{directory}/attach-{member}"


def make(directory: str, network: Network, path: str) -> dict[str, Any]:
    """Record a user-mode network in the container's directory; the hook has it started."""
    interface = network.interfaces[0]
    helper = program()
    slirp = helper in _SLIRP
    member = state.new_member()
    place = f"{path}/{member}"
    os.mkdir(place, 0o755)
    record = {
        "member": member,
        "namespace": "",
        "inode": 0,
        "program": helper,
        "interfaces": [
            {
                "kind": "user",
                "name": interface.name,
                "hostName": "",
                "bridge": "",
                "parent": "",
                "mtu": interface.mtu,
                "addresses": [f"{_SLIRP_ADDRESS}/24"] if slirp else [],
                "gateways": [_SLIRP_GATEWAY] if slirp else [],
            }
        ],
        "nameservers": [_SLIRP_DNS] if slirp else [],
    }
    ports = [port._asdict() for port in network.ports]
    state.write(f"{place}/ports.json", jsontext.dumps(ports))
    state.write(f"{place}/{state.RECORD}", jsontext.dumps(record))
    _leave_attendant(directory, place, member)
    return record


def _leave_attendant(directory: str, place: str, member: str) -> None:
    """Fork the process that starts the helper when the hook calls; it ends with its parent."""
    import _socket

    listener = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
    listener.bind(attach_socket(directory, member))
    listener.listen(1)
    parent = os.pidfd_open(os.getpid())
    pid = os.fork()
    if pid:
        listener.close()
        os.close(parent)
        return
    status = 1
    try:
        status = _attend(directory, place, listener, parent)
    finally:
        os._exit(status)


def _attend(directory: str, place: str, listener: _socket.socket, parent: int) -> int:
    """Serve one call of the hook; return early when the parent is gone."""
    import _socket
    import select

    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    os.setsid()
    os.dup2(null, 0)
    os.dup2(null, 1)
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2 and int(name) not in (listener.fileno(), parent, null):
            try:
                os.close(int(name))
            except OSError:
                # The descriptor of the listing itself.
                continue
    poll = select.poll()
    poll.register(listener.fileno(), select.POLLIN)
    poll.register(parent, select.POLLIN)
    if not any(fd == listener.fileno() for fd, _ in poll.poll()):
        return 0
    number, _ = listener._accept()  # type: ignore[attr-defined]
    hook_call = _socket.socket(fileno=number)
    answer = "ok"
    try:
        _start(directory, place, int(hook_call.recv(32)))
    except (KrunError, OSError, ValueError) as error:
        answer = str(error)
        log.error(answer)
    hook_call.sendall(answer.encode("utf-8", "replace"))
    return 0


def call(directory: str, place: str, pid: int) -> None:
    """What the hook does: have the network of process pid brought up.  Raises KrunError."""
    import _socket

    path = attach_socket(directory, os.path.basename(place))
    client = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
    try:
        client.connect(path)
        client.sendall(str(pid).encode())
        answer = client.recv(4096).decode("utf-8", "replace")
    except OSError as error:
        raise KrunError(f"{path}: {error.strerror}", "is krun create still there?") from error
    finally:
        client.close()
    if answer != "ok":
        raise KrunError(answer or "the network's attendant was killed")


def hook(place: str) -> Hook:
    """Return krun's hook, `krun network attach`, for the record directory `place`."""
    argv = state.own_command(["network", "attach", place])
    path = [f"PATH={os.defpath}"]
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    environment = [*path, f"XDG_RUNTIME_DIR={runtime}"] if runtime else path
    return {"path": sys.executable, "args": argv, "env": environment, "timeout": 2 * _SECONDS}


def _start(directory: str, place: str, pid: int) -> None:
    """Start the helper of a recorded network in the namespaces of process pid."""
    record = state.read(f"{place}/{state.RECORD}")
    if record is None:
        raise KrunError(f"{place}: the network was released before the container was made")
    ports = state.read(f"{place}/ports.json") or []
    if record["program"] in _SLIRP:
        _start_slirp(directory, place, record, ports, pid)
    else:
        _start_pasta(directory, place, record, ports, pid)


def _spawn(place: str, argv: list[str], pipe: int = -1) -> int:
    """Start the helper, its words in the file log; return its pid."""
    log = os.open(f"{place}/log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        return detached.spawn(argv, log, pipe)
    except OSError as error:
        raise KrunError(f"{argv[0]}: {error.strerror}") from error
    finally:
        os.close(log)


def _said(place: str) -> str:
    try:
        with open(f"{place}/log", encoding="utf-8", errors="replace") as file:
            lines = file.read().strip().splitlines()
    except FileNotFoundError:
        return ""
    return "; ".join(lines[-3:])


def _start_slirp(
    directory: str, place: str, record: dict[str, Any], ports: list[Any], pid: int
) -> None:
    import select

    interface = record["interfaces"][0]
    socket = api_socket(directory, record["member"])
    reader, writer = os.pipe()
    if writer == 3:
        # dup2(3, 3) would leave it closed on exec.
        writer = os.dup(writer)
        os.close(3)
    argv = [record["program"], "--configure", f"--mtu={interface['mtu'] or 65520}"]
    argv += ["--disable-host-loopback", "--ready-fd=3", f"--api-socket={socket}"]
    argv += [str(pid), interface["name"]]
    helper = _spawn(place, argv, writer)
    os.symlink(state.identity(helper), f"{place}/{HELPER}")
    os.close(writer)
    poll = select.poll()
    poll.register(reader, select.POLLIN)
    answered = poll.poll(_SECONDS * 1000)
    ready = os.read(reader, 1) if answered else b""
    os.close(reader)
    if ready != b"1":
        raise KrunError(f"slirp4netns: {_said(place) or 'no answer'}")
    for port in ports:
        _forward(socket, port)


def _forward(socket: str, port: dict[str, Any]) -> None:
    """Ask slirp4netns to publish one port (its API: add_hostfwd)."""
    import _socket

    call = {
        "execute": "add_hostfwd",
        "arguments": {
            "proto": port["protocol"],
            "host_addr": port["address"] or "0.0.0.0",
            "host_port": port["host"],
            "guest_addr": _SLIRP_ADDRESS,
            "guest_port": port["container"],
        },
    }
    client = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
    try:
        client.settimeout(_SECONDS)
        client.connect(socket)
        client.sendall(jsontext.dumps(call).encode())
        client.shutdown(_socket.SHUT_WR)
        answer = jsontext.loads(client.recv(4096) or b"{}")
    except (OSError, ValueError) as error:
        raise KrunError(
            f"slirp4netns: publish {port['host']}/{port['protocol']}: {error}"
        ) from None
    finally:
        client.close()
    if "error" in answer:
        reason = answer["error"].get("desc", answer["error"])
        raise KrunError(f"slirp4netns: publish {port['host']}/{port['protocol']}: {reason}")


def _pasta_ports(ports: list[Any], protocol: str) -> list[str]:
    """Return pasta's forwarding options for one protocol; none means that nothing is forwarded."""
    words = []
    option = "--tcp-ports" if protocol == "tcp" else "--udp-ports"
    for port in ports:
        if port["protocol"] == protocol:
            address = f"{port['address']}/" if port["address"] else ""
            words += [option, f"{address}{port['host']}:{port['container']}"]
    return words or [option, "none"]


def _start_pasta(
    directory: str, place: str, record: dict[str, Any], ports: list[Any], pid: int
) -> None:
    from krun.network import namespace

    # pasta drops capabilities before it looks, so that it may not look at a process that has
    # them (ptrace(2), access mode checking); what is mounted it may open.
    mounted = f"{directory}/netns/{record['member']}"
    namespace.keep(pid, mounted)
    interface = record["interfaces"][0]
    argv = [record["program"], "--quiet", "--config-net", "--ns-ifname", interface["name"]]
    if interface["mtu"]:
        argv += ["--mtu", str(interface["mtu"])]
    argv += _pasta_ports(ports, "tcp") + _pasta_ports(ports, "udp")
    argv += ["--tcp-ns", "none", "--udp-ns", "none", "--pid", f"{place}/pid"]
    # Without --no-map-gw the gateway's address is the host's loopback.
    argv += ["--no-map-gw", "--netns-only", "--netns", mounted]
    # pasta goes to the background when the namespace is configured.
    _, status = os.waitpid(_spawn(place, argv), 0)
    code = os.waitstatus_to_exitcode(status)
    if code:
        ended = f"ended by signal {-code}" if code < 0 else f"ended with status {code}"
        raise KrunError(f"pasta: {_said(place) or ended}")
    with open(f"{place}/pid") as file:
        helper = int(file.read())
    os.symlink(state.identity(helper), f"{place}/{HELPER}")


def end(directory: str, member: str, place: str) -> None:
    """End the helper of a member, if it has one; a process that took its pid is left alone."""
    try:
        identity = os.readlink(f"{place}/{HELPER}")
    except OSError:
        identity = ""
    pid = identity.partition(":")[0]
    if pid.isdigit():
        import _signal

        try:
            fd = os.pidfd_open(int(pid))
        except ProcessLookupError:
            fd = -1
        if fd != -1:
            if state.identity(int(pid)) == identity:
                _signal.pidfd_send_signal(fd, _signal.SIGKILL)
            os.close(fd)
    for path in (api_socket(directory, member), attach_socket(directory, member)):
        try:
            os.unlink(path)
        except FileNotFoundError:
            continue


def _mount_namespace(process: str | int) -> int:
    """Return the number of a process's mount namespace, 0 where it cannot be known."""
    try:
        return os.stat(f"/proc/{process}/ns/mnt").st_ino
    except OSError:
        return 0


def helpers(directory: str) -> list[tuple[psutil.Process, str]]:
    """Return the helpers that run for members of this directory, each with its member.

    A helper's command line names its member, as part of the socket's path or the pid file's; the
    same path in another mount namespace is another machine's.  pasta leaves its mount namespace,
    but has the directory of one user alone.  Without psutil nothing is found.
    """
    try:
        import psutil
    except ImportError:
        log.warning("network helpers are not looked for: psutil is missing (pip install psutil)")
        return []
    listed = []
    here = _mount_namespace("self")
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or [""]
        program = os.path.basename(words[0])
        if program not in ("slirp4netns", "pasta", "pasta.avx2"):
            continue
        if program == "slirp4netns" and _mount_namespace(process.pid) != here:
            continue
        for word in words:
            path = word if word.startswith("/") else word.partition("=")[2]
            # From its begin: another user's directory may end in this one's path.
            if not path.startswith(f"{directory}/"):
                continue
            found = [part for part in path.replace("-", "/").split("/") if state.is_member(part)]
            if found:
                listed.append((process, found[-1]))
                break
    return listed


def end_orphans(listed: list[tuple[psutil.Process, str]], living: Container[str]) -> list[str]:
    """End those of `helpers` whose member is gone, or was killed before it recorded them."""
    import psutil

    ended = []
    for process, member in listed:
        if member in living:
            continue
        try:
            # psutil leaves alone what has taken the pid since.
            process.kill()
        except psutil.NoSuchProcess:
            continue
        ended.append(member)
    return ended
