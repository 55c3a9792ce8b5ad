"""parse(doc) -> Spec: check a configuration against OCI runtime-spec 1.2, naming the JSON path.

The rules are one table of shapes; a document that keeps them stays the dict it is (see
krun.types), so nothing is converted and unknown properties survive.  The table says what
spec-schema/runtime-config.schema.json says; a test holds the two together, down to which
violation comes first: an object's missing members, then its members in the document's order.
"""

from __future__ import annotations

from krun.errors import BadSpec

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from krun.types import Process, Resources, Spec

    # A shape checks one value: it returns None, or raises _Violation.
    Shape = Callable[[Any], None]


class _Violation(Exception):
    """A broken rule; the path is collected, innermost first, while the stack unwinds."""

    def __init__(self, text: str, *path: str | int) -> None:
        super().__init__(text)
        self.text = text
        self.path = list(path)


def type_name(value: object) -> str:
    """Return what JSON calls the type of value, with its article."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, int):
        return "an integer"
    if isinstance(value, float):
        return "a number with a fraction or an exponent"
    if isinstance(value, str):
        return "a string"
    return "an array" if isinstance(value, list) else "an object"


def _expected(what: str, value: object) -> _Violation:
    return _Violation(f"must be {what}, is {type_name(value)}")


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def string(value: Any) -> None:
    """Text that the kernel can take: no NUL, no lone surrogate (RFC 8259 section 8.2)."""
    if type(value) is not str:
        raise _expected("a string", value)
    if "\0" in value or not (value.isascii() or _encodable(value)):
        raise _Violation("must not contain NUL or a lone surrogate")


def strings(value: Any) -> None:
    """An array of strings."""
    if type(value) is not list:
        raise _expected("an array", value)
    try:
        text = "".join(value)
    except TypeError:
        pass
    else:
        if "\0" not in text and text.isascii():
            return
    _strings(value)


def some_strings(value: Any) -> None:
    """An array of at least one string."""
    if type(value) is list and not value:
        raise _Violation("must not be empty")
    strings(value)


def name(value: Any) -> None:
    """A string that is not empty."""
    string(value)
    if not value:
        raise _Violation("must not be empty")


def absolute(value: Any) -> None:
    """An absolute path."""
    string(value)
    if value[:1] != "/":
        raise _Violation("must be absolute")


def absolute_or_empty(value: Any) -> None:
    """An absolute path, or an empty string that means none (as Go's encoders write it)."""
    string(value)
    if value and value[:1] != "/":
        raise _Violation("must be absolute")


def boolean(value: Any) -> None:
    """true or false."""
    if type(value) is not bool:
        raise _expected("a boolean", value)


def between(least: int, most: int) -> Shape:
    """An integer of a range."""

    def check(value: Any) -> None:
        if type(value) is not int:
            raise _expected("an integer", value)
        if not least <= value <= most:
            raise _Violation(f"must be {least} to {most}")

    return check


uint16 = between(0, (1 << 16) - 1)
uint32 = between(0, (1 << 32) - 1)
uint64 = between(0, (1 << 64) - 1)
int32 = between(-(1 << 31), (1 << 31) - 1)
int64 = between(-(1 << 63), (1 << 63) - 1)


def one_of(*values: str) -> Shape:
    """A string of a closed set."""
    known = frozenset(values)

    def check(value: Any) -> None:
        if type(value) is not str:
            raise _expected("a string", value)
        if value not in known:
            raise _Violation(f"must be one of {', '.join(v for v in values if v)}")

    return check


def text(rule: Callable[[str], bool], message: str) -> Shape:
    """A string that keeps a rule; message says which."""

    def check(value: Any) -> None:
        string(value)
        if not rule(value):
            raise _Violation(message)

    return check


def at_most(most: int, shape: Shape) -> Shape:
    """A string of a shape with at most so many characters."""

    def check(value: Any) -> None:
        shape(value)
        if len(value) > most:
            raise _Violation(f"must be at most {most} characters")

    return check


def made_of(characters: str, message: str) -> Shape:
    """A string of some characters alone, possibly empty."""
    return text(lambda value: not value.strip(characters), message)


def either(**shapes: Shape) -> Shape:
    """A value of one of several JSON types, by the Python name of the type."""
    nouns = {"str": "a string", "int": "an integer", "bool": "a boolean"}
    nouns |= {"list": "an array", "dict": "an object"}
    expected = " or ".join(nouns[kind] for kind in shapes)

    def check(value: Any) -> None:
        shape = shapes.get(type(value).__name__)
        if shape is None:
            raise _expected(expected, value)
        shape(value)

    return check


def anything(value: Any) -> None:
    """Any value."""


def array(item: Shape, least: int = 0, once: str = "", values: tuple[str, ...] = ()) -> Shape:
    """An array of items, in which no member `once` has one of `values` twice."""

    def check(value: Any) -> None:
        if type(value) is not list:
            raise _expected("an array", value)
        if len(value) < least:
            raise _Violation("must not be empty")
        if once:
            seen = [member.get(once) for member in value if type(member) is dict]
            for word in seen:
                if word in values and seen.count(word) > 1:
                    raise _Violation(f"must not have {word} more than once")
        index = 0
        try:
            for index, member in enumerate(value):  # noqa: B007
                item(member)
        except _Violation as violation:
            violation.path.append(index)
            raise

    return check


def mapping(item: Shape) -> Shape:
    """An object whose members are all alike."""

    def check(value: Any) -> None:
        if type(value) is not dict:
            raise _expected("an object", value)
        key = ""
        try:
            for key, member in value.items():
                string(key)
                item(member)
        except _Violation as violation:
            violation.path.append(key)
            raise

    return check


def _object(
    required: tuple[str, ...], rules: tuple[Shape, ...], members: dict[str, Shape], closed: bool
) -> Shape:
    find = members.get

    def check(value: Any) -> None:
        if type(value) is not dict:
            raise _expected("an object", value)
        for key in required:
            if key not in value:
                raise _Violation("is required", key)
        for rule in rules:
            rule(value)
        key = ""
        try:
            for key, member in value.items():
                shape = find(key)
                if shape is not None:
                    shape(member)
                elif closed:
                    raise _Violation("is not a known property")
        except _Violation as violation:
            violation.path.append(key)
            raise

    return check


def record(required: tuple[str, ...] = (), *rules: Shape, **members: Shape) -> Shape:
    """An object with known members; unknown ones pass.

    rules are checked on the whole object, before its members.
    """
    return _object(required, rules, members, closed=False)


def closed_record(required: tuple[str, ...] = (), *rules: Shape, **members: Shape) -> Shape:
    """An object with known members and no other: a misspelt one must not be lost unseen."""
    return _object(required, rules, members, closed=True)


def needs(key: str, other: str) -> Shape:
    """A rule: where key is, other is too."""

    def rule(value: Any) -> None:
        if key in value and other not in value:
            raise _Violation(f"is required with {key}", other)

    return rule


def _device_numbers(value: Any) -> None:
    """A rule: a device that is not a fifo has its numbers."""
    if value.get("type") in ("c", "b", "u"):
        for key in ("major", "minor"):
            if key not in value:
                raise _Violation("is required", key)


def either_member(one: str, other: str, shape: Shape) -> Shape:
    """A shape whose object has exactly one of two members."""

    def check(value: Any) -> None:
        if type(value) is dict and (one in value) == (other in value):
            raise _Violation(f"must have {one} or {other}, not both")
        shape(value)

    return check


def _is_version(value: str) -> bool:
    numbers = value.split(".", 2)
    if len(numbers) < 3:
        return False
    major, minor, patch = numbers
    return all(n.isascii() and n.isdigit() for n in (major, minor, patch[:1]))


def _is_page_size(value: str) -> bool:
    size = value[:-2]
    return (
        value[-2:] in ("KB", "MB", "GB")
        and size.isascii()
        and size.isdigit()
        and not size.startswith("0")
    )


def memory_size(value: str) -> None:
    """A number of bytes as text: digits and a unit."""
    size = value[:-1] if value[-1:] in tuple("kKmMgGtT") else value
    if not (size.isascii() and size.isdigit() and size[0] != "0" and len(size) <= 18):
        raise _Violation("must be a number of bytes, such as 512M")


def _is_sha256(value: str) -> bool:
    return len(value) == 64 and not value.strip("0123456789abcdefABCDEF")


def _is_option(value: str) -> bool:
    letter = value[2:3] if value[:2] == "--" else value[1:2]
    return value[:1] == "-" and letter.isascii() and letter.isalpha()


def path_or(*words: str) -> Shape:
    """One of some words, or an absolute path."""
    message = f"must be {', '.join(words)} or an absolute path"
    return text(lambda value: value[:1] == "/" or value in words, message)


_strings = array(string)
version = text(_is_version, "must be a version such as 1.2.0")
cpu_list = made_of("0123456789,- ", "must be a list such as 0-3,7")
line = text(lambda value: "\n" not in value, "must be one line")

ID_MAPPINGS = array(
    record(("containerID", "hostID", "size"), containerID=uint32, hostID=uint32, size=uint32)
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
        uid=uint32,
        gid=uint32,
        umask=between(0, 0o777),
        additionalGids=array(uint32),
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

MOUNT = record(
    ("destination",),
    needs("uidMappings", "gidMappings"),
    needs("gidMappings", "uidMappings"),
    destination=absolute,
    type=string,
    source=string,
    options=strings,
    uidMappings=ID_MAPPINGS,
    gidMappings=ID_MAPPINGS,
)

HOOKS = array(
    record(("path",), path=absolute, args=strings, env=strings, timeout=between(1, (1 << 31) - 1))
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

RESOURCES = record(
    (),
    devices=array(
        record(
            ("allow",),
            allow=boolean,
            type=one_of("a", "b", "c", ""),
            major=int64,
            minor=int64,
            access=made_of("rwm", "must be made of the letters r, w and m"),
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

_PORT = between(1, 65535)

KM = closed_record(
    (),
    membusWidth=between(32, 39),
    enable1gPages=boolean,
    overcommitMemory=boolean,
    device=one_of("kvm", "kkm", "auto"),
    log=path_or("stderr", "none"),
    verbose=either(bool=boolean, str=name),
    hcallStats=boolean,
    coreOnErr=boolean,
    dumpShutdown=boolean,
    coredump=path_or("none"),
    gdb=either(
        bool=boolean, int=_PORT, dict=closed_record((), port=_PORT, listen=boolean, dynlink=boolean)
    ),
    snapshot=absolute,
    mgtpipe=at_most(107, absolute),
    copyenv=array(
        text(
            lambda value: value != "" and "=" not in value,
            "must be the beginning of a variable's name",
        ),
        least=1,
    ),
    killUnimplementedSyscalls=boolean,
    vendorId=boolean,
    extraArgs=array(text(_is_option, "must be an option")),
)

MONITOR = one_of("km", "builtin", "none", "auto")
ENGINE = one_of("crun", "native", "auto")
INIT = path_or("auto", "none")
MODE = one_of("all", "label")
SANDBOX = one_of("vm", "native")

DIRECT_INVOCATION = array(
    either_member(
        "path",
        "pattern",
        closed_record(
            ("sha256",),
            needs("pattern", "target"),
            path=absolute,
            pattern=name,
            target=absolute,
            sha256=text(_is_sha256, "must be 64 hexadecimal digits"),
            trustImageLibraries=boolean,
        ),
    )
)

IMAGES = closed_record((), check=one_of("record", "warn", "refuse"), prefetch=array(name))

# krun.network.reader reads on, where a network is asked for.
NETWORK = either(dict=anything, str=anything)

EXTENSION = closed_record(
    (),
    monitor=MONITOR,
    monitorPath=absolute,
    engine=ENGINE,
    memory=either(int=between(1, (1 << 63) - 1), str=memory_size),
    km=KM,
    directInvocation=DIRECT_INVOCATION,
    execOutsideVM=boolean,
    init=INIT,
    mode=MODE,
    sandbox=SANDBOX,
    network=NETWORK,
    images=IMAGES,
)

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

SPEC = record(
    ("ociVersion", "root"),
    ociVersion=version,
    process=PROCESS,
    root=record(("path",), path=name, readonly=boolean),
    hostname=string,
    domainname=string,
    mounts=array(MOUNT),
    hooks=record(
        (),
        prestart=HOOKS,
        createRuntime=HOOKS,
        createContainer=HOOKS,
        startContainer=HOOKS,
        poststart=HOOKS,
        poststop=HOOKS,
    ),
    annotations=mapping(string),
    linux=LINUX,
    kontain=EXTENSION,
)


def json_path(path: list[str | int]) -> str:
    """Return a path as text, from the outermost part on: mounts[3].options, annotations["a.b"]."""
    result = ""
    for part in path:
        if isinstance(part, int):
            result += f"[{part}]"
        elif part.isascii() and part.isidentifier():
            result += f".{part}" if result else part
        else:
            from krun.jsontext import dumps

            shown = dumps(part if len(part) <= 80 else part[:77] + "...")
            result += f"[{shown.encode(errors='backslashreplace').decode()}]"
    return result


def _check(shape: Shape, document: Any, name: str) -> None:
    try:
        shape(document)
    except _Violation as violation:
        raise BadSpec(json_path(violation.path[::-1]), violation.text, document=name) from None


def parse(document: Any) -> Spec:
    """Return document as a Spec; raises BadSpec that names the first violation's JSON path."""
    _check(SPEC, document, "config.json")
    spec: Spec = document
    return spec


def parse_process(document: Any) -> Process:
    """Return document as the process of an exec (process.json); raises BadSpec."""
    _check(PROCESS, document, "process.json")
    process: Process = document
    return process


def parse_resources(document: Any) -> Resources:
    """Return document as the resources of an update (resources.json); raises BadSpec."""
    _check(RESOURCES, document, "resources.json")
    resources: Resources = document
    return resources


def parse_extension(document: Any, name: str = "kontain") -> dict[str, Any]:
    """Return document, a kontain object from elsewhere than config.json; raises BadSpec."""
    _check(EXTENSION, document, name)
    extension: dict[str, Any] = document
    return extension


def parse_policy(document: Any, name: str = "policy.json") -> dict[str, Any]:
    """Return document, a host's policy from the file of that name; raises BadSpec."""
    _check(POLICY, document, name)
    policy: dict[str, Any] = document
    return policy
