"""The processor a payload's thread runs on: long mode, ring 3, no interrupts, no devices.

What is in ring 0 is a page of stubs that do nothing but an `out`, which ends KVM_RUN:

    LSTAR                syscall in ring 3 ──▶ out 0 ; sysretq
    LSTAR of hosts that keep ring 3 on syscall:  out 0 ; jmp *%rcx
    vector v of the IDT  fault in ring 3 ──▶ out 16 + v   (frame on the vCPU's own stack page)

Intel SDM volume 3; AMD64 APM volume 2; linux/kvm.h and asm/kvm.h for the structures.
"""

from __future__ import annotations

import struct

# struct kvm_regs, as words of kvm_run's sync area.
RUN_REGS = 304
RUN_SREGS = RUN_REGS + 144
RAX, RBX, RCX, RDX, RSI, RDI, RSP, RBP = range(RUN_REGS // 8, RUN_REGS // 8 + 8)
R8, R9, R10, R11, R12, R13, R14, R15, RIP, RFLAGS = range(RUN_REGS // 8 + 8, RUN_REGS // 8 + 18)
REGS = slice(RAX, RFLAGS + 1)
DIRTY = 296 // 8
VALID = 288 // 8
SYNC_REGS, SYNC_SREGS = 1, 2

NAMES = (
    "rax rbx rcx rdx rsi rdi rsp rbp r8 r9 r10 r11 r12 r13 r14 r15 rip rflags".split()  # noqa: SIM905
)

# struct kvm_sregs.
SREGS_SIZE = 312
S_CS, S_DS, S_ES, S_FS, S_GS, S_SS, S_TR, S_LDT, S_GDT, S_IDT = (
    0,
    24,
    48,
    72,
    96,
    120,
    144,
    168,
    192,
    208,
)
S_CR0, S_CR2, S_CR3, S_CR4, S_CR8, S_EFER = 224, 232, 240, 248, 256, 264

KERNEL_CS, KERNEL_DS, USER_DS, USER_CS, TASK = 0x10, 0x18, 0x2B, 0x33, 0x38
GDT = (0, 0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF, 0, 0x00CFF3000000FFFF, 0x00AFFB000000FFFF)

CR0 = 0x80050033  # PG AM WP NE ET MP PE
CR4 = 0x6A0  # PAE PGE OSFXSR OSXMMEXCPT
CR4_FSGSBASE, CR4_OSXSAVE = 0x10000, 0x40000
EFER = 0xD01  # SCE LME LMA NXE

MSR_STAR, MSR_LSTAR, MSR_SFMASK = 0xC0000081, 0xC0000082, 0xC0000084
STAR = (0x23 << 48) | (KERNEL_CS << 32)
# TF, IF, DF, NT and AC are off inside the stub; sysretq brings them back from %r11.
SFMASK = 0x44700

FLAGS = 0x202  # IF and the bit that is always set
FLAGS_USER = 0x3CD5 | 0x40000 | 0x200000  # what sigreturn may set: CF PF AF ZF SF OF DF TF AC ID

# Ring 3 may use port 0 (the stub of hosts that stay there) and Kontain's hypercalls: its
# library does `out` itself.  The TSS says so by the bitmap in the two pages behind it.
PORT_SYSCALL = 0
PORT_VECTOR = 16
HYPERCALL, HYPERCALLS = 0x8000, 512
TASKS = 0xFFFFFF9000000000
TASK_STRIDE = 4 * 4096
TASK_LIMIT = 4096 + (HYPERCALL + HYPERCALLS) // 8 + 1

_OUT = 0xE7
STUB_SYSCALL = bytes((_OUT, PORT_SYSCALL, 0x48, 0x0F, 0x07))
STUB_SYSCALL_RING3 = bytes((_OUT, PORT_SYSCALL, 0xFF, 0xE1))
STUB_SIZE = 16
VECTORS = 32
ERROR_CODE = frozenset((8, 10, 11, 12, 13, 14, 17, 21, 29, 30))

DIVIDE, DEBUG, NMI, BREAKPOINT, OVERFLOW, BOUND, INVALID_OPCODE = range(7)
PROTECTION, PAGE_FAULT, X87, ALIGNMENT, SIMD = 13, 14, 16, 17, 19


def segment(base: int, selector: int, kind: int, dpl: int, *, long: bool, system: bool) -> bytes:
    """A struct kvm_segment."""
    return struct.pack(
        "<QIH10B",
        base,
        TASK_LIMIT if system else 0xFFFFFFFF,
        selector,
        kind,
        1,
        dpl,
        0 if long or system else 1,
        0 if system else 1,
        1 if long else 0,
        0 if system else 1,
        0,
        0,
        0,
    )


CODE3 = segment(0, USER_CS, 0xB, 3, long=True, system=False)
DATA3 = segment(0, USER_DS, 0x3, 3, long=False, system=False)
CODE0 = segment(0, KERNEL_CS, 0xB, 0, long=True, system=False)
DATA0 = segment(0, KERNEL_DS, 0x3, 0, long=False, system=False)


def stubs() -> bytes:
    """The page of ring 0 stubs: the syscall entry first, vector v at (v + 1) * STUB_SIZE."""
    page = bytearray(STUB_SYSCALL.ljust(STUB_SIZE, b"\xf4"))
    for vector in range(VECTORS):
        page += bytes((_OUT, PORT_VECTOR + vector)).ljust(STUB_SIZE, b"\xf4")
    return bytes(page)


def interrupt_table(stub_page: int) -> bytes:
    """The IDT: every vector enters its stub on the IST 1 stack; int3 and into from ring 3 too."""
    table = bytearray()
    for vector in range(VECTORS):
        handler = stub_page + (vector + 1) * STUB_SIZE
        attributes = 0xEE if vector in (BREAKPOINT, OVERFLOW) else 0x8E
        table += struct.pack(
            "<HHBBHII",
            handler & 0xFFFF,
            KERNEL_CS,
            1,
            attributes,
            handler >> 16 & 0xFFFF,
            handler >> 32,
            0,
        )
    return bytes(table)


def port_bitmap() -> bytes:
    """The I/O permission bitmap: a zero bit allows a port; an `out` of 32 bits asks for four."""
    bitmap = bytearray(b"\xff" * 8192)
    bitmap[0] = 0xF0
    bitmap[HYPERCALL // 8 : (HYPERCALL + HYPERCALLS) // 8] = bytes(HYPERCALLS // 8)
    bitmap[(HYPERCALL + HYPERCALLS) // 8] = 0xF0
    return bytes(bitmap)


def task_page(address: int) -> bytes:
    """A vCPU's page: TSS at 0, GDT at 0x80, the exception stack growing down from its end."""
    page = bytearray(0x80)
    struct.pack_into("<Q", page, 4, address + 4096)
    struct.pack_into("<Q", page, 36, address + 4096)
    struct.pack_into("<H", page, 102, 4096)
    low = TASK_LIMIT | (address & 0xFFFFFF) << 16 | 0x8B << 40 | (address >> 24 & 0xFF) << 56
    page += struct.pack("<9Q", *GDT, low, address >> 32)
    return bytes(page.ljust(4096, b"\0"))


def system_registers(
    before: bytes, root: int, task: int, idt: int, cr4: int, ring: int
) -> bytearray:
    """struct kvm_sregs of a fresh vCPU in ring 3 (or ring 0, see docs/builtin-monitor.md)."""
    sregs = bytearray(before)
    code, data = (CODE3, DATA3) if ring else (CODE0, DATA0)
    sregs[S_CS : S_CS + 24] = code
    for offset in (S_DS, S_ES, S_FS, S_GS, S_SS):
        sregs[offset : offset + 24] = data
    sregs[S_TR : S_TR + 24] = segment(task, TASK, 0xB, 0, long=False, system=True)
    struct.pack_into("<QH", sregs, S_GDT, task + 0x80, 9 * 8 - 1)
    struct.pack_into("<QH", sregs, S_IDT, idt, VECTORS * 16 - 1)
    struct.pack_into("<QQQQQQ", sregs, S_CR0, CR0, 0, root, cr4, 0, EFER)
    return sregs


def describe(words: memoryview) -> str:
    """The general registers, for a report."""
    return " ".join(f"{name}={word:x}" for name, word in zip(NAMES, words[REGS], strict=True))
