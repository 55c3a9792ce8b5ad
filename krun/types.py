"""Types of an OCI runtime-spec 1.2 configuration; imported by the type checker alone.

The parsed document stays the dict it was read as: unknown properties survive, and handing it on
costs no conversion.  Names are the specification's; every member may be absent unless krun.spec
requires it.
"""

from __future__ import annotations

from typing import Any, TypedDict


class User(TypedDict, total=False):
    uid: int
    gid: int
    umask: int
    additionalGids: list[int]
    username: str


class ConsoleSize(TypedDict):
    height: int
    width: int


class Capabilities(TypedDict, total=False):
    bounding: list[str]
    effective: list[str]
    inheritable: list[str]
    permitted: list[str]
    ambient: list[str]


class Rlimit(TypedDict):
    type: str
    soft: int
    hard: int


class Scheduler(TypedDict, total=False):
    policy: str
    nice: int
    priority: int
    flags: list[str]
    runtime: int
    deadline: int
    period: int


IOPriority = TypedDict("IOPriority", {"class": str, "priority": int}, total=False)


class CPUAffinity(TypedDict, total=False):
    initial: str
    final: str


class Process(TypedDict, total=False):
    terminal: bool
    consoleSize: ConsoleSize
    user: User
    args: list[str]
    commandLine: str
    env: list[str]
    cwd: str
    capabilities: Capabilities
    rlimits: list[Rlimit]
    noNewPrivileges: bool
    apparmorProfile: str
    selinuxLabel: str
    oomScoreAdj: int
    scheduler: Scheduler
    ioPriority: IOPriority
    execCPUAffinity: CPUAffinity


class Root(TypedDict, total=False):
    path: str
    readonly: bool


class IDMapping(TypedDict):
    containerID: int
    hostID: int
    size: int


class Mount(TypedDict, total=False):
    destination: str
    type: str
    source: str
    options: list[str]
    uidMappings: list[IDMapping]
    gidMappings: list[IDMapping]


class Hook(TypedDict, total=False):
    path: str
    args: list[str]
    env: list[str]
    timeout: int


class Namespace(TypedDict, total=False):
    type: str
    path: str


class Device(TypedDict, total=False):
    type: str
    path: str
    major: int
    minor: int
    fileMode: int
    uid: int
    gid: int


class NetDevice(TypedDict, total=False):
    name: str


class DeviceRule(TypedDict, total=False):
    allow: bool
    type: str
    major: int
    minor: int
    access: str


class Memory(TypedDict, total=False):
    limit: int
    reservation: int
    swap: int
    kernel: int
    kernelTCP: int
    swappiness: int
    disableOOMKiller: bool
    useHierarchy: bool
    checkBeforeUpdate: bool


class CPU(TypedDict, total=False):
    shares: int
    quota: int
    burst: int
    period: int
    realtimeRuntime: int
    realtimePeriod: int
    cpus: str
    mems: str
    idle: int


class Pids(TypedDict, total=False):
    limit: int


class WeightDevice(TypedDict, total=False):
    major: int
    minor: int
    weight: int
    leafWeight: int


class ThrottleDevice(TypedDict):
    major: int
    minor: int
    rate: int


class BlockIO(TypedDict, total=False):
    weight: int
    leafWeight: int
    weightDevice: list[WeightDevice]
    throttleReadBpsDevice: list[ThrottleDevice]
    throttleWriteBpsDevice: list[ThrottleDevice]
    throttleReadIOPSDevice: list[ThrottleDevice]
    throttleWriteIOPSDevice: list[ThrottleDevice]


class HugepageLimit(TypedDict):
    pageSize: str
    limit: int


class InterfacePriority(TypedDict):
    name: str
    priority: int


class NetworkClass(TypedDict, total=False):
    classID: int
    priorities: list[InterfacePriority]


class Rdma(TypedDict, total=False):
    hcaHandles: int
    hcaObjects: int


class Resources(TypedDict, total=False):
    devices: list[DeviceRule]
    memory: Memory
    cpu: CPU
    pids: Pids
    blockIO: BlockIO
    hugepageLimits: list[HugepageLimit]
    network: NetworkClass
    rdma: dict[str, Rdma]
    unified: dict[str, str]


class SeccompArg(TypedDict, total=False):
    index: int
    value: int
    valueTwo: int
    op: str


class SeccompSyscall(TypedDict, total=False):
    names: list[str]
    action: str
    errnoRet: int
    args: list[SeccompArg]


class Seccomp(TypedDict, total=False):
    defaultAction: str
    defaultErrnoRet: int
    architectures: list[str]
    flags: list[str]
    listenerPath: str
    listenerMetadata: str
    syscalls: list[SeccompSyscall]


class IntelRdt(TypedDict, total=False):
    closID: str
    l3CacheSchema: str
    memBwSchema: str
    schemata: list[str]
    enableCMT: bool
    enableMBM: bool
    enableMonitoring: bool


class MemoryPolicy(TypedDict, total=False):
    mode: str
    nodes: str
    flags: list[str]


class Personality(TypedDict, total=False):
    domain: str
    flags: list[str]


class TimeOffset(TypedDict, total=False):
    secs: int
    nanosecs: int


class TimeOffsets(TypedDict, total=False):
    monotonic: TimeOffset
    boottime: TimeOffset


class Linux(TypedDict, total=False):
    devices: list[Device]
    netDevices: dict[str, NetDevice]
    uidMappings: list[IDMapping]
    gidMappings: list[IDMapping]
    sysctl: dict[str, str]
    cgroupsPath: str
    resources: Resources
    rootfsPropagation: str
    seccomp: Seccomp
    namespaces: list[Namespace]
    maskedPaths: list[str]
    readonlyPaths: list[str]
    mountLabel: str
    intelRdt: IntelRdt
    memoryPolicy: MemoryPolicy
    personality: Personality
    timeOffsets: TimeOffsets


class Gdb(TypedDict, total=False):
    port: int
    listen: bool
    dynlink: bool


class Km(TypedDict, total=False):
    membusWidth: int
    enable1gPages: bool
    overcommitMemory: bool
    device: str
    log: str
    verbose: bool | str
    hcallStats: bool
    coredump: str
    gdb: bool | int | Gdb
    snapshot: str
    mgtpipe: str
    copyenv: list[str]
    coreOnErr: bool
    dumpShutdown: bool
    killUnimplementedSyscalls: bool
    vendorId: bool
    extraArgs: list[str]


class DirectInvocation(TypedDict, total=False):
    path: str
    pattern: str
    target: str
    sha256: str
    trustImageLibraries: bool


class Images(TypedDict, total=False):
    check: str
    prefetch: list[str]


class Kontain(TypedDict, total=False):
    """The extension, spec-schema/config-kontain.schema.json."""

    monitor: str
    monitorPath: str
    engine: str
    memory: int | str
    km: Km
    directInvocation: list[DirectInvocation]
    execOutsideVM: bool
    init: str
    mode: str
    sandbox: str
    network: dict[str, Any] | list[Any] | str
    images: Images


class Spec(TypedDict, total=False):
    ociVersion: str
    process: Process
    root: Root
    hostname: str
    domainname: str
    mounts: list[Mount]
    hooks: dict[str, list[Hook]]
    annotations: dict[str, str]
    linux: Linux
    kontain: dict[str, Any]  # a Kontain, read by names as a table
