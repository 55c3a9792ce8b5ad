"""The extension: the object `kontain` of config.json, and its members wherever else they stand."""

from __future__ import annotations

from krun.spec.shapes import (
    Violation,
    absolute,
    anything,
    array,
    at_most,
    between,
    boolean,
    closed_record,
    either,
    either_member,
    name,
    needs,
    one_of,
    path_or,
    text,
)


def memory_size(value: str) -> None:
    """A number of bytes as text: digits and a unit."""
    size = value[:-1] if value[-1:] in tuple("kKmMgGtT") else value
    if not (size.isascii() and size.isdigit() and size[0] != "0" and len(size) <= 18):
        raise Violation("must be a number of bytes, such as 512M")


def _is_sha256(value: str) -> bool:
    return len(value) == 64 and not value.strip("0123456789abcdefABCDEF")


def _is_option(value: str) -> bool:
    letter = value[2:3] if value[:2] == "--" else value[1:2]
    return value[:1] == "-" and letter.isascii() and letter.isalpha()


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
