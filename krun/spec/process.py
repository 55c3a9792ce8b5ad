"""A process, of a container (config.json's `process`) and of an exec (process.json)."""

from __future__ import annotations

from krun.spec.shapes import (
    absolute,
    array,
    between,
    boolean,
    cpu_list,
    identity,
    int32,
    one_of,
    record,
    some_strings,
    string,
    strings,
    uint32,
    uint64,
)

LIMITS = (
    "RLIMIT_AS",
    "RLIMIT_CORE",
    "RLIMIT_CPU",
    "RLIMIT_DATA",
    "RLIMIT_FSIZE",
    "RLIMIT_LOCKS",
    "RLIMIT_MEMLOCK",
    "RLIMIT_MSGQUEUE",
    "RLIMIT_NICE",
    "RLIMIT_NOFILE",
    "RLIMIT_NPROC",
    "RLIMIT_RSS",
    "RLIMIT_RTPRIO",
    "RLIMIT_RTTIME",
    "RLIMIT_SIGPENDING",
    "RLIMIT_STACK",
)

PROCESS = record(
    ("cwd",),
    terminal=boolean,
    consoleSize=record(("height", "width"), height=uint32, width=uint32),
    user=record(
        (),
        uid=identity,
        gid=identity,
        umask=between(0, 0o777),
        additionalGids=array(identity),
        username=string,
    ),
    args=some_strings,
    commandLine=string,
    env=strings,
    cwd=absolute,
    capabilities=record(
        (),
        bounding=strings,
        effective=strings,
        inheritable=strings,
        permitted=strings,
        ambient=strings,
    ),
    rlimits=array(
        record(("type", "soft", "hard"), type=one_of(*LIMITS), soft=uint64, hard=uint64),
        once="type",
        values=LIMITS,
    ),
    noNewPrivileges=boolean,
    apparmorProfile=string,
    selinuxLabel=string,
    oomScoreAdj=between(-1000, 1000),
    scheduler=record(
        ("policy",),
        policy=one_of(
            "SCHED_OTHER",
            "SCHED_FIFO",
            "SCHED_RR",
            "SCHED_BATCH",
            "SCHED_ISO",
            "SCHED_IDLE",
            "SCHED_DEADLINE",
        ),
        nice=int32,
        priority=int32,
        flags=array(
            one_of(
                "SCHED_FLAG_RESET_ON_FORK",
                "SCHED_FLAG_RECLAIM",
                "SCHED_FLAG_DL_OVERRUN",
                "SCHED_FLAG_KEEP_POLICY",
                "SCHED_FLAG_KEEP_PARAMS",
                "SCHED_FLAG_UTIL_CLAMP_MIN",
                "SCHED_FLAG_UTIL_CLAMP_MAX",
            )
        ),
        runtime=uint64,
        deadline=uint64,
        period=uint64,
    ),
    ioPriority=record(
        ("class",),
        priority=between(0, 7),
        **{"class": one_of("IOPRIO_CLASS_RT", "IOPRIO_CLASS_BE", "IOPRIO_CLASS_IDLE")},
    ),
    execCPUAffinity=record((), initial=cpu_list, final=cpu_list),
)
