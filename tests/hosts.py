"""A machine as krun.host finds it, the same whichever the tests run on."""

from __future__ import annotations

from krun.host import Host, VirtDevice

HOST = Host(
    euid=0,
    egid=0,
    user_namespace=False,
    devices=(VirtDevice("kvm", "/dev/kvm", 10, 232, 0o666, 0, 0),),
    crun="/usr/bin/crun",
    km="/opt/kontain/bin/km",
    init="/usr/bin/tini-static",
    nofile_soft=1024,
    nofile_hard=1048576,
)
