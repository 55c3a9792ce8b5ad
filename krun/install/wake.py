"""wake: the machine code that leaves an interpreter's memory and comes back to it.

The seed (krun.install.seed) calls `rest` as a C function; the call does not return there.  In a
process that the kernel made from the seed's memory (krun.install.warm) it returns 1: execution
begins at `wake`, which finds the registers that `rest` put aside.

    rest:  keep the callee-saved registers, the stack, the thread's base, the processor's features
    wake:  the same processor?  ->  set the thread's base and id, note argc
           ->  copy the pages that every verb writes  ->  return from rest
           another one?         ->  execve(argv[1], argv + 1, envp): the plain interpreter

The C library has chosen its functions by the processor's features, and so has the file.

What follows `cold` stands in for functions of the vDSO (vdso(7)), whose address differs from
process to process: the same calls, made to the kernel.

A test assembles the listing with as(1) and compares the bytes.
"""

from __future__ import annotations

# x86_64: machine code, assembly in Intel's syntax; what it calls.
LISTING = """
                    rest:
53                  push rbx                          ; the caller's, in C's calling convention
55                  push rbp
4154                push r12
4155                push r13
4156                push r14
4157                push r15
488925ef0f0000      mov [rip+stack],rsp
b89e000000          mov eax,158                       ; arch_prctl(ARCH_GET_FS, &thread)
bf03100000          mov edi,0x1003
488d35e60f0000      lea rsi,[rip+thread]
0f05                syscall
b801000000          mov eax,1                         ; cpuid leaf 1: model and features
31c9                xor ecx,ecx
0fa2                cpuid
8905ed0f0000        mov [rip+cpu],eax
890deb0f0000        mov [rip+cpu+4],ecx
8915e90f0000        mov [rip+cpu+8],edx
b807000000          mov eax,7                         ; cpuid leaf 7: features
31c9                xor ecx,ecx
0fa2                cpuid
891dde0f0000        mov [rip+cpu+12],ebx
890ddc0f0000        mov [rip+cpu+16],ecx
8915da0f0000        mov [rip+cpu+20],edx
31c9                xor ecx,ecx                       ; XCR0: registers that the kernel saves
0f01d0              xgetbv
8905d70f0000        mov [rip+enabled],eax
c705c90f000001000000mov dword ptr [rip+ready],1
                    asleep:
b822000000          mov eax,34                        ; pause() until killed
0f05                syscall
ebf7                jmp asleep
                    wake:
4989e4              mov r12,rsp                       ; argc, argv, NULL, envp, NULL, auxv
b801000000          mov eax,1
31c9                xor ecx,ecx
0fa2                cpuid
3b05960f0000        cmp eax,[rip+cpu]
0f85b0000000        jne cold
3b0d8e0f0000        cmp ecx,[rip+cpu+4]
0f85a4000000        jne cold
3b15860f0000        cmp edx,[rip+cpu+8]
0f8598000000        jne cold
b807000000          mov eax,7
31c9                xor ecx,ecx
0fa2                cpuid
3b1d750f0000        cmp ebx,[rip+cpu+12]
0f8583000000        jne cold
3b0d6d0f0000        cmp ecx,[rip+cpu+16]
757b                jne cold
3b15690f0000        cmp edx,[rip+cpu+20]
7573                jne cold
31c9                xor ecx,ecx
0f01d0              xgetbv
3b05640f0000        cmp eax,[rip+enabled]
7566                jne cold
b89e000000          mov eax,158                       ; arch_prctl(ARCH_SET_FS, thread)
bf02100000          mov edi,0x1002
488b351d0f0000      mov rsi,[rip+thread]
0f05                syscall
b8da000000          mov eax,218                       ; set_tid_address(tid) returns the thread's id
488b3d170f0000      mov rdi,[rip+tid]
0f05                syscall
8907                mov [rdi],eax
4c8925140f0000      mov [rip+arguments],r12
488d1d350f0000      lea rbx,[rip+hot]                 ; for each: madvise(…, MADV_POPULATE_WRITE)
                    touch:
488b3b              mov rdi,[rbx]
4885ff              test rdi,rdi
7416                je touched
488b7308            mov rsi,[rbx+8]
ba17000000          mov edx,23
b81c000000          mov eax,28
0f05                syscall
4883c310            add rbx,16
ebe2                jmp touch
                    touched:
488b25d00e0000      mov rsp,[rip+stack]
415f                pop r15
415e                pop r14
415d                pop r13
415c                pop r12
5d                  pop rbp
5b                  pop rbx
b801000000          mov eax,1
c3                  ret
                    cold:
498b0c24            mov rcx,[r12]                     ; execve(argv[1], argv + 1, envp)
498d54cc10          lea rdx,[r12+rcx*8+16]
498d742410          lea rsi,[r12+16]
488b3e              mov rdi,[rsi]
b83b000000          mov eax,59
0f05                syscall
bf7f000000          mov edi,127
b8e7000000          mov eax,231                       ; exit_group(127)
0f05                syscall
                    clock_gettime:
b8e4000000          mov eax,228
0f05                syscall
c3                  ret
                    gettimeofday:
b860000000          mov eax,96
0f05                syscall
c3                  ret
                    time:
b8c9000000          mov eax,201
0f05                syscall
c3                  ret
                    getcpu:
b835010000          mov eax,309
0f05                syscall
c3                  ret
                    clock_getres:
b8e5000000          mov eax,229
0f05                syscall
c3                  ret
                    getrandom:
b83e010000          mov eax,318
0f05                syscall
c3                  ret
"""

# Where the code's variables are, in bytes from its start: on a page of their own, which is not
# executable, while that of the code is not writable.
PAGE = 4096
STACK = PAGE
THREAD = PAGE + 8
TID = PAGE + 16
ARGUMENTS = PAGE + 24
CPU = PAGE + 32
READY = PAGE + 56
ENABLED = PAGE + 60
# Pairs of address and length, the last pair zeros.
HOT = PAGE + 64
HOT_RANGES = 251
SIZE = 2 * PAGE


def columns() -> list[tuple[str, str]]:
    """Return the listing's lines: machine code in hexadecimal, assembly without remarks."""
    lines = LISTING.strip("\n").splitlines()
    return [(line[:20].strip(), line[20:].partition(";")[0].strip()) for line in lines]


def code() -> bytes:
    """Return the machine code."""
    return bytes.fromhex("".join(column for column, _ in columns()))


def labels() -> dict[str, int]:
    """Return where each label is, in bytes from the code's start."""
    found = {}
    place = 0
    for column, text in columns():
        if text.endswith(":"):
            found[text[:-1]] = place
        place += len(column) // 2
    return found
