/*
 * What a payload without libc needs: system calls, a start that finds its vectors, text out,
 * threads on clone(2).  General registers only, so it runs on every KVM host.
 */
#ifndef SUPPORT_H
#define SUPPORT_H

typedef unsigned long u64;
typedef unsigned int u32;
typedef unsigned char u8;

static inline long call6(long n, long a, long b, long c, long d, long e, long f)
{
  long result;
  register long r10 __asm__("r10") = d;
  register long r8 __asm__("r8") = e;
  register long r9 __asm__("r9") = f;
  __asm__ volatile("syscall"
                   : "=a"(result)
                   : "a"(n), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
                   : "rcx", "r11", "memory");
  return result;
}
#define CALL_(n, a, b, c, d, e, f, ...) \
  call6((long)(n), (long)(a), (long)(b), (long)(c), (long)(d), (long)(e), (long)(f))
#define CALL(...) CALL_(__VA_ARGS__, 0, 0, 0, 0, 0, 0, 0)

enum {
  READ, WRITE, OPEN, CLOSE, STAT, FSTAT, LSTAT, POLL, LSEEK, MMAP, MPROTECT, MUNMAP, BRK,
  SIGACTION, SIGPROCMASK, SIGRETURN, IOCTL, PREAD, PWRITE, READV, WRITEV, ACCESS, PIPE, SELECT,
  YIELD, MREMAP, MSYNC, MADVISE = 28, DUP = 32, DUP2, PAUSE, NANOSLEEP, ALARM = 37, SETITIMER,
  GETPID, SOCKET = 41, CONNECT, ACCEPT, SENDTO, RECVFROM, SENDMSG, RECVMSG, BIND = 49, LISTEN,
  GETSOCKNAME, SOCKETPAIR = 53, SETSOCKOPT, CLONE = 56, FORK, VFORK, EXECVE, EXIT, WAIT4, KILL,
  UNAME, FCNTL = 72, FTRUNCATE = 77, GETCWD = 79, UNLINK = 87, READLINK = 89, GETTID = 186,
  SIGSUSPEND = 130, SIGALTSTACK, MLOCK = 149, PRCTL = 157, ARCH_PRCTL, FUTEX = 202, GETDENTS64 = 217,
  CLOCK_GETTIME = 228, EXIT_GROUP = 231, EPOLL_WAIT, EPOLL_CTL, TGKILL, OPENAT = 257,
  EPOLL_CREATE1 = 291, PIPE2 = 293, SIGTIMEDWAIT = 128, EVENTFD2 = 290, MEMFD_CREATE = 319,
  GETRANDOM = 318
};

static inline u64 length(const char *text)
{
  u64 n = 0;
  while (text[n]) n++;
  return n;
}

static inline int same(const char *a, const char *b)
{
  while (*a && *a == *b) a++, b++;
  return *a == *b;
}

static inline void text(const char *t)
{
  CALL(WRITE, 1, t, length(t));
}

static inline void number(long value)
{
  char digits[24];
  int at = 24;
  u64 rest = value < 0 ? -(u64)value : (u64)value;
  do digits[--at] = '0' + rest % 10; while (rest /= 10);
  if (value < 0) digits[--at] = '-';
  CALL(WRITE, 1, digits + at, 24 - at);
}

static inline void hex(u64 value)
{
  char digits[16];
  int at = 16;
  do digits[--at] = "0123456789abcdef"[value & 15]; while (value >>= 4);
  CALL(WRITE, 1, digits + at, 16 - at);
}

static inline void say(const char *name, long value)
{
  text(name);
  text(" ");
  number(value);
  text("\n");
}

static inline long parse(const char *t)
{
  long value = 0;
  while (*t >= '0' && *t <= '9') value = value * 10 + *t++ - '0';
  return value;
}

static inline __attribute__((noreturn)) void leave(int status)
{
  for (;;) CALL(EXIT_GROUP, status);
}

/* Signals. */

struct action {
  void *handler;
  u64 flags;
  void *restorer;
  u64 mask;
};

void restore(void);
__asm__("restore: mov $15, %eax\n syscall\n hlt\n");

static inline long on_signal(int signal, void *handler, u64 flags, u64 mask)
{
  struct action a = {handler, flags | 0x04000000, restore, mask};
  return CALL(SIGACTION, signal, &a, 0, 8);
}

/* Threads: start(argument) on a stack of its own; the word at `gone` becomes 0 at its end. */

long spawn(u64 flags, void *stack, void *gone, void (*start)(void *), void *argument, void *tls);
__asm__("spawn:\n"
        " push %r12\n push %r13\n"
        " mov %rcx, %r12\n mov %r8, %r13\n" /* start, argument */
        " mov %r9, %r8\n"                   /* tls */
        " mov %rdx, %r10\n"                 /* child tid */
        " mov $56, %eax\n syscall\n"
        " test %rax, %rax\n jz 1f\n"
        " pop %r13\n pop %r12\n ret\n"
        "1: xor %ebp, %ebp\n mov %r13, %rdi\n call *%r12\n"
        " xor %edi, %edi\n mov $60, %eax\n syscall\n hlt\n");

#define THREAD_FLAGS 0x250f00L /* VM FS FILES SIGHAND THREAD SYSVSEM CHILD_CLEARTID */

static inline long thread(void (*start)(void *), void *argument, void *stack_end, volatile u32 *gone)
{
  *gone = 1;
  return spawn(THREAD_FLAGS, stack_end, (void *)gone, start, argument, 0);
}

static inline void join(volatile u32 *gone)
{
  while (*gone) CALL(FUTEX, gone, 0, 1, 0);
}

void *memset(void *p, int c, u64 n)
{
  u8 *b = p;
  while (n--) *b++ = c;
  return p;
}

void *memcpy(void *to, const void *from, u64 n)
{
  u8 *a = to;
  const u8 *b = from;
  while (n--) *a++ = *b++;
  return to;
}

int payload(int argc, char **argv, char **envp);

__attribute__((used)) void enter(u64 *stack)
{
  int argc = stack[0];
  char **argv = (char **)(stack + 1);
  leave(payload(argc, argv, argv + argc + 1));
}

__asm__(".globl _start\n_start: xor %ebp, %ebp\n mov %rsp, %rdi\n and $-16, %rsp\n call enter\n");

#endif
