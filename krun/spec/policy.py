"""The host's policy: defaults, programs, direct invocation, what bundles may change."""

from __future__ import annotations

from krun.spec.kontain import (
    DIRECT_INVOCATION,
    ENGINE,
    IMAGES,
    INIT,
    KM,
    MODE,
    MONITOR,
    NETWORK,
    SANDBOX,
)
from krun.spec.shapes import absolute, array, boolean, closed_record, either, one_of, string, text

_KM_ALLOWED = one_of(
    "membusWidth",
    "enable1gPages",
    "overcommitMemory",
    "device",
    "log",
    "verbose",
    "hcallStats",
    "coredump",
    "snapshot",
    "mgtpipe",
    "copyenv",
    "coreOnErr",
    "dumpShutdown",
    "killUnimplementedSyscalls",
    "vendorId",
)

POLICY = closed_record(
    (),
    defaults=closed_record(
        (),
        monitor=MONITOR,
        engine=ENGINE,
        init=INIT,
        mode=MODE,
        sandbox=SANDBOX,
        execOutsideVM=boolean,
        km=KM,
        network=NETWORK,
    ),
    paths=closed_record((), crun=absolute, km=absolute, init=absolute),
    directInvocation=DIRECT_INVOCATION,
    allow=closed_record(
        (),
        extension=boolean,
        annotations=either(
            bool=boolean,
            list=array(
                text(lambda value: value[:12] == "app.kontain.", "must begin with app.kontain.")
            ),
        ),
        crunAnnotations=either(
            bool=boolean,
            list=array(text(lambda value: value[:8] == "run.oci.", "must begin with run.oci.")),
        ),
        monitor=array(MONITOR),
        monitorPaths=array(absolute),
        engine=array(ENGINE),
        init=boolean,
        network=boolean,
        km=array(_KM_ALLOWED),
        gdb=boolean,
        extraArgs=boolean,
    ),
    images=IMAGES,
    **{"$schema": string},
)
