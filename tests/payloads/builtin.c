/*
 * What the built-in monitor must do, one word a case.  Most cases print what also a native run of
 * the same file prints: the tests compare the two.
 */
#include "support.h"

static char area[1 << 16] __attribute__((aligned(4096)));

static void *map(u64 size, int prot)
{
  return (void *)CALL(MMAP, 0, size, prot, 0x22, -1, 0);
}

/* argv, environment, auxiliary vector */

static int vectors(int argc, char **argv, char **envp)
{
  for (int i = 0; i < argc; i++) text(argv[i]), text("\n");
  for (; *envp; envp++) text(*envp), text("\n");
  u64 *aux = (u64 *)(envp + 1);
  for (; aux[0]; aux += 2) {
    if (aux[0] == 6 || aux[0] == 4 || aux[0] == 5 || aux[0] == 17 || aux[0] == 23 ||
        (aux[0] >= 11 && aux[0] <= 14))
      say("aux", aux[0]), say(" is", aux[1]);
    if (aux[0] == 9) say("entry in the image", aux[1] >= 0x400000 && aux[1] < 0x500000);
    if (aux[0] == 3) say("headers", *(u32 *)aux[1] > 0);
    if (aux[0] == 25) say("random", *(u64 *)aux[1] != *(u64 *)(aux[1] + 8));
    if (aux[0] == 33) say("vdso", *(u32 *)aux[1] == 0x464c457f);
    if (aux[0] == 31) text("execfn "), text((char *)aux[1]), text("\n");
  }
  say("aligned", ((u64)argv - 8) % 16);
  return 0;
}

/* memory */

static int memory(void)
{
  volatile char *p = map(5 << 20, 3);
  p[0] = 1, p[(5 << 20) - 1] = 2;
  say("fresh", p[4096]);
  say("unmap middle", CALL(MUNMAP, p + 4096, 4096));
  say("read only", CALL(MPROTECT, p + 8192, 4096, 1));
  say("read into it", CALL(GETRANDOM, p + 8192, 8, 0));
  say("write from it", CALL(WRITE, 1, p + 8192, 0));
  say("prot none", CALL(MPROTECT, p + 12288, 4096, 0));
  say("uname there", CALL(UNAME, p + 12288));
  say("back", CALL(MPROTECT, p + 12288, 4096, 3));
  say("hole protect", CALL(MPROTECT, p + 4096, 4096, 3));
  p[12288] = 7;
  say("kept", p[12288]);
  char *q = (char *)CALL(MREMAP, p + (2 << 20), 1 << 20, 3 << 20, 1);
  say("remap", (long)q > 0);
  q[(3 << 20) - 1] = 9;
  char *r = (char *)CALL(MMAP, q, 8192, 3, 0x32, -1, 0);
  say("fixed", r == q);
  say("zero again", r[0]);
  say("noreplace", CALL(MMAP, q, 4096, 3, 0x100022, -1, 0));
  char *b = (char *)CALL(BRK, 0);
  say("brk", CALL(BRK, b + 100000) - (long)b);
  b[99999] = 1;
  say("shrink", CALL(BRK, b) - (long)b);
  say("bad size", CALL(MMAP, 0, 0, 3, 0x22, -1, 0));
  say("bad offset", CALL(MMAP, 0, 4096, 3, 2, 0, 12));
  say("bad fd", CALL(MMAP, 0, 4096, 3, 2, 99, 0));
  int fd = CALL(MEMFD_CREATE, "m", 0);
  CALL(FTRUNCATE, fd, 4096);
  char *s = (char *)CALL(MMAP, 0, 4096, 3, 1, fd, 0);
  s[5] = 'x';
  char got = 0;
  CALL(PREAD, fd, &got, 1, 5);
  say("shared file", got);
  char *v = (char *)CALL(MMAP, 0, 4096, 3, 2, fd, 0);
  v[5] = 'y';
  say("private file", s[5]);
  CALL(WRITE, 1, v + 5, 1);
  text("\n");
  say("dontneed", CALL(MADVISE, p, 4096, 4));
  say("zero", p[0]);
  char *big = map(1L << 32, 0);
  say("reserve 4 GiB", (long)big > 0);
  say("use some", CALL(MPROTECT, big + (1L << 31), 8192, 3));
  big[1L << 31] = 3;
  say("used", big[1L << 31]);
  return 0;
}

/* signals */

static volatile int seen, code_seen;
static volatile u64 where, flags_seen;

static void handler(int signal, int *info, u64 *context)
{
  seen = signal;
  code_seen = info[2];
  where = *(u64 *)(info + 4);
  flags_seen = context[5 + 17] & 0x8d5;
}

static void skip(int signal, int *info, u64 *context)
{
  handler(signal, info, context);
  context[5 + 16] += 3; /* the faulting instructions below are 3 bytes long */
}

static u64 touch(u64 address, int write)
{
  u64 value = 0;
  if (write)
    __asm__ volatile("movq %1, (%2)" : "+r"(value) : "r"(value), "r"(address) : "memory");
  else
    __asm__ volatile("movq (%1), %0" : "=r"(value) : "r"(address) : "memory");
  return value;
}

static void fault(const char *name, u64 address, int write)
{
  seen = 0;
  touch(address, write);
  text(name);
  say(": signal", seen);
  say(" code", code_seen);
  say(" address is it", where == address);
}

/* what was allowed when a page was first used */
static void used(const char *name, char *p)
{
  p[0] = p[4096] = 1;
  CALL(MPROTECT, p, 4096, 1);
  CALL(MPROTECT, p + 4096, 4096, 0);
  text(name), fault(" read only", (u64)p, 1);
  text(name), fault(" none", (u64)p + 4096, 0);
  CALL(MPROTECT, p, 8192, 3);
  touch((u64)p, 1);
  say("kept", p[4096]);
}

static int faults(void)
{
  on_signal(11, skip, 4, 0);
  on_signal(7, skip, 4, 0);
  on_signal(8, skip, 4, 0);
  on_signal(4, skip, 4, 0);
  on_signal(5, handler, 4, 0);
  char *p = map(12288, 3);
  CALL(MPROTECT, p + 4096, 4096, 0);
  CALL(MPROTECT, p + 8192, 4096, 1);
  fault("null", 0, 0);
  fault("null write", 8, 1);
  fault("guard", (u64)p + 4096, 0);
  fault("guard write", (u64)p + 4096, 1);
  fault("read only", (u64)p + 8192, 1);
  fault("text", (u64)faults, 1);
  fault("unmapped", 0x700000000000, 0);
  used("private", map(8192, 3));
  used("shared", (char *)CALL(MMAP, 0, 8192, 3, 0x21, -1, 0));
  for (int kind = 1; kind < 3; kind++) {
    int file = CALL(MEMFD_CREATE, "u", 0);
    CALL(FTRUNCATE, file, 8192);
    used(kind == 1 ? "file" : "copy of a file", (char *)CALL(MMAP, 0, 8192, 3, kind, file, 0));
  }
  seen = 0;
  __asm__ volatile("xor %%edx, %%edx\n xor %%ecx, %%ecx\n mov $1, %%eax\n divq %%rcx" ::: "rax", "rcx", "rdx", "cc");
  say("divide: signal", seen), say(" code", code_seen);
  seen = 0;
  __asm__ volatile("ud2\n nop");
  say("undefined: signal", seen), say(" code", code_seen);
  seen = 0;
  __asm__ volatile("int3");
  say("breakpoint: signal", seen);
  seen = 0;
  __asm__ volatile("hlt\n nop\n nop");
  say("hlt: signal", seen), say(" code", code_seen);
  seen = 0;
  __asm__ volatile("out %%al, $0x70\n nop" ::: "memory");
  say("out: signal", seen);
  int fd = CALL(MEMFD_CREATE, "m", 0);
  char *s = (char *)CALL(MMAP, 0, 4096, 3, 1, fd, 0);
  seen = 0;
  touch((u64)s, 0);
  say("behind the file's end: signal", seen);
  say("the kernel says", CALL(WRITE, 1, s, 1));
  return 0;
}

static volatile u64 deep;
static void counter(int signal) { (void)signal, deep++; }

static int signals(void)
{
  on_signal(10, handler, 4, 0);
  CALL(KILL, CALL(GETPID), 10);
  say("self", seen), say("code", code_seen);
  seen = 0;
  u64 mask = 1 << 9, old = 0, none = 0;
  CALL(SIGPROCMASK, 0, &mask, &old, 8);
  say("old mask", old);
  CALL(KILL, CALL(GETPID), 10);
  say("blocked", seen);
  u64 pending = 0;
  CALL(127, &pending, 8);
  say("pending", pending);
  say("suspend", CALL(SIGSUSPEND, &none, 8));
  say("seen", seen);
  CALL(SIGPROCMASK, 3 - 1, 0, &old, 8);
  say("mask again", old);
  u64 stop = 0;
  CALL(KILL, CALL(GETPID), 10);
  say("timedwait", CALL(SIGTIMEDWAIT, &mask, 0, &stop, 8));
  struct { long s, ns; } short_time = {0, 2000000};
  say("timedwait nothing", CALL(SIGTIMEDWAIT, &mask, 0, &short_time, 8));
  CALL(SIGPROCMASK, 2, &none, 0, 8);
  /* a handler with flags kept, and an interrupted sleep */
  on_signal(14, counter, 0, 0);
  struct { long is, ius, vs, vus; } timer = {0, 0, 0, 20000};
  CALL(SETITIMER, 0, &timer, 0);
  struct { long s, ns; } time = {10, 0}, left = {0, 0};
  say("nanosleep", CALL(NANOSLEEP, &time, &left));
  say("left", left.s);
  int p[2];
  CALL(PIPE, p);
  CALL(SETITIMER, 0, &timer, 0);
  say("read", CALL(READ, p[0], area, 1));
  on_signal(14, counter, 0x10000000, 0);
  CALL(SETITIMER, 0, &timer, 0);
  if (CALL(FORK) == 0) {
    struct { long s, ns; } pause = {0, 60000000};
    CALL(NANOSLEEP, &pause, 0);
    CALL(WRITE, p[1], "r", 1);
    leave(0);
  }
  say("restarted read", CALL(READ, p[0], area, 1));
  say("alarms", deep);
  CALL(WAIT4, -1, 0, 0, 0);
  /* a loop in ring 3 alone is interrupted too */
  CALL(SETITIMER, 0, &timer, 0);
  while (deep == 3) __asm__ volatile("" ::: "memory");
  say("loop", deep);
  /* flags survive */
  u64 flags;
  __asm__ volatile("stc\n pushfq\n popq %0" : "=r"(flags));
  say("carry", flags & 1);
  on_signal(10, (void *)1, 0, 0);
  say("ignored", CALL(KILL, CALL(GETPID), 10));
  struct { void *sp; int flags; u64 size; } alt = {area, 0, 16384}, now;
  say("altstack", CALL(SIGALTSTACK, &alt, 0));
  CALL(SIGALTSTACK, 0, &now);
  say("size", now.size);
  on_signal(12, handler, 0x08000004, 0);
  CALL(KILL, CALL(GETPID), 12);
  say("on it", seen);
  on_signal(13, counter, 0, 0);
  CALL(CLOSE, p[0]);
  say("broken pipe", CALL(WRITE, p[1], "x", 1));
  say("sigpipe", deep);
  say("bad signal", CALL(KILL, CALL(GETPID), 77));
  say("kill action", CALL(SIGACTION, 9, &mask, 0, 8));
  return 0;
}

/* threads and futexes */

#define WORKERS 4
static volatile u32 gone[WORKERS], lock_word, total, ready_word;
static volatile u64 tids[WORKERS];

static void lock(void)
{
  u32 c = 0;
  if (__atomic_compare_exchange_n(&lock_word, &c, 1, 0, 5, 5)) return;
  if (c != 2) c = __atomic_exchange_n(&lock_word, 2, 5);
  while (c) {
    CALL(FUTEX, &lock_word, 128, 2, 0);
    c = __atomic_exchange_n(&lock_word, 2, 5);
  }
}

static void unlock(void)
{
  if (__atomic_fetch_sub(&lock_word, 1, 5) != 1) {
    lock_word = 0;
    CALL(FUTEX, &lock_word, 129, 1);
  }
}

static void worker(void *argument)
{
  long me = (long)argument;
  tids[me] = CALL(GETTID);
  while (!ready_word) CALL(FUTEX, &ready_word, 128, 0, 0);
  for (int i = 0; i < 200; i++) {
    lock();
    u32 t = total;
    if (i % 50 == 0) CALL(YIELD);
    total = t + 1;
    unlock();
  }
}

static int threads(void)
{
  for (long i = 0; i < WORKERS; i++) {
    char *stack = map(65536, 3);
    if (thread(worker, (void *)i, stack + 65536, &gone[i]) < 0) say("spawn failed", i);
  }
  __atomic_store_n(&ready_word, 1, 5);
  CALL(FUTEX, &ready_word, 129, 100);
  for (int i = 0; i < WORKERS; i++) join(&gone[i]);
  say("total", total);
  int distinct = 1;
  for (int i = 0; i < WORKERS; i++)
    for (int j = 0; j < i; j++) distinct &= tids[i] != tids[j];
  say("distinct", distinct);
  say("wrong value", CALL(FUTEX, &total, 128, 1, 0));
  struct { long s, ns; } brief = {0, 1000000};
  say("timeout", CALL(FUTEX, &total, 128, total, &brief));
  say("nobody", CALL(FUTEX, &total, 129, 1));
  say("bad word", CALL(FUTEX, 0x10, 128, 0, 0));
  say("odd word", CALL(FUTEX, (char *)&total + 1, 128, 0, 0));
  return 0;
}

static void ending(void *argument)
{
  (void)argument;
  CALL(EXIT_GROUP, 9);
}

static void forever(void *argument)
{
  (void)argument;
  for (;;) __asm__ volatile("pause");
}

static volatile u32 hit;
static void mark(int signal) { (void)signal; hit = CALL(GETTID); }

static void sleeper(void *argument)
{
  (void)argument;
  while (!hit) CALL(FUTEX, &hit, 128, 0, 0);
  struct { long s, ns; } brief = {0, 50000000};
  CALL(NANOSLEEP, &brief, 0);
}

/* forks, programs */

static int forks(void)
{
  volatile int mine = 1;
  int status = 0;
  text("one process\n");
  long pid = CALL(FORK);
  if (pid == 0) {
    mine = 2;
    leave(CALL(40000) == -38 ? 6 : 7);
  }
  say("waited", CALL(WAIT4, pid, &status, 0, 0) == pid);
  say("status", status);
  say("mine", mine);
  say("no child", CALL(WAIT4, -1, &status, 0, 0));
  pid = CALL(FORK);
  if (pid == 0) CALL(KILL, CALL(GETPID), 15), leave(1);
  CALL(WAIT4, pid, &status, 0, 0);
  say("killed by", status & 127);
  pid = CALL(FORK);
  if (pid == 0) touch(0, 1), leave(1);
  CALL(WAIT4, pid, &status, 0, 0);
  say("died by", status & 127);
  volatile int *common = (int *)CALL(MMAP, 0, 4096, 3, 0x21, -1, 0);
  pid = CALL(FORK);
  if (pid == 0) {
    common[0] = 5;
    CALL(FUTEX, common, 1, 1);
    leave(0);
  }
  while (!common[0]) CALL(FUTEX, common, 0, 0, 0);
  say("shared", common[0]);
  CALL(WAIT4, -1, &status, 0, 0);
  int p[2];
  CALL(PIPE, p);
  pid = CALL(VFORK);
  if (pid == 0) {
    CALL(CLOSE, p[0]);
    leave(3);
  }
  CALL(WAIT4, pid, &status, 0, 0);
  say("vforked", status >> 8);
  say("WNOHANG", CALL(WAIT4, -1, &status, 1, 0));
  return 0;
}

static int execute(char **argv, char **envp)
{
  char *words[] = {argv[0], "vectors", "second", 0};
  (void)envp;
  char *variables[] = {"A=1", 0};
  say("missing", CALL(EXECVE, "/nonexistent", words, variables));
  say("directory", CALL(EXECVE, "/", words, variables));
  say("bad pointer", CALL(EXECVE, argv[0], 8, variables));
  CALL(FCNTL, CALL(DUP, 1), 2, 1);
  CALL(EXECVE, argv[0], words, variables);
  return 1;
}

static void executing(void *argument)
{
  char **argv = argument;
  char *words[] = {argv[0], "descriptors", 0}, *variables[] = {0};
  CALL(EXECVE, argv[0], words, variables);
}

static void executing_again(void *argument)
{
  char **argv = argument;
  char *words[] = {argv[0], argv[1], argv[2] + 1, 0}, *variables[] = {0};
  CALL(EXECVE, argv[0], words, variables);
}

/* what a descriptor outside of the payload's says */

static int descriptors(void)
{
  int open = 0;
  for (int fd = 0; fd < 20000; fd++)
    if (CALL(FCNTL, fd, 1) >= 0) open++;
  say("open", open);
  return 0;
}

/* pointers: each bad one in each place */

static const u64 bad[] = {
  1, 0xfff, 0x10000 - 8, 0x7fffffffe000, 0x7ffffffff000, 0x800000000000, 0xffff800000000000,
  0xffffff8000001000, 0xffffff8000002000, 0xffffff9000000000, 0xfffffffffffffff8, 0x700000000000
};

struct place { u8 number, arguments, pointer; long other[6]; };

static const struct place places[] = {
  {READ, 3, 1, {0, 0, 16}}, {WRITE, 3, 1, {1, 0, 16}}, {OPEN, 3, 0, {0}}, {STAT, 2, 0, {0}},
  {FSTAT, 2, 1, {1}}, {POLL, 3, 0, {0, 1, 0}}, {SIGACTION, 4, 1, {10, 0, 0, 8}},
  {SIGACTION, 4, 2, {10, 0, 0, 8}}, {SIGPROCMASK, 4, 1, {0, 0, 0, 8}},
  {SIGPROCMASK, 4, 2, {0, 0, 0, 8}}, {READV, 3, 1, {0, 0, 1}}, {WRITEV, 3, 1, {1, 0, 1}},
  {ACCESS, 2, 0, {0}}, {PIPE, 1, 0, {0}}, {NANOSLEEP, 2, 0, {0}}, {UNAME, 1, 0, {0}},
  {GETCWD, 2, 0, {0, 64}}, {UNLINK, 1, 0, {0}}, {READLINK, 3, 0, {0, (long)area, 16}},
  {SIGALTSTACK, 2, 0, {0}}, {SIGALTSTACK, 2, 1, {0}}, {SELECT, 5, 1, {1}}, {SELECT, 5, 4, {0}},
  {SOCKETPAIR, 4, 3, {1, 1, 0}}, {BIND, 3, 1, {0, 0, 16}}, {EXECVE, 3, 0, {0}},
  {WAIT4, 4, 1, {-1, 0, 1}}, {96, 2, 0, {0}}, {97, 2, 1, {7}}, {98, 2, 1, {0}}, {99, 1, 0, {0}},
  {100, 1, 0, {0}}, {115, 2, 1, {64}}, {118, 3, 0, {0, (long)area, (long)area}}, {127, 2, 0, {0, 8}},
  {SIGTIMEDWAIT, 4, 0, {0, 0, (long)area, 8}}, {137, 2, 0, {0}}, {138, 2, 1, {1}},
  {143, 2, 1, {0}}, {201, 1, 0, {0}}, {FUTEX, 4, 0, {0, 128}}, {204, 3, 2, {0, 8}},
  {CLOCK_GETTIME, 2, 1, {1}}, {229, 2, 1, {1}}, {EXIT_GROUP, 0, 0, {0}}
};

static int pointers(void)
{
  for (u64 i = 0; places[i].number != EXIT_GROUP; i++) {
    const struct place *p = &places[i];
    for (u64 j = 0; j < sizeof bad / sizeof bad[0]; j++) {
      long a[6];
      for (int k = 0; k < 6; k++) a[k] = p->other[k];
      a[p->pointer] = bad[j];
      long result = CALL(p->number, a[0], a[1], a[2], a[3], a[4], a[5]);
      number(p->number), text(" "), hex(bad[j]), say("", result);
    }
  }
  return 0;
}

/* a million odd calls: nothing but the payload may suffer */

static int fuzz(long seed, long count)
{
  u64 x = seed * 2654435761u + 1;
  static const u64 values[] = {
    0, 1, 2, 3, 8, 64, 4096, (u64)-1, (u64)-100, 0x7fffffff, 0x80000000, 0xffffffff, (u64)area,
    (u64)area + 4090, (u64)faults, 0x7fffffffe000, 0xffff800000000000, 0xffffff8000001000, 0x400000
  };
  for (int s = 1; s < 32; s++) on_signal(s, s == 11 || s == 7 ? (void *)0 : (void *)1, 0, 0);
  for (long i = 0; i < count; i++) {
    long a[6];
    x ^= x << 13, x ^= x >> 7, x ^= x << 17;
    int n = x % 460;
    /* not those that end it, wait, send signals, or change what the test stands on */
    if (n == EXIT || n == EXIT_GROUP || n == PAUSE || n == KILL || n == TGKILL || n == 200 ||
        n == FORK || n == VFORK || n == CLONE || n == 435 || n == SIGRETURN || n == SIGSUSPEND ||
        n == SELECT || n == 270 || n == POLL || n == 271 || n == NANOSLEEP || n == 230 ||
        n == MUNMAP || n == MMAP || n == MPROTECT || n == MREMAP || n == MADVISE || n == BRK || n == EXECVE ||
        n == 322 || n == WAIT4 || n == 247 || n == SIGTIMEDWAIT || n == 129 || n == 297 || n == 424 ||
        n == FUTEX || n == EPOLL_WAIT || n == 281 || n == 441 || n == 37 || n == 38 || n == 222 ||
        n == 223 || (n >= 80 && n <= 95) || n == 76 || n == 77 || n == 133 || n == 161 ||
        (n >= 257 && n <= 269) || n == 316 || n == 105 || n == 106 || (n >= 113 && n <= 126) ||
        n == 160 || n == 302 || n == PRCTL || n == ARCH_PRCTL || n == 141 || n == 142 || n == 144 ||
        n == 203 || n == 109 || n == 112 || n == SIGPROCMASK || n == SIGACTION || n == 436 || n == 72 ||
        n == CLOSE || n == DUP2 || n == 292 || n == 452 || n == 280 || n == 235 || n == 132 ||
        (n >= 188 && n <= 199) || n == 162 || n == 306 || n == 74 || n == 75 || n == 73 || n == 285 ||
        n == 1 || n == 18 || n == 20 || n == 296 || n == 328 || n == 44 || n == 46 || n == 307 ||
        n == 0 || n == 17 || n == 19 || n == 295 || n == 327 || n == 2 || n == 437 || n == 16 ||
        n == ACCEPT || n == 288 || n == RECVFROM || n == RECVMSG || n == 299 || n == 78 || n == 217 ||
        n == CONNECT || n == 131 ||
        /* System V objects would wait, and stay */
        (n >= 29 && n <= 31) || (n >= 64 && n <= 71) || n == 220)
      continue;
    for (int k = 0; k < 6; k++) {
      x ^= x << 13, x ^= x >> 7, x ^= x << 17;
      a[k] = x % 5 ? (long)values[(x >> 8) % (sizeof values / sizeof values[0])] : (long)x;
    }
    long result = CALL(n, a[0], a[1], a[2], a[3], a[4], a[5]);
    if (result >= 3 && result < 4096 && CALL(FCNTL, result, 1) >= 0) CALL(CLOSE, result);
  }
  text("survived\n");
  return 0;
}

/* Kontain's own form: seven words at %gs:0, then out to port 0x8000 + N */

static long hypercall(int n, long a, long b, long c)
{
  volatile u64 block[7] = {0, a, b, c, 0, 0, 0};
  volatile u64 *p = block;
  __asm__ volatile("movq %0, %%gs:0" ::"r"(p) : "memory");
  __asm__ volatile("outl %%eax, %%dx" ::"d"(0x8000 + n), "a"(0) : "memory");
  return block[0];
}

/* a leaf that keeps data below %rsp over a system call */

static long red_zone(void)
{
  long result;
  __asm__ volatile("movq $77, -8(%%rsp)\n movq $88, -120(%%rsp)\n mov $39, %%eax\n syscall\n"
                   "movq -8(%%rsp), %0\n addq -120(%%rsp), %0"
                   : "=r"(result)::"rax", "rcx", "r11", "memory");
  return result;
}

/* an HTTP server for `count` requests on loopback, its port on standard output */

static int serve(long count)
{
  struct { short family; u8 port[2]; u8 address[4]; u64 zero; } at = {2, {0, 0}, {127, 0, 0, 1}, 0};
  u32 size = sizeof at;
  int s = CALL(SOCKET, 2, 1, 0);
  CALL(BIND, s, &at, sizeof at);
  CALL(LISTEN, s, 8);
  CALL(GETSOCKNAME, s, &at, &size);
  say("port", at.port[0] * 256 + at.port[1]);
  while (count--) {
    int c = CALL(ACCEPT, s, 0, 0);
    CALL(READ, c, area, 4096);
    const char *answer = "HTTP/1.0 200 OK\r\nContent-Length: 6\r\n\r\nhello\n";
    CALL(WRITE, c, answer, length(answer));
    CALL(CLOSE, c);
  }
  return 0;
}

static int copy(const char *from, const char *to)
{
  long in = CALL(OPEN, from, 0, 0), out = CALL(OPEN, to, 01101, 0600), n;
  if (in < 0 || out < 0) return 1;
  while ((n = CALL(READ, in, area, sizeof area)) > 0)
    if (CALL(WRITE, out, area, n) != n) return 2;
  return n ? 3 : 0;
}

static int polls(void)
{
  int p[2];
  CALL(PIPE, p);
  struct { int fd; short events, revents; } f[2] = {{p[0], 1, 0}, {p[1], 4, 0}};
  say("poll", CALL(POLL, f, 2, 0));
  say("hidden", (f[0].fd = 19990, CALL(POLL, f, 2, 0)));
  f[0].fd = p[0];
  say("wait", CALL(POLL, f, 1, 1));
  CALL(WRITE, p[1], "abc", 3);
  say("readable", CALL(POLL, f, 1, -1));
  u64 set = 1 << p[0];
  say("select", CALL(SELECT, p[0] + 1, &set, 0, 0, 0));
  int e = CALL(EPOLL_CREATE1, 0);
  struct { u32 events; u64 data; } __attribute__((packed)) event = {1, 42}, got = {0, 0};
  say("add", CALL(EPOLL_CTL, e, 1, p[0], &event));
  say("epoll", CALL(EPOLL_WAIT, e, &got, 1, -1));
  say("data", got.data);
  CALL(READ, p[0], area, 3);
  say("epoll nothing", CALL(EPOLL_WAIT, e, &got, 1, 1));
  struct { void *base; u64 size; } iov[2] = {{"ab", 2}, {"cd", 2}}, in[2] = {{area, 3}, {area + 10, 5}};
  say("writev", CALL(WRITEV, p[1], iov, 2));
  say("readv", CALL(READV, p[0], in, 2));
  say("parts", area[2] == 'c' && area[10] == 'd');
  return 0;
}

int payload(int argc, char **argv, char **envp)
{
  const char *word = argc > 1 ? argv[1] : "hello";
  if (same(word, "hello")) return text("hello\n"), 0;
  if (same(word, "exit")) leave(parse(argv[2]));
  if (same(word, "end")) for (;;) CALL(EXIT, parse(argv[2]));
  if (same(word, "vectors")) return vectors(argc, argv, envp);
  if (same(word, "memory")) return memory();
  if (same(word, "faults")) return faults();
  if (same(word, "signals")) return signals();
  if (same(word, "threads")) return threads();
  if (same(word, "forks")) return forks();
  if (same(word, "execute")) return execute(argv, envp);
  if (same(word, "descriptors")) return descriptors();
  if (same(word, "pointers")) return pointers();
  if (same(word, "polls")) return polls();
  if (same(word, "fuzz")) return fuzz(parse(argv[2]), parse(argv[3]));
  if (same(word, "copy")) return copy(argv[2], argv[3]);
  if (same(word, "serve")) return serve(parse(argv[2]));
  if (same(word, "red zone")) return say("kept", red_zone()), 0;
  if (same(word, "touch")) return touch(parse(argv[2]), 1), 0;
  if (same(word, "raise")) return CALL(KILL, CALL(GETPID), parse(argv[2])), 0;
  if (same(word, "spin")) for (text("spinning\n");;) __asm__ volatile("pause");
  if (same(word, "wait")) for (text("waiting\n");;) CALL(PAUSE);
  if (same(word, "calls")) {
    for (long i = parse(argv[2]); i; i--) CALL(GETPID);
    return 0;
  }
  if (same(word, "use")) {
    u64 size = parse(argv[2]) << 20;
    char *p = map(size, 3);
    if ((long)p < 0) return say("mmap", (long)p), 1;
    for (u64 i = 0; i < size; i += 4096) p[i] = 1;
    return say("used", size >> 20), 0;
  }
  if (same(word, "hypercall")) {
    say("written", hypercall(WRITE, 1, (long)"by port\n", 8));
    say("unknown", hypercall(500, 0, 0, 0));
    leave(hypercall(EXIT_GROUP, 4, 0, 0));
  }
  if (same(word, "end by thread")) {
    thread(ending, 0, (char *)map(65536, 3) + 65536, &gone[0]);
    for (;;) CALL(PAUSE);
  }
  if (same(word, "leader ends")) {
    thread(sleeper, 0, (char *)map(65536, 3) + 65536, &gone[0]);
    hit = 1;
    CALL(FUTEX, &hit, 129, 1);
    CALL(EXIT, 5);
  }
  if (same(word, "spinning thread")) {
    thread(forever, 0, (char *)map(65536, 3) + 65536, &gone[0]);
    return text("left it\n"), 3;
  }
  if (same(word, "to a thread")) {
    on_signal(10, mark, 0, 0);
    long tid = thread(sleeper, 0, (char *)map(65536, 3) + 65536, &gone[0]);
    CALL(TGKILL, CALL(GETPID), tid, 10);
    join(&gone[0]);
    return say("by it", hit == tid), 0;
  }
  if (same(word, "executing thread")) {
    thread(forever, 0, (char *)map(65536, 3) + 65536, &gone[1]);
    thread(executing, argv, (char *)map(65536, 3) + 65536, &gone[0]);
    for (;;) CALL(PAUSE);
  }
  if (same(word, "executing threads")) {
    if (!*argv[2]) return text("the last one\n"), 0;
    thread(forever, 0, (char *)map(65536, 3) + 65536, &gone[1]);
    thread(executing_again, argv, (char *)map(65536, 3) + 65536, &gone[0]);
    for (;;) CALL(PAUSE);
  }
  text("no such case\n");
  return 127;
}
