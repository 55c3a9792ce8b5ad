"""hold: the 600-byte program that stands between krun and the payload's execve.

The last step into a container is not made by the Python process.  It execs this program from a
sealed memory file, and the program does the rest:

    [clone, setsid, TIOCSCTTY]  ->  wait for one byte on `go`  ->  execve(argv[0], argv + 1, envp)

Why not call execve from Python:
 - execve of a path inside a hostile root may come back to /proc/self/exe (a symbolic link, or an
   interpreter line).  What is found there is this sealed file, never the host's python3
   (CVE-2019-5736).
 - `exec` joins a running container: a process visible in its pid namespace could be traced by
   what runs there.  Python stays outside the pid namespace; with `fork` set, only this program's
   child, whose credentials are the payload's already, is ever born inside.
 - a created container waits for `start` as one page of code instead of an interpreter.

An interpreter line that names /proc/self/exe leads back here; the second time there is no
descriptor `report` (it closed on exec), and the program ends with 126.

The program is written out below as machine code with its assembly beside it; a test assembles
the listing with as(1) and compares the bytes.
"""

from __future__ import annotations

import os

from krun.linux.flags import AT_EMPTY_PATH, MACHINE, SYS_execveat
from krun.linux.libc import pointers, syscall

# x86_64: machine code, assembly in Intel's syntax; what it calls.
LISTING = """
488b0424          mov rax,[rsp]                 ; argc
4c8d6c2408        lea r13,[rsp+8]               ; argv
4c8d74c410        lea r14,[rsp+rax*8+16]        ; envp
448b25e7000000    mov r12d,[rip+report]
8b1ddd000000      mov ebx,[rip+go]
b848000000        mov eax,72                    ; fcntl(report, F_SETFD, FD_CLOEXEC)
4489e7            mov edi,r12d
be02000000        mov esi,2
ba01000000        mov edx,1
0f05              syscall
bf7e000000        mov edi,126
85c0              test eax,eax                  ; a script led back here
0f859e000000      jne quit
833dbd00000000    cmp dword ptr [rip+fork],0
7443              je hold
b838000000        mov eax,56                    ; clone(CLONE_PARENT | SIGCHLD)
bf11800000        mov edi,0x8011
31f6              xor esi,esi
31d2              xor edx,edx
4531d2            xor r10d,r10d
4531c0            xor r8d,r8d
0f05              syscall
85c0              test eax,eax
7409              je born
e87d000000        call tell                     ; the parent reports the pid and ends
31ff              xor edi,edi
eb72              jmp quit
                  born:
b870000000        mov eax,112                   ; setsid()
0f05              syscall
833d8e00000000    cmp dword ptr [rip+terminal],0
7410              je hold
b810000000        mov eax,16                    ; ioctl(0, TIOCSCTTY, 0)
31ff              xor edi,edi
be0e540000        mov esi,0x540e
31d2              xor edx,edx
0f05              syscall
                  hold:
85db              test ebx,ebx
7832              js exec
b848000000        mov eax,72                    ; fcntl(go, F_SETFD, FD_CLOEXEC)
89df              mov edi,ebx
be02000000        mov esi,2
ba01000000        mov edx,1
0f05              syscall
                  again:
31c0              xor eax,eax                   ; read(go, below the stack, 1)
89df              mov edi,ebx
488d7424f8        lea rsi,[rsp-8]
ba01000000        mov edx,1
0f05              syscall
83f8fc            cmp eax,-4                    ; EINTR
74eb              je again
bf01000000        mov edi,1
83f801            cmp eax,1
751c              jne quit                      ; nobody is left to give the word
                  exec:
b83b000000        mov eax,59                    ; execve(argv[0], argv + 1, envp)
498b7d00          mov rdi,[r13]
498d7508          lea rsi,[r13+8]
4c89f2            mov rdx,r14
0f05              syscall
e80c000000        call tell
bf7f000000        mov edi,127
                  quit:
b8e7000000        mov eax,231                   ; exit_group(edi)
0f05              syscall
                  tell:
50                push rax                      ; write(report, eax, 4)
b801000000        mov eax,1
4489e7            mov edi,r12d
4889e6            mov rsi,rsp
ba04000000        mov edx,4
0f05              syscall
58                pop rax
c3                ret
6690              .balign 4
"""

# The first column of the listing; the four words behind it are go, report, fork and terminal.
_CODE = bytes.fromhex(
    "488b04244c8d6c24084c8d74c410448b25e70000008b1ddd000000b8480000004489e7be02000000"
    "ba010000000f05bf7e00000085c00f859e000000833dbd000000007443b838000000bf1180000031"
    "f631d24531d24531c00f0585c07409e87d00000031ffeb72b8700000000f05833d8e000000007410"
    "b81000000031ffbe0e54000031d20f0585db7832b84800000089dfbe02000000ba010000000f0531"
    "c089df488d7424f8ba010000000f0583f8fc74ebbf0100000083f801751cb83b000000498b7d0049"
    "8d75084c89f20f05e80c000000bf7f000000b8e70000000f0550b8010000004489e74889e6ba0400"
    "00000f0558c36690"
)

SUPPORTED = MACHINE == "x86_64"

_BASE = 0x400000
_HEADERS = 64 + 56

MFD_CLOEXEC = 1
MFD_ALLOW_SEALING = 2
MFD_EXEC = 0x10
F_ADD_SEALS = 1033
F_SEAL_ALL = 0xF


def image(go: int, report: int, fork: bool = False, terminal: bool = False) -> bytes:
    """Return the program as an ELF file (elf(5)).

    It waits on the descriptor go, or not at all when that is -1; it tells the descriptor report
    the child's pid (with fork) and a failed execve's negative errno, as 32-bit integers.  With
    fork the child leads a session, and with terminal its standard input is that one's terminal.
    """
    words = (go, report, int(fork), int(terminal))
    body = _CODE + b"".join(n.to_bytes(4, "little", signed=True) for n in words)
    size = _HEADERS + len(body)
    header = (
        b"\x7fELF\x02\x01\x01"
        + bytes(9)
        # ET_EXEC, EM_X86_64, version, entry, program headers, no sections, flags
        + (2).to_bytes(2, "little")
        + (62).to_bytes(2, "little")
        + (1).to_bytes(4, "little")
        + (_BASE + _HEADERS).to_bytes(8, "little")
        + (64).to_bytes(8, "little")
        + bytes(8 + 4)
        + (64).to_bytes(2, "little")
        + (56).to_bytes(2, "little")
        + (1).to_bytes(2, "little")
        + bytes(6)
    )
    load = (
        # PT_LOAD, read and execute
        (1).to_bytes(4, "little")
        + (5).to_bytes(4, "little")
        + bytes(8)
        + _BASE.to_bytes(8, "little") * 2
        + size.to_bytes(8, "little") * 2
        + (4096).to_bytes(8, "little")
    )
    return header + load + body


def memory_file(program: bytes) -> int:
    """Return a descriptor of a sealed, executable memory file with these contents."""
    try:
        fd = os.memfd_create("krun", MFD_CLOEXEC | MFD_ALLOW_SEALING | MFD_EXEC)
    except OSError:
        # Linux before 6.3 does not know MFD_EXEC, its memory files are executable.
        fd = os.memfd_create("krun", MFD_CLOEXEC | MFD_ALLOW_SEALING)
    os.write(fd, program)
    import fcntl

    fcntl.fcntl(fd, F_ADD_SEALS, F_SEAL_ALL)
    return fd


def execute(fd: int, path: str, args: list[bytes], environ: list[bytes]) -> None:
    """Become the program of the descriptor fd, which execs path with args; raises OSError."""
    argv = pointers([os.fsencode(path), *args])
    syscall(SYS_execveat, fd, b"", argv, pointers(environ), AT_EMPTY_PATH, path=path)
