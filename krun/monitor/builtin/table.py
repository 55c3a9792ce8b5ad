"""The system calls a payload may make: number, name, and the kind of each argument.

    v      a value                                         u    one of 32 bits
    fd     a descriptor of the payload (the monitor's own are EBADF)
    at     a directory descriptor or AT_FDCWD
    p      a path: a string of at most 4095 bytes          p?   the same, or NULL
    s      another string of at most 4095 bytes
    iN oN  a buffer the kernel reads (writes) of as many bytes as argument N says
    I# O# B#  a structure of # bytes that the kernel reads, writes, or both; with ? it may be NULL
    @M     the monitor does it itself: sys_NAME of module M

A `+` after the name says that the call returns a new descriptor.  Every pointer is checked
against the payload's areas before the host kernel sees an address, so one that leads nowhere is
EFAULT and none can lead into the monitor.  A number that is not here is ENOSYS.
"""

from __future__ import annotations

CALLS = """
0 read @transfers
1 write @transfers
2 open @files
3 close @files
4 stat p O144
5 fstat fd O144
6 lstat p O144
7 poll @polling
8 lseek fd v v
9 mmap @mappings
10 mprotect @mappings
11 munmap @mappings
12 brk @mappings
13 rt_sigaction @signalcalls
14 rt_sigprocmask @signalcalls
15 rt_sigreturn @signalcalls
16 ioctl @ioctl
17 pread64 @transfers
18 pwrite64 @transfers
19 readv @transfers
20 writev @transfers
21 access p v
22 pipe O8
23 select @polling
24 sched_yield
25 mremap @mappings
26 msync @mappings
27 mincore @mappings
28 madvise @mappings
29 shmget v v v
30 shmat @ipc
31 shmctl @ipc
32 dup+ fd
33 dup2 @files
34 pause @signalcalls
35 nanosleep @sleep
36 getitimer v O32
37 alarm v
38 setitimer v I32? O32?
39 getpid
40 sendfile fd fd B8? v
41 socket+ v v v
42 connect @sockets
43 accept @sockets
44 sendto @sockets
45 recvfrom @sockets
46 sendmsg @sockets
47 recvmsg @sockets
48 shutdown fd v
49 bind fd i2 u
50 listen fd v
51 getsockname @sockets
52 getpeername @sockets
53 socketpair v v v O8
54 setsockopt @sockets
55 getsockopt @sockets
56 clone @clone
57 fork @clone
58 vfork @clone
59 execve @execute
60 exit @clone
61 wait4 @children
62 kill @signalcalls
63 uname @attributes
64 semget v v v
65 semop @ipc
66 semctl @ipc
67 shmdt @ipc
68 msgget v v
69 msgsnd @ipc
70 msgrcv @ipc
71 msgctl @ipc
72 fcntl @files
73 flock @files
74 fsync fd
75 fdatasync fd
76 truncate p v
77 ftruncate fd v
78 getdents fd o2 u
79 getcwd o1 v
80 chdir p
81 fchdir fd
82 rename p p
83 mkdir p v
84 rmdir p
85 creat @files
86 link p p
87 unlink p
88 symlink p p
89 readlink @files
90 chmod p v
91 fchmod fd v
92 chown p v v
93 fchown fd v v
94 lchown p v v
95 umask v
96 gettimeofday O16? O8?
97 getrlimit @limits
98 getrusage v O144
99 sysinfo O112
100 times O32?
102 getuid
104 getgid
105 setuid v
106 setgid v
107 geteuid
108 getegid
109 setpgid v v
110 getppid
111 getpgrp
112 setsid
113 setreuid v v
114 setregid v v
115 getgroups @attributes
116 setgroups @attributes
117 setresuid v v v
118 getresuid O4 O4 O4
119 setresgid v v v
120 getresgid O4 O4 O4
121 getpgid v
122 setfsuid v
123 setfsgid v
124 getsid v
125 capget @attributes
126 capset @attributes
127 rt_sigpending @signalcalls
128 rt_sigtimedwait @signalcalls
129 rt_sigqueueinfo @signalcalls
130 rt_sigsuspend @signalcalls
131 sigaltstack @signalcalls
132 utime p I16?
133 mknod p v v
135 personality @attributes
137 statfs p O120
138 fstatfs fd O120
140 getpriority v v
141 setpriority v v v
142 sched_setparam v I4?
143 sched_getparam v O4?
144 sched_setscheduler v v I4?
145 sched_getscheduler v
146 sched_get_priority_max v
147 sched_get_priority_min v
148 sched_rr_get_interval v O16
149 mlock @mappings
150 munlock @mappings
151 mlockall @mappings
152 munlockall @mappings
157 prctl @attributes
158 arch_prctl @attributes
160 setrlimit @limits
161 chroot p
162 sync
186 gettid
187 readahead fd v v
188 setxattr p s i3 v v
189 lsetxattr p s i3 v v
190 fsetxattr fd s i3 v v
191 getxattr p s o3 v
192 lgetxattr p s o3 v
193 fgetxattr fd s o3 v
194 listxattr p o2 v
195 llistxattr p o2 v
196 flistxattr fd o2 v
197 removexattr p s
198 lremovexattr p s
199 fremovexattr fd s
200 tkill @signalcalls
201 time O8?
202 futex @futex
203 sched_setaffinity v u i1
204 sched_getaffinity @attributes
213 epoll_create+ v
217 getdents64 @files
218 set_tid_address @clone
219 restart_syscall @signalcalls
220 semtimedop @ipc
221 fadvise64 fd v v v
222 timer_create v I64? O4
223 timer_settime v v I32 O32?
224 timer_gettime v O32
225 timer_getoverrun v
226 timer_delete v
228 clock_gettime v O16
229 clock_getres v O16?
230 clock_nanosleep @sleep
231 exit_group @clone
232 epoll_wait @polling
233 epoll_ctl @polling
234 tgkill @signalcalls
235 utimes p I32?
247 waitid @children
253 inotify_init+
254 inotify_add_watch fd p v
255 inotify_rm_watch fd v
257 openat @files
258 mkdirat at p v
259 mknodat at p v v
260 fchownat at p v v v
261 futimesat at p? I32?
262 newfstatat at p? O144 v
263 unlinkat at p v
264 renameat at p at p
265 linkat at p at p v
266 symlinkat p at p
267 readlinkat @files
268 fchmodat at p v
269 faccessat at p v
270 pselect6 @polling
271 ppoll @polling
273 set_robust_list @clone
274 get_robust_list @clone
275 splice fd B8? fd B8? v v
276 tee fd fd v v
277 sync_file_range fd v v v
280 utimensat at p? I32? v
281 epoll_pwait @polling
282 signalfd @signalcalls
283 timerfd_create+ v v
284 eventfd+ v
285 fallocate fd v v v
286 timerfd_settime fd v I32 O32?
287 timerfd_gettime fd O32
288 accept4 @sockets
289 signalfd4 @signalcalls
290 eventfd2+ v v
291 epoll_create1+ v
292 dup3 @files
293 pipe2 O8 v
294 inotify_init1+ v
295 preadv @transfers
296 pwritev @transfers
297 rt_tgsigqueueinfo @signalcalls
302 prlimit64 @limits
306 syncfs fd
307 sendmmsg @sockets
299 recvmmsg @sockets
309 getcpu @attributes
316 renameat2 at p at p v
318 getrandom o1 v v
319 memfd_create+ s v
322 execveat @execute
324 membarrier v v v
325 mlock2 @mappings
326 copy_file_range fd B8? fd B8? v v
327 preadv2 @transfers
328 pwritev2 @transfers
332 statx at p? v v O256
334 rseq @attributes
424 pidfd_send_signal @signalcalls
434 pidfd_open+ v v
435 clone3 @clone
436 close_range @files
437 openat2 @files
439 faccessat2 at p v v
441 epoll_pwait2 @polling
452 fchmodat2 at p v v
"""

# What the monitor itself needs from its host besides the calls above that it passes on:
# KVM, guest memory, its threads, interruptible waits, Python's interpreter.
MONITOR = """
read write close fstat lseek mmap mprotect munmap brk rt_sigaction rt_sigprocmask rt_sigreturn
ioctl pread64 preadv readv writev mremap madvise msync mincore dup dup2 dup3 fcntl
getpid gettid kill tgkill clone clone3 fork vfork wait4 waitid exit exit_group
futex sched_yield set_robust_list rseq set_tid_address getrandom sigaltstack
rt_sigtimedwait rt_sigpending signalfd4 ppoll poll epoll_wait prlimit64 prctl uname sysinfo
open openat openat2 readlink readlinkat newfstatat statx access faccessat faccessat2 fstatfs
getdents64 memfd_create pidfd_open process_vm_readv process_vm_writev clock_gettime
clock_nanosleep nanosleep getresuid getresgid setgroups setresuid setresgid close_range pipe2
pselect6 select getcwd arch_prctl capget capset
"""

NAMES: dict[int, str] = {}
KINDS: dict[int, tuple[str, ...]] = {}
NEW_DESCRIPTOR: set[int] = set()


def load() -> None:
    """Read the table's text, once, when it is first needed."""
    if NAMES:
        return
    for line in CALLS.split("\n")[1:-1]:
        number, name, *kinds = line.split(" ")
        if name.endswith("+"):
            name = name[:-1]
            NEW_DESCRIPTOR.add(int(number))
        NAMES[int(number)] = name
        KINDS[int(number)] = tuple(kinds)


def seccomp_names() -> list[str]:
    """Names of the system calls the monitor process may make: the table's and its own."""
    load()
    return sorted({*NAMES.values(), *MONITOR.split()} - {"restart_syscall"})
