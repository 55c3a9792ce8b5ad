"""config.json's `linux`: namespaces, devices, seccomp, resources (those of resources.json, too)."""

from __future__ import annotations

from krun.spec.shapes import (
    Violation,
    absolute,
    absolute_or_empty,
    array,
    between,
    boolean,
    closed_record,
    cpu_list,
    int64,
    mapping,
    needs,
    one_of,
    record,
    some_strings,
    string,
    strings,
    text,
    uint16,
    uint32,
    uint64,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def _device_numbers(value: Any) -> None:
    """A rule: a device that is not a fifo has its numbers."""
    if value.get("type") in ("c", "b", "u"):
        for key in ("major", "minor"):
            if key not in value:
                raise Violation("is required", key)


def _is_page_size(value: str) -> bool:
    size = value[:-2]
    return (
        value[-2:] in ("KB", "MB", "GB")
        and size.isascii()
        and size.isdigit()
        and not size.startswith("0")
    )


line = text(lambda value: "\n" not in value, "must be one line")

ID_MAPPINGS = array(
    record(("containerID", "hostID", "size"), containerID=uint32, hostID=uint32, size=uint32)
)

NAMESPACES = ("pid", "network", "mount", "ipc", "uts", "user", "cgroup", "time")

DEVICE = record(
    ("type", "path"),
    _device_numbers,
    type=one_of("c", "b", "u", "p"),
    path=absolute,
    major=int64,
    minor=int64,
    fileMode=uint32,
    uid=uint32,
    gid=uint32,
)

_THROTTLE = array(record(("major", "minor", "rate"), major=int64, minor=int64, rate=uint64))


def _is_access(value: str) -> bool:
    """Tell whether value is a device rule's access.

    runc ignores an `a` besides the letters; alone it would leave the rule nothing to say.
    """
    return not value.strip("rwma") and (not value or value.strip("a") != "")


RESOURCES = record(
    (),
    devices=array(
        record(
            ("allow",),
            allow=boolean,
            type=one_of("a", "b", "c", ""),
            major=int64,
            minor=int64,
            access=text(_is_access, "must be made of the letters r, w and m"),
        )
    ),
    memory=record(
        (),
        limit=int64,
        reservation=int64,
        swap=int64,
        kernel=int64,
        kernelTCP=int64,
        swappiness=uint64,
        disableOOMKiller=boolean,
        useHierarchy=boolean,
        checkBeforeUpdate=boolean,
    ),
    cpu=record(
        (),
        shares=uint64,
        quota=int64,
        burst=uint64,
        period=uint64,
        realtimeRuntime=int64,
        realtimePeriod=uint64,
        cpus=cpu_list,
        mems=cpu_list,
        idle=int64,
    ),
    pids=record((), limit=int64),
    blockIO=record(
        (),
        weight=uint16,
        leafWeight=uint16,
        weightDevice=array(
            record(("major", "minor"), major=int64, minor=int64, weight=uint16, leafWeight=uint16)
        ),
        throttleReadBpsDevice=_THROTTLE,
        throttleWriteBpsDevice=_THROTTLE,
        throttleReadIOPSDevice=_THROTTLE,
        throttleWriteIOPSDevice=_THROTTLE,
    ),
    hugepageLimits=array(
        record(
            ("pageSize", "limit"),
            pageSize=text(_is_page_size, "must be a page size such as 2MB"),
            limit=uint64,
        )
    ),
    network=record(
        (),
        classID=uint32,
        priorities=array(record(("name", "priority"), name=string, priority=uint32)),
    ),
    rdma=mapping(record((), hcaHandles=uint32, hcaObjects=uint32)),
    unified=mapping(string),
)

_ACTION = one_of(
    "SCMP_ACT_KILL",
    "SCMP_ACT_KILL_PROCESS",
    "SCMP_ACT_KILL_THREAD",
    "SCMP_ACT_TRAP",
    "SCMP_ACT_ERRNO",
    "SCMP_ACT_TRACE",
    "SCMP_ACT_ALLOW",
    "SCMP_ACT_LOG",
    "SCMP_ACT_NOTIFY",
)

SECCOMP = record(
    ("defaultAction",),
    needs("listenerMetadata", "listenerPath"),
    defaultAction=_ACTION,
    defaultErrnoRet=uint32,
    architectures=array(
        one_of(
            "SCMP_ARCH_X86",
            "SCMP_ARCH_X86_64",
            "SCMP_ARCH_X32",
            "SCMP_ARCH_ARM",
            "SCMP_ARCH_AARCH64",
            "SCMP_ARCH_MIPS",
            "SCMP_ARCH_MIPS64",
            "SCMP_ARCH_MIPS64N32",
            "SCMP_ARCH_MIPSEL",
            "SCMP_ARCH_MIPSEL64",
            "SCMP_ARCH_MIPSEL64N32",
            "SCMP_ARCH_PPC",
            "SCMP_ARCH_PPC64",
            "SCMP_ARCH_PPC64LE",
            "SCMP_ARCH_S390",
            "SCMP_ARCH_S390X",
            "SCMP_ARCH_PARISC",
            "SCMP_ARCH_PARISC64",
            "SCMP_ARCH_RISCV64",
            "SCMP_ARCH_LOONGARCH64",
            "SCMP_ARCH_M68K",
            "SCMP_ARCH_SH",
            "SCMP_ARCH_SHEB",
        )
    ),
    flags=array(
        one_of(
            "SECCOMP_FILTER_FLAG_TSYNC",
            "SECCOMP_FILTER_FLAG_LOG",
            "SECCOMP_FILTER_FLAG_SPEC_ALLOW",
            "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV",
        )
    ),
    listenerPath=string,
    listenerMetadata=string,
    syscalls=array(
        record(
            ("names", "action"),
            names=some_strings,
            action=_ACTION,
            errnoRet=uint32,
            args=array(
                record(
                    ("index", "value", "op"),
                    index=between(0, 5),
                    value=uint64,
                    valueTwo=uint64,
                    op=one_of(
                        "SCMP_CMP_NE",
                        "SCMP_CMP_LT",
                        "SCMP_CMP_LE",
                        "SCMP_CMP_EQ",
                        "SCMP_CMP_GE",
                        "SCMP_CMP_GT",
                        "SCMP_CMP_MASKED_EQ",
                    ),
                )
            ),
        )
    ),
)

_OFFSET = record((), secs=int64, nanosecs=between(0, 999_999_999))

LINUX = record(
    (),
    uidMappings=ID_MAPPINGS,
    gidMappings=ID_MAPPINGS,
    sysctl=mapping(string),
    resources=RESOURCES,
    cgroupsPath=string,
    namespaces=array(
        record(("type",), type=one_of(*NAMESPACES), path=absolute_or_empty),
        once="type",
        values=NAMESPACES,
    ),
    devices=array(DEVICE),
    netDevices=mapping(record((), name=string)),
    seccomp=SECCOMP,
    rootfsPropagation=one_of(
        "shared",
        "slave",
        "private",
        "unbindable",
        "rshared",
        "rslave",
        "rprivate",
        "runbindable",
        "",
    ),
    maskedPaths=array(absolute),
    readonlyPaths=array(absolute),
    mountLabel=string,
    intelRdt=record(
        (),
        closID=string,
        l3CacheSchema=line,
        memBwSchema=line,
        schemata=array(line),
        enableCMT=boolean,
        enableMBM=boolean,
        enableMonitoring=boolean,
    ),
    memoryPolicy=record(
        ("mode",),
        mode=one_of(
            "MPOL_DEFAULT",
            "MPOL_BIND",
            "MPOL_INTERLEAVE",
            "MPOL_WEIGHTED_INTERLEAVE",
            "MPOL_PREFERRED",
            "MPOL_PREFERRED_MANY",
            "MPOL_LOCAL",
        ),
        nodes=cpu_list,
        flags=array(
            one_of("MPOL_F_NUMA_BALANCING", "MPOL_F_RELATIVE_NODES", "MPOL_F_STATIC_NODES")
        ),
    ),
    personality=record(("domain",), domain=one_of("LINUX", "LINUX32"), flags=strings),
    timeOffsets=closed_record((), monotonic=_OFFSET, boottime=_OFFSET),
)
