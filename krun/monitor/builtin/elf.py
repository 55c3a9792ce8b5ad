"""Executables: what an ELF file asks for, the load addresses, and the initial stack.

System V ABI, AMD64 supplement, 3.4.1 (initial stack); elf(5); execve(2) for scripts.
"""

from __future__ import annotations

import struct

from krun.record import Record

PAGE = 4096
PT_LOAD, PT_INTERP, PT_PHDR, PT_GNU_STACK = 1, 3, 6, 0x6474E551
ET_EXEC, ET_DYN = 2, 3
EM_X86_64 = 62

AT_PHDR, AT_PHENT, AT_PHNUM, AT_PAGESZ, AT_BASE, AT_FLAGS, AT_ENTRY = 3, 4, 5, 6, 7, 8, 9
AT_UID, AT_EUID, AT_GID, AT_EGID, AT_PLATFORM, AT_HWCAP, AT_CLKTCK = 11, 12, 13, 14, 15, 16, 17
AT_SECURE, AT_RANDOM, AT_HWCAP2, AT_EXECFN, AT_SYSINFO_EHDR, AT_MINSIGSTKSZ = 23, 25, 26, 31, 33, 51

ENOEXEC = 8
HEADER_SIZE = 512


class BadExecutable(Exception):
    """The file is no executable of this machine; `errno` is what execve(2) would return."""

    def __init__(self, text: str, errno: int = ENOEXEC) -> None:
        super().__init__(text)
        self.errno = errno


class Segment(Record):
    """A PT_LOAD: where it goes relative to the load address, and what of the file."""

    address: int
    memory_size: int
    offset: int
    file_size: int
    prot: int


class Image(Record):
    """What an ELF header says."""

    fixed: bool
    entry: int
    segments: tuple[Segment, ...]
    interpreter: bytes
    header_address: int
    header_count: int
    header_size: int
    low: int
    high: int
    alignment: int


class Script(Record):
    """A `#!` line."""

    interpreter: bytes
    argument: bytes


def parse(head: bytes, size: int) -> Image | Script:
    """What the file with these first bytes and this size is; raises BadExecutable.

    `head` must hold the program headers: the first 4096 bytes always do for real linkers.
    """
    if head.startswith(b"#!"):
        return _script(head)
    if len(head) < 64 or head[:4] != b"\x7fELF":
        raise BadExecutable("not an ELF file and not a script")
    if head[4] != 2 or head[5] != 1:
        raise BadExecutable("not a 64-bit little-endian ELF file")
    kind, machine, _, entry, phoff, _, _, _, phentsize, phnum = struct.unpack_from(
        "<HHIQQQIHHH", head, 16
    )
    if machine != EM_X86_64:
        raise BadExecutable(f"built for machine {machine}, not for x86-64")
    if kind not in (ET_EXEC, ET_DYN):
        raise BadExecutable("neither an executable nor a shared object")
    if phentsize != 56 or not 0 < phnum <= 1170 or phoff + 56 * phnum > len(head):
        raise BadExecutable("bad program headers")
    segments = []
    interpreter = b""
    header_address = 0
    alignment = PAGE
    for index in range(phnum):
        sort, flags, offset, address, _, file_size, memory_size, align = struct.unpack_from(
            "<IIQQQQQQ", head, phoff + 56 * index
        )
        if sort == PT_LOAD:
            if (
                memory_size < file_size
                or (address - offset) & (PAGE - 1)
                or address + memory_size > 1 << 47
                or offset + file_size > size
            ):
                raise BadExecutable("bad PT_LOAD")
            prot = (flags >> 2 & 1) | (flags & 2) | (flags << 2 & 4)
            if memory_size:
                segments.append(Segment(address, memory_size, offset, file_size, prot))
            if align > alignment and not align & (align - 1):
                alignment = align
            if offset <= phoff < offset + file_size:
                header_address = header_address or address + phoff - offset
        elif sort == PT_INTERP:
            if offset + file_size > len(head) or not 1 < file_size <= PAGE:
                raise BadExecutable("bad PT_INTERP")
            interpreter = head[offset : offset + file_size].rstrip(b"\0")
        elif sort == PT_PHDR:
            header_address = address
    if not segments:
        raise BadExecutable("nothing to load")
    segments.sort()
    for index in range(1, len(segments)):
        before = segments[index - 1]
        if before.address + before.memory_size > segments[index].address:
            raise BadExecutable("PT_LOADs overlap")
    low = segments[0].address & -PAGE
    high = (segments[-1].address + segments[-1].memory_size + PAGE - 1) & -PAGE
    return Image(
        kind == ET_EXEC,
        entry,
        tuple(segments),
        interpreter,
        header_address,
        phnum,
        phentsize,
        low,
        high,
        min(alignment, 1 << 30),
    )


def _script(head: bytes) -> Script:
    """Interpreter and its one argument, as Linux takes them from the first 256 bytes."""
    line = head[2:256]
    end = line.find(b"\n")
    if end < 0:
        if len(head) >= 256 and b" " not in line.strip(b" \t") and b"\t" not in line.strip(b" \t"):
            raise BadExecutable("the interpreter's name does not fit")
        end = line.find(b"\0") if b"\0" in line else len(line)
    line = line[:end].strip(b" \t")
    if not line:
        raise BadExecutable("no interpreter after #!")
    cut = min((line.find(blank) for blank in (b" ", b"\t") if blank in line), default=len(line))
    return Script(line[:cut], line[cut:].strip(b" \t"))


def stack(
    top: int,
    argv: list[bytes],
    environ: list[bytes],
    auxiliary: list[tuple[int, int]],
    execfn: bytes,
    random: bytes,
    platform: bytes = b"x86_64",
) -> tuple[int, bytes]:
    """The initial stack that ends at `top`: its lowest address (the first %rsp) and its bytes.

    `auxiliary` lacks AT_RANDOM, AT_EXECFN, AT_PLATFORM and AT_NULL, which are added.
    """
    strings = bytearray()
    offsets = []
    for text in (*argv, *environ, execfn, platform):
        offsets.append(len(strings))
        strings += text + b"\0"
    offsets.append(len(strings))
    strings += random
    base = (top - 8 - len(strings)) & -16
    vector = [
        *auxiliary,
        (AT_EXECFN, base + offsets[-3]),
        (AT_PLATFORM, base + offsets[-2]),
        (AT_RANDOM, base + offsets[-1]),
        (0, 0),
    ]
    count = len(argv)
    words = [count]
    words += [base + offset for offset in offsets[:count]]
    words.append(0)
    words += [base + offset for offset in offsets[count : count + len(environ)]]
    words.append(0)
    for pair in vector:
        words += pair
    start = (base - 8 * len(words)) & -16
    body = struct.pack(f"<{len(words)}Q", *words)
    filling = bytes(base - start - len(body))
    return start, body + filling + bytes(strings) + bytes(top - base - len(strings))
