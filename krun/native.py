"""The native engine's verbs: krun builds the container itself."""

from __future__ import annotations

import os
import posix

from krun import handshake, store
from krun.errors import BadSpec, BadState, KrunError
from krun.linux import cgroupfs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from krun.grammar import Call
    from krun.prepare import Prepared
    from krun.types import Process

    Builtin = Callable[[list[str], dict[str, str]], int]


def create(call: Call, prepared: Prepared, container: str) -> int:
    """Create (or, for the verb run, run) a container; returns the exit status."""
    from krun import host, launch
    from krun.plan.build import build

    spec = prepared.translation.spec
    root = call.settings.root or host.default_root()
    options = call.options
    systemd = call.settings.systemd_cgroup or call.settings.cgroup_manager == "systemd"
    rootless = {"true": True, "false": False}.get(call.settings.rootless or "", host.rootless())
    running = call.verb == "run"
    _check_rights(spec)
    spec, listening = _with_listen_fds(spec)
    told = False
    # posix, as os.environ costs more than all the rest of os.
    if b"NOTIFY_SOCKET" in posix.environ:
        from krun import notify

        if notify.caller():
            original, spec = spec, notify.add(spec, store.directory(root, container))
            told = spec is not original
    plan = build(spec, container, prepared.bundle, cgroupfs.version(), systemd)
    _check_console(plan.process.terminal, options)
    translation = prepared.translation
    builtin = None if translation.outside else _monitor(translation.state, options["preserve_fds"])
    making = launch.Options(
        options["console_socket"] or "",
        options["pid_file"] or "",
        options["no_pivot"],
        not options["no_new_keyring"],
        options["preserve_fds"] + listening,
        rootless,
        builtin,
        cgroups=call.settings.cgroup_manager != "disabled",
        notify=told,
    )
    if not running:
        launch.create(root, plan, dict(spec), making)
        _warn_of_lacking(plan, spec)
        return 0
    return _run(call, root, plan, spec, making)


def _warn_of_lacking(plan: Any, spec: Any) -> None:
    """Warn of capabilities of a container that is made: an error before stands alone."""
    owned = bool(plan.namespaces.listed & _CLONE_NEWUSER)
    _warn_of_capabilities((spec.get("process") or {}).get("capabilities"), owned)


def _warn_of_capabilities(sets: Any, user_namespace: bool) -> None:
    """Say which capabilities the payload will not have; in a new user namespace all are there."""
    from krun import log
    from krun.linux.privileges import permitted
    from krun.plan.process import ungranted, unraised

    names = ungranted(sets, -1 if user_namespace else permitted())
    if names:
        log.warning(f"ignoring unknown or unavailable capabilities: {' '.join(names)}")
    names = unraised(sets) if sets and sets.get("ambient") else []
    if names:
        shown = " ".join(names)
        log.warning(f"can't raise ambient capabilities: not permitted and inheritable: {shown}")


def _check_rights(spec: Any) -> None:
    """Raise BadSpec for what only the owner of a user namespace can make (user_namespaces(7)).

    crun adds the namespace; by the specification what is not listed is the caller's, and runc
    refuses as well.
    """
    if os.geteuid() == 0:
        return
    from krun.linux.privileges import permitted

    namespaces = (spec.get("linux") or {}).get("namespaces") or ()
    if permitted() & _CAP_SYS_ADMIN or any(one["type"] == "user" for one in namespaces):
        return
    text = "an ordinary user's container needs a user namespace"
    raise BadSpec("linux.namespaces", text, "krun spec --rootless writes one")


_CAP_SYS_ADMIN = 1 << 21


def _with_listen_fds(spec: Any) -> tuple[Any, int]:
    """Hand on what systemd passed to krun (sd_listen_fds(3)); the payload is pid 1 to itself."""
    from krun.engine import listen_fds

    count = listen_fds()
    if not count:
        return spec, 0
    process = {**spec["process"]}
    names = [f"{name}={os.environ[name]}" for name in ("LISTEN_FDNAMES",) if name in os.environ]
    own = [f"LISTEN_FDS={count}", "LISTEN_PID=1", *names]
    process["env"] = [*(process.get("env") or ()), *own]
    return {**spec, "process": process}, count


def _check_console(terminal: bool, options: dict[str, Any]) -> None:
    """Raise KrunError for a console socket that no terminal would be sent over, as runc does."""
    if options["console_socket"] and not terminal:
        raise KrunError(
            "--console-socket needs a terminal", "set process.terminal, or leave the option out"
        )


def _run(call: Call, root: str, plan: Any, spec: Any, making: Any) -> int:
    from krun import launch

    # Before there is a child that shares every page: each one written then is copied.
    from krun.removal import destroy
    from krun.wait import listen, stand_by

    detach = call.options["detach"]
    carried = plan.process.terminal and not making.console_socket
    parent_end = -1
    if carried:
        if detach:
            text = "run --detach with a terminal needs --console-socket"
            raise KrunError(text, "or set process.terminal to false")
        from krun.console import pair

        parent_end, child_end = pair()
        making = making._replace(console_fd=child_end)
    if not call.options["no_subreaper"] and not detach:
        from krun.linux.privileges import set_child_subreaper

        set_child_subreaper()
    born = launch.create(root, plan, spec, making._replace(direct=True))
    _warn_of_lacking(plan, spec)
    state = born.state
    reader = -1
    if not detach:
        reader = listen()
    relay = None
    try:
        if making.notify:
            from krun import notify

            relay = notify.listen(store.directory(root, state.id))
        launch.go(born, plan)
    except BaseException:
        destroy(root, state, spec)
        raise
    if detach:
        if relay is not None:
            init = os.pidfd_open(state.pid)
            relay.wait(init, state.pid)
            os.close(init)
        return 0
    master = -1
    if carried:
        from krun.console import receive_descriptor

        master = receive_descriptor(parent_end)
    status = stand_by(state.pid, reader, master, relay)
    if not call.options["keep"]:
        destroy(root, state, spec)
    return status


def _monitor(state: dict[str, Any], keep_fds: int) -> Builtin | None:
    """Return the built-in monitor for a container that has it, imported and its device open.

    In the container the host's files, /dev and rights are gone.  `keep_fds` descriptors after
    standard error are the payload's; of all others it sees nothing.  Raises KrunError.
    """
    if state.get("monitor") != "builtin":
        return None
    from krun.monitor.builtin import run

    run.preload()
    settings = run.from_options(state.get("km") or {}, state.get("memory") or 0)
    prepared = run.prepare({**settings, "init": state.get("init")})

    def monitor(argv: list[str], environ: dict[str, str]) -> int:
        device = prepared.device
        _close_own(3, 3 + keep_fds, device)
        os.closerange(3 + keep_fds, device)
        os.closerange(max(device + 1, 3 + keep_fds), 1 << 20)
        try:
            return prepared.run(argv, [f"{name}={value}" for name, value in environ.items()])
        except KrunError as error:
            # The payload's standard error: its user reads it with podman logs.
            os.write(2, f"krun: {error}\n".encode("utf-8", "backslashreplace"))
            return error.exit_code

    return monitor


def _close_own(first: int, end: int, keep: int) -> None:
    """Close what krun opened where a descriptor to preserve was not open: all close-on-exec."""
    for fd in range(first, end):
        try:
            if fd != keep and not os.get_inheritable(fd):
                os.close(fd)
        except OSError:
            continue


def start(root: str, container: str) -> int:
    """Let a created container's payload go; of two callers one wins."""
    path = store.directory(root, container)
    state = store.load(root, container)
    init = -1
    relay = None
    lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # Ends with the process: a killed start leaves no lock.
        handshake.flock(lock, handshake.LOCK_EX)
        now = store.status(root, state)
        if now == "paused" and handshake.waiting(path):
            raise BadState("cannot start a paused container", "use krun resume first")
        if now != "created":
            # runc's words.
            if now == "running":
                raise BadState("cannot start an already running container")
            if now == "stopped":
                raise BadState("cannot start a container that has stopped")
            raise BadState(f"cannot start a container in the {now} state")
        init = store.open_init(root, state)
        if b"NOTIFY_SOCKET" in posix.environ:
            from krun import notify

            relay = notify.listen(path)
        # Paused just now, it has the word, and runs on when it is resumed.
        report = handshake.release(
            path, init, lambda: cgroupfs.refuse_frozen(state.cgroup), cgroupfs.PATIENCE
        )
    finally:
        os.close(lock)
        if init != -1 and relay is None:
            os.close(init)
    if report:
        spec = store.load_config(root, container)
        handshake.raise_report(report, ((spec.get("process") or {}).get("args") or [""])[0])
    if state.poststart:
        _poststart(root, state)
    if relay is not None:
        relay.wait(init, state.pid)
        os.close(init)
    return 0


def _poststart(root: str, state: store.State) -> None:
    """Run the poststart hooks; one that fails ends the container (runtime.md, Lifecycle 9)."""
    from krun.hooks import run_hooks
    from krun.removal import destroy

    spec = store.load_config(root, state.id)
    hooks = (spec.get("hooks") or {}).get("poststart") or ()
    try:
        run_hooks("poststart", hooks, store.hook_state(state, "running", state.pid))
    except KrunError:
        destroy(root, state, spec)
        raise


def state(root: str, container: str) -> dict[str, Any]:
    """Return the container's state."""
    stored = store.load(root, container)
    return store.document(stored, store.status(root, stored))


_CLONE_NEWUSER = 0x10000000


def _shared(joining: Any, linux: dict[str, Any]) -> Any:
    """Return join.Options with what every process of the container shares."""
    if not (linux.get("personality") or linux.get("memoryPolicy")):
        return joining
    from krun.plan.build import plan_memory_policy, plan_personality

    return joining._replace(
        personality=plan_personality(linux.get("personality")),
        memory_policy=plan_memory_policy(linux.get("memoryPolicy")),
    )


def exec_(call: Call, root: str, container: str, process: Process, state: dict[str, Any]) -> int:
    """Run one more process, already translated; returns its status, 0 when detached.

    `state` is what translate filed for the container; empty for a process outside of any VM.
    """
    from krun import join, log
    from krun.birth import seccomp_program
    from krun.plan.process import keeps_groups, plan_process

    options = call.options
    stored = store.load(root, container)
    spec = store.load_config(root, container)
    wanted = plan_process(process)
    log.debug(f"exec in container {container}, pid {stored.pid}")
    _check_console(wanted.terminal, options)
    if options["process"] is not None or options["cap"]:
        # Of the container's own create has told.
        owned = bool(stored.namespaces & _CLONE_NEWUSER)
        _warn_of_capabilities(process.get("capabilities"), owned)
    if wanted.terminal and options["detach"] and not options["console_socket"]:
        text = "exec --detach with a terminal needs --console-socket"
        raise KrunError(text, "or leave out --tty")
    joining = join.Options(
        options["console_socket"] or "",
        options["preserve_fds"],
        tuple(options["cgroup"]),
        options["ignore_paused"],
        _monitor(state, options["preserve_fds"]),
        (spec.get("linux") or {}).get("seccomp"),
        keep_groups=keeps_groups(stored.annotations),
    )
    joining = _shared(joining, spec.get("linux") or {})
    seccomp = seccomp_program(joining.filter)
    if not options["detach"]:
        from krun.linux.privileges import set_child_subreaper

        set_child_subreaper()
    reader = -1
    if not options["detach"]:
        from krun.wait import listen

        reader = listen()
    joined = join.join(root, stored, wanted, seccomp, joining)
    if options["pid_file"]:
        try:
            store.write_pid(options["pid_file"], joined.pid)
        except OSError:
            # Its caller would know of no process to end.
            os.kill(joined.pid, 9)
            raise
    if options["detach"]:
        return 0
    from krun.wait import stand_by

    return stand_by(joined.pid, reader, joined.master)


def pause(root: str, container: str) -> int:
    """Freeze every process of the container."""
    stored = store.load(root, container)
    status = store.status(root, stored)
    if status not in ("running", "created"):
        raise BadState(f"container not running or created: {status}")
    cgroupfs.freeze(stored.cgroup, True)
    return 0


def resume(root: str, container: str) -> int:
    """Thaw a frozen container."""
    stored = store.load(root, container)
    status = store.status(root, stored)
    if status != "paused":
        raise BadState(f"container not paused: {status}")
    cgroupfs.freeze(stored.cgroup, False)
    return 0


def ps(root: str, container: str, form: str, options: list[str]) -> int:
    """List processes."""
    from krun import watch

    return watch.ps(store.load(root, container), form, options)


def update(root: str, container: str, options: dict[str, Any]) -> int:
    """Change limits."""
    from krun import watch

    return watch.update(root, store.load(root, container), options)


def events(root: str, container: str, stats: bool, interval: str) -> int:
    """Print statistics and events."""
    from krun import watch

    return watch.events(root, store.load(root, container), stats, interval)
