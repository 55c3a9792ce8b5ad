"""A systemd of the tests' own: pid 1 of a pid namespace, with a cgroup of its own and no units."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from pathlib import Path

from native_parts import Native

SYSTEMD = "/lib/systemd/systemd"

# What systemd does to a machine when it starts must not reach this one: its units are these alone,
# sysctls are read-only, /sys/fs/cgroup is a copy, and the controllers that are in no v1 hierarchy
# are unknown, so that it does not mount them.
START = r"""
set -e
mount -t tmpfs tmpfs /run
mkdir -p /run/units /run/dbus
mount -t proc proc /proc
printf '[Unit]\nDescription=Nothing\n' > /run/units/default.target
printf '[Unit]\nDefaultDependencies=no\n' > /run/units/shutdown.target
if [ "$2" = v2 ]; then
  umount -l /sys/fs/cgroup
  mount -t cgroup2 none /sys/fs/cgroup
elif [ "$(stat --file-system --format %T /sys/fs/cgroup)" = tmpfs ]; then
  mkdir /run/cgroup
  mount -t tmpfs -o mode=755 tmpfs /run/cgroup
  for place in /sys/fs/cgroup/*; do
    mountpoint -q "$place" || continue
    mkdir "/run/cgroup/${place##*/}"
    mount --bind "$place" "/run/cgroup/${place##*/}"
  done
  umount -l /sys/fs/cgroup
  mount --rbind /run/cgroup /sys/fs/cgroup
  umount -l /run/cgroup
  awk '/^#/ || $2 > 0' /proc/cgroups > /run/cgroups
  mount --bind /run/cgroups /proc/cgroups
fi
for place in /sys/fs/cgroup /sys/fs/cgroup/*; do
  if [ -e "$place/cgroup.procs" ] && [ "${place##*/}" != cpuset ]; then
    mkdir "$place/$1" && echo $$ > "$place/$1/cgroup.procs"
    [ "$2" != v2 ] || break
  fi
done
mount --bind /proc/sys /proc/sys
mount -o remount,bind,ro /proc/sys
units=/run/systemd/control:/run/systemd/transient:/run/units
exec env -i PATH="$PATH" container=test SYSTEMD_UNIT_PATH="$units" SYSTEMD_LOG_TARGET=console \
  SYSTEMD_LOG_LEVEL=warning /lib/systemd/systemd --system --show-status=0
"""


class Systemd:
    """The namespaces of a running systemd; `layout` is v1 (the machine's own) or v2."""

    def __init__(self, native: Native, layout: str) -> None:
        self.native = native
        self.layout = layout
        self.cgroup = f"krun-systemd-{os.urandom(6).hex()}"
        new = [
            "unshare",
            "--pid",
            "--uts",
            "--ipc",
            "--fork",
            "--mount",
            "--propagation",
            "private",
        ]
        self.log = native.directory / "systemd.log"
        with self.log.open("w") as log:
            self.holder = subprocess.Popen(
                [*new, "--kill-child", "sh", "-c", START, "sh", self.cgroup, layout],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        try:
            self._wait()
        except BaseException:
            self.end()
            raise

    def _wait(self) -> None:
        """Wait until systemd has started its only target."""
        end = time.monotonic() + 20
        words = ("systemctl", "is-active", "default.target")
        while not self.pid() or self.run(*words, status=None).stdout != "active\n":
            assert self.holder.poll() is None, self.log.read_text()
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.05)

    def pid(self) -> int:
        """systemd's pid out here, 0 until it is there."""
        path = Path(f"/proc/{self.holder.pid}/task/{self.holder.pid}/children")
        try:
            child = path.read_text().split()
            exe = os.readlink(f"/proc/{child[0]}/exe") if child else ""
        except OSError:
            return 0
        return int(child[0]) if exe == os.path.realpath(SYSTEMD) else 0

    def inside(self, *argv: object) -> list[str]:
        """The command line that runs argv beside systemd."""
        return ["nsenter", "-t", str(self.pid()), "-m", "-p", "--", *map(str, argv)]

    def run(self, *argv: object, status: int | None = 0) -> subprocess.CompletedProcess[str]:
        """Run argv beside systemd."""
        done = subprocess.run(
            self.inside(*argv), capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL
        )
        if status is not None:
            assert done.returncode == status, f"{argv}: {done.stdout}{done.stderr}"
        return done

    def krun(
        self, *argv: object, status: int | None = 0, quiet: bool = False
    ) -> subprocess.CompletedProcess[str]:
        """Run krun with the systemd driver; `quiet` for what leaves a process behind."""
        words = [*self.native.words, "--systemd-cgroup", *argv]
        if not quiet:
            return self.run(*words, status=status)
        output = self.native.directory / "output"
        with output.open("w") as file:
            done = subprocess.run(
                self.inside(*words), stdin=subprocess.DEVNULL, stdout=file, stderr=file, timeout=60
            )
        text = output.read_text()
        if status is not None:
            assert done.returncode == status, f"{argv}: {text}"
        return subprocess.CompletedProcess(words, done.returncode, text, text)

    def show(self, unit: str, *properties: str) -> dict[str, str]:
        """Properties of a unit, as systemctl shows them."""
        words = [word for name in properties for word in ("-p", name)]
        lines = self.run("systemctl", "show", *words, unit).stdout.splitlines()
        return dict(line.split("=", 1) for line in lines)

    def units(self) -> list[str]:
        """The names of the scopes that systemd knows, beside its own."""
        words = ("systemctl", "list-units", "--all", "--plain", "--no-legend", "--type=scope")
        lines = self.run(*words).stdout.splitlines()
        return sorted({line.split()[0] for line in lines} - {"init.scope"})

    def start_bus(self) -> None:
        """Start dbus-daemon as the system's bus and wait until systemd is on it."""
        conf = self.native.directory / "bus.conf"
        conf.write_text(
            "<busconfig><type>system</type><listen>systemd:</listen>"
            '<policy context="default"><allow user="*"/><allow own="*"/><allow send_type="*"/>'
            '<allow receive_type="*"/></policy></busconfig>'
        )
        start = f"dbus-daemon --nofork --nopidfile --config-file={conf}"
        # systemd comes to a bus that these two say is there.
        units = {
            "dbus.socket": "[Socket]\nListenStream=/run/dbus/system_bus_socket\n",
            "dbus.service": f"[Service]\nExecStart={start}\n",
        }
        for name, text in units.items():
            path = self.native.directory / name
            path.write_text(f"[Unit]\nDefaultDependencies=no\n{text}")
            self.run("cp", path, "/run/units")
        self.run("systemctl", "daemon-reload")
        self.run("systemctl", "start", *units)
        end = time.monotonic() + 10
        while self.run("busctl", "status", "org.freedesktop.systemd1", status=None).returncode:
            assert time.monotonic() < end, "systemd does not come to the bus"
            time.sleep(0.1)

    def close(self) -> list[str]:
        """End systemd and all in its namespace; returns what is left of cgroups, and removes it."""
        for name in self.native.names:
            if (self.native.root / name).exists():
                self.krun("delete", "--force", name, status=None)
        return [*self.units(), *self.end()]

    def end(self) -> list[str]:
        """Kill systemd and all in its namespace; returns the containers' cgroups that are left."""
        if pid := self.pid():
            os.kill(pid, 9)
        else:
            self.holder.kill()
        self.holder.wait(20)
        left = []
        root = Path("/sys/fs/cgroup")
        # podman takes a hybrid layout for v1, and its conmon's scope to lie below unified/memory.
        for top in (*root.iterdir(), root / "unified/memory"):
            for directory, _, _ in os.walk(top / self.cgroup, topdown=False):
                if any(name in directory for name in self.native.names):
                    left.append(directory)
                os.rmdir(directory)
        # Unless another test's is in it.
        with contextlib.suppress(OSError):
            os.rmdir(root / "unified/memory")
        return left


def need() -> None:
    """Fail where there is no systemd: the Debian packages of the tests bring it."""
    assert os.access(SYSTEMD, os.X_OK), "systemd is not installed"
    assert shutil.which("systemctl")
