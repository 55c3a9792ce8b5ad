"""The built-in monitor's loader: what it makes of a file's first bytes, and the initial stack."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from krun.monitor.builtin import elf
from krun.monitor.builtin.elf import BadExecutable, Image, Script

LOAD = struct.pack("<IIQQQQQQ", 1, 5, 0, 0x400000, 0, 0x1000, 0x2000, 0x1000)


def header(kind: int = 2, machine: int = 62, count: int = 1, **changes: int) -> bytes:
    values = {"entry": 0x400100, "phoff": 64, "phentsize": 56, **changes}
    return (
        b"\x7fELF\x02\x01\x01"
        + bytes(9)
        + struct.pack(
            "<HHIQQQIHHHHHH",
            kind,
            machine,
            1,
            values["entry"],
            values["phoff"],
            0,
            0,
            64,
            values["phentsize"],
            count,
            0,
            0,
            0,
        )
    )


def test_fixed_executable() -> None:
    image = elf.parse(header() + LOAD, 1 << 20)
    assert isinstance(image, Image)
    assert image.fixed
    assert image.segments == (elf.Segment(0x400000, 0x2000, 0, 0x1000, 5),)
    assert (image.low, image.high) == (0x400000, 0x402000)
    assert image.header_address == 0x400040
    assert image.interpreter == b""


def test_position_independent_with_interpreter() -> None:
    name = b"/lib64/ld-linux-x86-64.so.2\0"
    interp = struct.pack("<IIQQQQQQ", 3, 4, 64 + 112, 0, 0, len(name), len(name), 1)
    image = elf.parse(header(kind=3, count=2) + LOAD + interp + name, 1 << 20)
    assert isinstance(image, Image)
    assert not image.fixed
    assert image.interpreter == name[:-1]


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"\x7fELF",
        b"hello" * 30,
        header(machine=40) + LOAD,
        header(kind=1) + LOAD,
        header(count=0) + LOAD,
        header(count=3) + LOAD,
        header(phentsize=32) + LOAD,
        header(count=2) + LOAD + LOAD,
        header() + struct.pack("<IIQQQQQQ", 1, 5, 0, 1 << 47, 0, 16, 16, 4096),
        header() + struct.pack("<IIQQQQQQ", 1, 5, 0, 0x400000, 0, 32, 16, 4096),
        header() + struct.pack("<IIQQQQQQ", 1, 5, 8, 0x400000, 0, 16, 16, 4096),
        header() + struct.pack("<IIQQQQQQ", 1, 5, 0, 0x400000, 0, 1 << 40, 1 << 41, 4096),
        header() + struct.pack("<IIQQQQQQ", 7, 5, 0, 0x400000, 0, 16, 16, 4096),
    ],
)
def test_no_executable(head: bytes) -> None:
    with pytest.raises(BadExecutable):
        elf.parse(head, 1 << 20)


@given(st.binary(max_size=300))
def test_any_bytes_parse_or_are_refused(tail: bytes) -> None:
    for head in (tail, b"\x7fELF\x02\x01" + tail, header() + tail, b"#!" + tail):
        try:
            found = elf.parse(head, 1 << 20)
        except BadExecutable:
            continue
        assert isinstance(found, Image | Script)


@pytest.mark.parametrize(
    ("line", "interpreter", "argument"),
    [
        (b"#!/bin/sh\n", b"/bin/sh", b""),
        (b"#! /bin/sh -e \nrest", b"/bin/sh", b"-e"),
        (b"#!\t/usr/bin/env  python3 -I\n", b"/usr/bin/env", b"python3 -I"),
        (b"#!/bin/sh", b"/bin/sh", b""),
    ],
)
def test_script_lines(line: bytes, interpreter: bytes, argument: bytes) -> None:
    assert elf.parse(line, len(line)) == Script(interpreter, argument)


def test_script_without_interpreter() -> None:
    for line in (b"#!\n", b"#!   \n", b"#!" + b"x" * 600):
        with pytest.raises(BadExecutable):
            elf.parse(line, len(line))


words = st.lists(st.binary(max_size=40).map(lambda word: word.replace(b"\0", b"0")), max_size=6)


@given(words, words)
def test_stack_holds_what_the_abi_says(argv: list[bytes], environ: list[bytes]) -> None:
    top = 0x7FFFFFC00000
    pointer, data = elf.stack(top, argv, environ, [(6, 4096)], b"/file", bytes(range(16)))
    assert pointer % 16 == 0
    assert pointer + len(data) == top

    def word(address: int) -> int:
        return int(struct.unpack_from("<Q", data, address - pointer)[0])

    def text(address: int) -> bytes:
        start = address - pointer
        return data[start : data.index(b"\0", start)]

    assert word(pointer) == len(argv)
    at = pointer + 8
    for expected in (argv, environ):
        for one in expected:
            assert text(word(at)) == one
            at += 8
        assert word(at) == 0
        at += 8
    vector = {}
    while word(at):
        vector[word(at)] = word(at + 8)
        at += 16
    assert vector[6] == 4096
    assert text(vector[elf.AT_EXECFN]) == b"/file"
    start = vector[elf.AT_RANDOM] - pointer
    assert data[start : start + 16] == bytes(range(16))
