"""Executable files: opening a program or what its `#!` line names, and loading it into a new VM."""

from __future__ import annotations

import os

from krun.monitor.builtin import cpu, elf, hostcall
from krun.monitor.builtin.areas import PAGE, OutOfMemory
from krun.monitor.builtin.elf import BadExecutable, Image, Script
from krun.monitor.builtin.hostcall import MAP_ANONYMOUS, MAP_FIXED, MAP_PRIVATE
from krun.monitor.builtin.kvm import Machine, Processor
from krun.monitor.builtin.memory import STACK_TOP, Memory
from krun.monitor.builtin.space import MMAP_MIN, MMAP_TOP

TYPE_CHECKING = False
if TYPE_CHECKING:
    from krun.monitor.builtin.process import Process

STACK_SIZE = 8 << 20
ELOOP, EACCES = 40, 13


class Program:
    """A file that was opened, read and found executable."""

    def __init__(self, path: bytes, fd: int, image: Image) -> None:
        self.path = path
        self.fd = fd
        self.image = image


def open_program(path: bytes, argv: list[bytes]) -> tuple[Program, Program | None, list[bytes]]:
    """The program at path, its interpreter, and the arguments that a script's line makes of argv.

    Raises OSError or BadExecutable, as execve(2) would fail.
    """
    for _ in range(5):
        fd, head, size = _open_executable(path)
        try:
            found = elf.parse(head, size)
        except BadExecutable:
            os.close(fd)
            raise
        if isinstance(found, Script):
            os.close(fd)
            extra = [found.argument] if found.argument else []
            argv = [found.interpreter, *extra, path, *argv[1:]]
            path = found.interpreter
            continue
        program = Program(path, fd, found)
        if not found.interpreter:
            return program, None, argv
        try:
            fd, head, size = _open_executable(found.interpreter)
            inner = elf.parse(head, size)
            if isinstance(inner, Script) or inner.interpreter:
                os.close(fd)
                raise BadExecutable("its interpreter is no plain ELF file")
        except OSError:
            os.close(program.fd)
            raise
        return program, Program(found.interpreter, fd, inner), argv
    raise OSError(ELOOP, os.strerror(ELOOP), os.fsdecode(path))


def _open_executable(path: bytes) -> tuple[int, bytes, int]:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        status = os.fstat(fd)
        if status.st_mode & 0o170000 != 0o100000:
            raise OSError(EACCES, os.strerror(EACCES), os.fsdecode(path))
        if not os.access(path, os.X_OK, effective_ids=True):
            raise OSError(EACCES, os.strerror(EACCES), os.fsdecode(path))
        return fd, os.pread(fd, PAGE, 0), status.st_size
    except BaseException:
        os.close(fd)
        raise


def load(
    process: Process,
    program: Program,
    interpreter: Program | None,
    argv: list[bytes],
    environ: list[bytes],
    name: bytes,
) -> tuple[Processor, list[int]]:
    """Build a new VM with the program in it: its processor, the first registers.

    Raises OutOfMemory, OSError.
    """
    machine = Machine(process.device, process.floor, process.settings.ring)
    machine.create()
    limit = process.settings.memory or default_memory()
    limit = min(limit, machine.physical - (1 << 32))
    memory = Memory(limit, machine.register, process.flushed)
    machine.furnish(memory)
    process.machine, process.memory = machine, memory
    process.gs_pages = 0
    process.gs_free.clear()
    base = _map_image(memory, program, 0 if program.image.fixed else _random_base())
    image = program.image
    entry = base + image.entry
    interpreter_base = 0
    if interpreter is not None:
        size = interpreter.image.high - interpreter.image.low
        interpreter_base = _map_image(memory, interpreter, memory.gap(size))
        entry = interpreter_base + interpreter.image.entry
    memory.brk_start = memory.brk_end = base + image.high
    stack_area = memory.map(
        STACK_TOP - STACK_SIZE,
        STACK_SIZE,
        3,
        MAP_PRIVATE | MAP_FIXED | MAP_ANONYMOUS,
        name="[stack]",
    )
    if stack_area < 0:
        raise OutOfMemory
    processor, clock = _first_processor(process)
    ids = os.getresuid(), os.getresgid()
    auxiliary = [
        (elf.AT_HWCAP, machine.hwcap),
        (elf.AT_PAGESZ, PAGE),
        (elf.AT_CLKTCK, 100),
        (elf.AT_PHDR, base + image.header_address),
        (elf.AT_PHENT, image.header_size),
        (elf.AT_PHNUM, image.header_count),
        (elf.AT_BASE, interpreter_base),
        (elf.AT_FLAGS, 0),
        (elf.AT_ENTRY, base + image.entry),
        (elf.AT_UID, ids[0][0]),
        (elf.AT_EUID, ids[0][1]),
        (elf.AT_GID, ids[1][0]),
        (elf.AT_EGID, ids[1][1]),
        (elf.AT_SECURE, 0),
        (elf.AT_HWCAP2, machine.hwcap2),
        (elf.AT_MINSIGSTKSZ, 1024 + machine.xsave_size),
    ]
    if clock:
        auxiliary.append((elf.AT_SYSINFO_EHDR, clock))
    pointer, data = elf.stack(STACK_TOP - 16, argv, environ, auxiliary, name, os.urandom(16))
    if len(data) > STACK_SIZE // 4:
        raise OSError(7, os.strerror(7), os.fsdecode(name))
    memory.write(pointer, data)
    process.path = _canonical(program.path)
    process.arguments, process.environment, process.auxiliary = argv, environ, auxiliary
    os.close(program.fd)
    if interpreter is not None:
        os.close(interpreter.fd)
    regs = [0] * 18
    regs[6], regs[16], regs[17] = pointer, entry, cpu.FLAGS
    title = bytearray(os.path.basename(name)[:15] + b"\0")
    hostcall.call(157, 15, hostcall.address_of(title))
    return processor, regs


def _first_processor(process: Process) -> tuple[Processor, int]:
    """A processor, and where the vDSO is, 0 where the host has none that works in a guest."""
    machine, memory = process.machine, process.memory
    processor = Processor(machine, memory)
    if process.vdso is None:
        return processor, 0
    try:
        address = process.vdso.show(memory)
        if process.vdso.usable(memory, processor, address):
            return processor, address
    except OutOfMemory:
        pass
    process.vdso = None
    # The failed try left it in an unknown state.
    processor.close()
    return Processor(machine, memory), 0


def _map_image(memory: Memory, program: Program, base: int) -> int:
    """Map a program's segments; the difference between its addresses and where they are."""
    image = program.image
    if image.fixed:
        base = 0
        if image.low < MMAP_MIN or image.high > MMAP_TOP:
            raise BadExecutable("its addresses are outside of user space")
    else:
        base = ((base + image.alignment - 1) & -image.alignment) - image.low
    for segment in image.segments:
        start = (base + segment.address) & -PAGE
        end = (base + segment.address + segment.memory_size + PAGE - 1) & -PAGE
        file_end = base + segment.address + segment.file_size
        name = os.fsdecode(program.path)
        flags = MAP_PRIVATE | MAP_FIXED
        if segment.file_size > 4 << 20 and not segment.prot & 2:
            size = (file_end - start + PAGE - 1) & -PAGE
            offset = segment.offset & -PAGE
            result = memory.map(start, size, segment.prot, flags, program.fd, offset, name)
            if result >= 0 and end > start + size:
                result = memory.map(
                    start + size, end - start - size, segment.prot, flags | MAP_ANONYMOUS
                )
        else:
            result = memory.map(start, end - start, segment.prot, flags | MAP_ANONYMOUS, name=name)
            area = memory.find(start)
            if result >= 0 and area is not None and area.slot is not None:
                place = area.slot_offset + base + segment.address - area.start
                view = area.slot.view[place : place + segment.file_size]
                done = 0
                while done < segment.file_size:
                    count = os.preadv(program.fd, [view[done:]], segment.offset + done)
                    if not count:
                        break
                    done += count
        if result < 0:
            raise OutOfMemory
    return base


def default_memory() -> int:
    """Guest-physical bytes without a setting: lazily populated, so room, not use."""
    pages: int = os.sysconf("SC_PHYS_PAGES")
    return max(4 * pages * PAGE, 64 << 30)


def _random_base() -> int:
    return 0x555555554000 + (int.from_bytes(os.urandom(3), "little") << 12)


def _canonical(path: bytes) -> bytes:
    try:
        return os.path.realpath(path)
    except OSError:
        return path
