"""The native engine's kill and delete: signals, and the removal of all that a container has."""

from __future__ import annotations

import os

from krun import store
from krun.errors import BadState, KrunError, NotFound
from krun.linux import cgroupfs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# How long a killed init may take to be gone.
_DEATH_SECONDS = 10

_MOVE_SECONDS = 1


def kill(root: str, container: str, signal: str, everything: bool) -> int:
    """Send a signal to init, or to every process of the container."""
    from krun.signals import number_of

    number = number_of(signal)
    stored = store.load(root, container)
    if everything:
        cgroupfs.kill(stored.cgroup, number)
        return 0
    if stored.pid == 0:
        raise BadState("container not running")
    try:
        init = store.open_init(root, stored)
    except BadState:
        main = cgroupfs.main_directory(stored.cgroup)
        if number == 9 and main and cgroupfs.processes(main):
            # Without a pid namespace the other processes have outlived init.
            cgroupfs.kill(stored.cgroup, 9)
            return 0
        raise
    try:
        _send(init, number)
        if number == 9 and cgroupfs.frozen(stored.cgroup):
            cgroupfs.thaw_to_die(stored.cgroup)
        if number == 9 and not stored.namespaces & store.CLONE_NEWPID:
            # Without a pid namespace the other processes outlive init (runc kills them too).
            cgroupfs.kill(stored.cgroup, 9)
    finally:
        os.close(init)
    return 0


def _send(pidfd: int, number: int) -> None:
    from krun.linux.flags import SYS_pidfd_send_signal
    from krun.linux.libc import syscall

    try:
        syscall(SYS_pidfd_send_signal, pidfd, number, None, 0)
    except ProcessLookupError:
        raise BadState("container not running") from None


def delete(root: str, container: str, force: bool) -> int:
    """Remove a container and everything that is left of it."""
    try:
        stored = store.load(root, container)
    except (NotFound, KrunError) as error:
        if not force:
            raise
        from krun import leftover

        rescued = None if isinstance(error, NotFound) else leftover.rescue(root, container)
        if rescued is None:
            store.remove(root, container)
        else:
            destroy(root, rescued, {})
        return 0
    status = store.status(root, stored)
    if status not in ("stopped", "created") and not force:
        raise BadState(
            f"cannot delete container {container} that is not stopped: {status}",
            "use delete --force",
        )
    try:
        spec = store.load_config(root, container)
    except KrunError:
        spec = {}
    destroy(root, stored, spec)
    return 0


def destroy(root: str, stored: store.State, spec: Any) -> None:
    """Kill what runs, remove the cgroup, run poststop hooks, remove the state."""
    if stored.pid:
        _kill_init(root, stored)
    if cgroupfs.frozen(stored.cgroup):
        cgroupfs.thaw_to_die(stored.cgroup)
    main = cgroupfs.main_directory(stored.cgroup)
    if stored.pid and main and cgroupfs.processes(main):
        # Without a pid there is nobody of ours to kill: an unborn or orphaned init ends by itself.
        cgroupfs.kill(stored.cgroup, 9)
    if stored.unit:
        _stop_unit(stored.unit)
    for place in stored.cgroup:
        try:
            cgroupfs.remove_tree(place.path)
        except PermissionError:
            if not stored.tolerant:
                raise
    if stored.rdt_own:
        from krun.linux import resctrl

        resctrl.remove(stored.rdt_own)
    if hooks := (spec.get("hooks") or {}).get("poststop"):
        from krun.hooks import run_each

        run_each("poststop", hooks, store.hook_state(stored, "stopped", stored.pid))
    store.remove(root, stored.id)


def _stop_unit(name: str) -> None:
    """Let systemd forget the container; without systemd the cgroup is removed all the same."""
    from krun import log, systemd

    try:
        with systemd.Manager() as manager:
            manager.stop(name)
    except KrunError as error:
        log.warning(f"{name}: {error}")


def _kill_init(root: str, stored: store.State) -> None:
    """Kill init and wait until it is gone."""
    try:
        init = store.open_init(root, stored)
    except BadState:
        return
    try:
        try:
            _send(init, 9)
        except BadState:
            return
        if cgroupfs.frozen(stored.cgroup):
            cgroupfs.thaw_to_die(stored.cgroup)
        import select

        poll = select.poll()
        poll.register(init, select.POLLIN)
        if not poll.poll(_MOVE_SECONDS * 1000):
            # Somebody may have put it into another cgroup, which is frozen.
            cgroupfs.move_away([stored.pid])
        if not poll.poll(_DEATH_SECONDS * 1000):
            text = f"container {stored.id}: init (pid {stored.pid}) does not die"
            raise KrunError(text, "it may hang in the kernel; try again")
        try:
            # It is this process's child after run.
            os.waitpid(stored.pid, os.WNOHANG)
        except ChildProcessError:
            pass
    finally:
        os.close(init)
