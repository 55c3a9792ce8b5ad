"""A container's end: its processes killed, its directories removed."""

from __future__ import annotations

import errno
import os
import time

from krun.linux.cgroupfs import Directory, main_directory, processes, tree, write


def kill(places: tuple[Directory, ...], number: int) -> None:
    """Send a signal to every process of the cgroup."""
    for place in places:
        if place.version == 2 and number == 9 and os.path.exists(f"{place.path}/cgroup.kill"):
            # Only where every process is surely in it: a hybrid v2 tree may lack the rest.
            try:
                write(f"{place.path}/cgroup.kill", "1")
            except FileNotFoundError:
                continue
    directory = main_directory(places)
    for _ in range(64):
        pids = processes(directory) if directory else []
        sent = False
        for pid in pids:
            try:
                os.kill(pid, number)
                sent = True
            except ProcessLookupError:
                continue
        if number != 9 or not sent:
            return
        # A fork between listing and killing is caught by the next round.
        time.sleep(0.002)


def remove_tree(path: str, seconds: float = 5.0) -> None:
    """Remove a cgroup and those below; waits for the last process to be gone."""
    try:
        # Most are empty: nothing needs to be listed.
        os.rmdir(path)
        return
    except FileNotFoundError:
        return
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
    end = time.monotonic() + seconds
    pause = 0.0005
    while True:
        busy = None
        for directory in tree(path):
            try:
                os.rmdir(directory)
            except FileNotFoundError:
                continue
            except OSError as error:
                if error.errno != errno.EBUSY:
                    raise
                busy = error
        if busy is None:
            return
        if time.monotonic() > end:
            raise busy
        time.sleep(pause)
        pause = min(pause * 2, 0.05)
