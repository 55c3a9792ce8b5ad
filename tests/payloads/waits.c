/*
 * Waits in the kernel that a signal must end, buffers of which a part is good, futexes with an
 * owner, System V IPC: one word a case, the same lines natively and in the monitor.
 */
#include "support.h"

static char area[1 << 17] __attribute__((aligned(4096)));
static volatile int alarms;

static void alarm(int signal) { (void)signal, alarms++; }

static void soon(long microseconds)
{
  struct { long is, ius, vs, vus; } timer = {0, 0, 0, microseconds};
  CALL(SETITIMER, 0, &timer, 0);
}

static void nap(long milliseconds)
{
  struct { long s, ns; } time = {0, milliseconds * 1000000};
  CALL(NANOSLEEP, &time, 0);
}

struct address { short family; char path[14]; };

static int interrupted(char *directory)
{
  /* connect to a listener whose queue is full */
  struct address at = {1, "listener"};
  CALL(80, directory);
  int listener = CALL(SOCKET, 1, 1, 0), client = CALL(SOCKET, 1, 1, 0), other = CALL(SOCKET, 1, 1, 0);
  CALL(BIND, listener, &at, 11);
  CALL(LISTEN, listener, 0);
  say("connect", CALL(CONNECT, client, &at, 11));
  on_signal(14, alarm, 0, 0);
  soon(30000);
  say("full", CALL(CONNECT, other, &at, 11));
  on_signal(14, alarm, 0x10000000, 0);
  soon(20000);
  if (CALL(FORK) == 0) nap(80), CALL(ACCEPT, listener, 0, 0), leave(0);
  say("full, restarted", CALL(CONNECT, other, &at, 11));
  CALL(WAIT4, -1, 0, 0, 0);
  say("alarms", alarms);
  say("no listener", CALL(CONNECT, CALL(SOCKET, 1, 1, 0), "\1\0nobody", 9));
  /* open of a FIFO that nobody else has open */
  say("mkfifo", CALL(133, "fifo", 0010600, 0));
  on_signal(14, alarm, 0, 0);
  soon(30000);
  say("open for reading", CALL(OPEN, "fifo", 0, 0));
  soon(30000);
  say("open for writing", CALL(OPENAT, -100, "fifo", 1, 0));
  say("without waiting", CALL(OPEN, "fifo", 04001, 0));
  on_signal(14, alarm, 0x10000000, 0);
  soon(20000);
  if (CALL(FORK) == 0) nap(80), leave(CALL(OPEN, "fifo", 1, 0) < 0);
  say("restarted open", CALL(OPEN, "fifo", 0, 0) > 0);
  CALL(WAIT4, -1, 0, 0, 0);
  say("alarms", alarms);
  /* locks */
  int one = CALL(OPEN, "lock", 0102, 0600), two = CALL(OPEN, "lock", 2, 0);
  say("flock", CALL(73, one, 2));
  on_signal(14, alarm, 0, 0);
  soon(30000);
  say("flock again", CALL(73, two, 2));
  say("not waiting", CALL(73, two, 6));
  struct { short type, whence; long start, length; int pid; } lock = {1, 0, 0, 0, 0};
  say("own lock", CALL(FCNTL, one, 7, &lock));
  int ready[2];
  char word;
  CALL(PIPE, ready);
  if (CALL(FORK) == 0) {
    soon(30000);
    say("other's lock", CALL(FCNTL, two, 7, &lock));
    leave(0);
  }
  CALL(WAIT4, -1, 0, 0, 0);
  /* a write of more than a pipe holds */
  if (CALL(FORK) == 0) {
    soon(30000);
    say("long write", CALL(WRITE, ready[1], area, sizeof area));
    say("full pipe", (soon(30000), CALL(WRITE, ready[1], area, 1)));
    leave(0);
  }
  CALL(WAIT4, -1, 0, 0, 0);
  say("it held", CALL(READ, ready[0], area, sizeof area));
  /* nothing comes twice */
  say("alarms", alarms);
  (void)word;
  return 0;
}

static void parts(const char *name, int fd, int input, char *edge, long bad)
{
  struct { char *base; u64 size; } three[3] = {{area, 5}, {edge - 3, 10}, {area + 100, 5}};
  text(name), text("\n");
  say(" over the edge", CALL(WRITE, fd, edge - 100, 200));
  say(" a page", CALL(WRITE, fd, edge - 4096, 8192));
  say(" vector", CALL(WRITEV, fd, three, 3));
  say(" nothing good", CALL(WRITE, fd, edge, 10));
  say(" unmapped", CALL(WRITE, fd, bad, 10));
  say(" kernel's", CALL(WRITE, fd, -4096L, 10));
  say(" last address", CALL(WRITE, fd, 0x7ffffffff000, 10));
  say(" none of it", CALL(WRITE, fd, bad, 0));
  if (input < 0) return;
  CALL(LSEEK, input, 0, 0);
  say(" read over the edge", CALL(READ, input, edge - 7, 20));
  say(" it", edge[-1]);
  CALL(LSEEK, input, 0, 0);
  say(" read vector", CALL(READV, input, three, 3));
  CALL(LSEEK, input, 0, 0);
  say(" read nowhere", CALL(READ, input, edge, 20));
  say(" position", CALL(LSEEK, input, 0, 1));
}

static int partial(void)
{
  /* eight pages: the lower half belongs to one mapping, the next to another, the rest is closed */
  char *p = (char *)CALL(MMAP, 0, 32768, 3, 0x22, -1, 0), *edge = p + 16384;
  CALL(MMAP, p + 8192, 8192, 3, 0x31, -1, 0);
  CALL(MPROTECT, edge, 16384, 0);
  for (int i = 0; i < 16384; i++) p[i] = 'a' + i % 23;
  int file = CALL(MEMFD_CREATE, "a", 0), pipe[2], pair[2], data[2];
  CALL(PIPE, pipe), CALL(SOCKETPAIR, 1, 1, 0, pair), CALL(SOCKETPAIR, 1, 2, 0, data);
  CALL(FCNTL, pipe[1], 4, 04001), CALL(FCNTL, pair[1], 4, 04002);
  parts("file", file, file, edge, 0x700000000000);
  parts("pipe", pipe[1], -1, edge, 0x700000000000);
  parts("stream", pair[1], -1, edge, 0x700000000000);
  parts("datagram", data[1], -1, edge, 0x700000000000);
  parts("null", CALL(OPEN, "/dev/null", 2, 0), -1, edge, 0x700000000000);
  say("in the pipe", (CALL(FCNTL, pipe[0], 4, 04000), CALL(READ, pipe[0], area, 65536)));
  say("in the stream", CALL(RECVFROM, pair[0], area, 65536, 0x40, 0, 0));
  say("an empty pipe", (CALL(FCNTL, pipe[0], 4, 04000), CALL(READ, pipe[0], edge, 10)));
  say("pread", CALL(PREAD, file, edge - 2, 10, 0));
  say("pread across", CALL(PREAD, file, edge - 8194, 10, 0));
  say("pwrite", CALL(PWRITE, file, edge - 2, 10, 0));
  say("random", CALL(GETRANDOM, edge - 2, 10, 0));
  say("readlink", CALL(READLINK, "/proc/self/root", edge - 3, 4096));
  say("getcwd", CALL(80, "/") + CALL(GETCWD, edge - 3, 4096));
  int directory = CALL(OPEN, "/", 0200000, 0);
  say("getdents", CALL(GETDENTS64, directory, edge - 8192, 65536) > 0);
  say("send", CALL(SENDTO, pair[1], edge - 3, 10, 0x40, 0, 0));
  say("receive", CALL(RECVFROM, pair[0], edge - 2, 10, 0x40, 0, 0));
  struct { char *base; u64 size; } two[2] = {{area, 2}, {edge - 1, 10}};
  struct { void *name; u64 name_size; void *iov; u64 count; void *control; u64 size; u64 flags; }
    message = {0, 0, two, 2, 0, 0, 0};
  say("sendmsg", CALL(SENDMSG, pair[1], &message, 0x40));
  say("recvmsg", CALL(RECVMSG, pair[0], &message, 0x40));
  say("path at the edge", (edge[-2] = '/', edge[-1] = 0, CALL(ACCESS, edge - 2, 0)));
  say("path over it", (edge[-1] = '/', CALL(ACCESS, edge - 2, 0)));
  say("stat over it", CALL(STAT, "/", edge - 100));
  return 0;
}

static volatile u32 word, robust_word, gone[2];
static volatile struct { void *next; long offset; void *pending; } robust;
static volatile struct { void *next; u32 word; } held;

static void contender(void *argument)
{
  long *results = argument;
  results[0] = CALL(FUTEX, &word, 6 | 128, 0, 0);
  results[1] = (word & 0x3fffffff) == CALL(GETTID);
  results[2] = CALL(FUTEX, &word, 7 | 128, 0, 0);
}

static void dying(void *argument)
{
  (void)argument;
  robust.next = (void *)&held, robust.offset = 8, robust.pending = 0;
  held.next = (void *)&robust;
  CALL(273, &robust, 24);
  held.word = CALL(GETTID);
}

static int priority(void)
{
  static long results[3];
  struct { long s, ns; } past = {1, 0};
  say("trylock", CALL(FUTEX, &word, 8 | 128, 0, 0));
  say("is mine", word == CALL(GETTID));
  say("trylock again", CALL(FUTEX, &word, 8 | 128, 0, 0));
  char *stack = (char *)CALL(MMAP, 0, 65536, 3, 0x22, -1, 0);
  thread(contender, results, stack + 65536, &gone[0]);
  on_signal(14, alarm, 0, 0);
  nap(150);
  say("somebody waits", word >> 31);
  say("unlock", CALL(FUTEX, &word, 7 | 128, 0, 0));
  join(&gone[0]);
  say("lock", results[0]), say("owner", results[1]), say("its unlock", results[2]);
  say("free", word);
  say("unlock what is free", CALL(FUTEX, &word, 7 | 128, 0, 0));
  word = 1 + (u32)CALL(GETTID);
  say("of nobody", CALL(FUTEX, &word, 6 | 128, 0, &past) < 0);
  say("bad word", CALL(FUTEX, 0x700000000000, 6 | 128, 0, 0));
  say("odd word", CALL(FUTEX, (char *)&word + 1, 6 | 128, 0, 0));
  thread(dying, 0, stack + 65536, &gone[1]);
  join(&gone[1]);
  say("owner died", held.word);
  return 0;
}

static int ipc(void)
{
  long segment = CALL(29, 0, 8192, 01600), set = CALL(64, 0, 2, 01600), queue = CALL(68, 0, 01600);
  long status[16] = {0};
  say("made", segment >= 0 && set >= 0 && queue >= 0);
  char *p = (char *)CALL(30, segment, 0, 0), *q = (char *)CALL(30, segment, 0, 010000);
  say("attached", (long)p > 0 && (long)q > 0 && p != q);
  p[0] = 'x', p[8191] = 'y';
  say("the same", q[0] == 'x' && q[8191] == 'y');
  say("stat", CALL(31, segment, 2, status));
  say("size", status[6]), say("attaches", status[11]);
  say("written by the kernel", CALL(READ, CALL(OPEN, "/dev/zero", 0, 0), p, 1)), say("", q[0]);
  say("into what is read only", CALL(READ, CALL(OPEN, "/dev/zero", 0, 0), q, 1));
  say("protect", CALL(MPROTECT, q, 4096, 3));
  if (CALL(FORK) == 0) p[1] = 'z', leave(0);
  CALL(WAIT4, -1, 0, 0, 0);
  say("shared with a child", q[1]);
  say("on top", CALL(30, segment, p, 0));
  say("odd address", CALL(30, segment, p + 1, 0));
  say("no such segment", CALL(30, 1 << 30, 0, 0));
  say("detach", CALL(67, q)), say("again", CALL(67, q)), say("odd", CALL(67, p + 4096));
  say("remove", CALL(31, segment, 0, 0)), say("detach", CALL(67, p));
  say("removed", CALL(30, segment, 0, 0) < 0);
  short values[2] = {3, 4}, got[2] = {0};
  say("setall", CALL(66, set, 0, 17, values)), say("getall", CALL(66, set, 0, 13, got));
  say("values", got[0] * 10 + got[1]);
  say("getval", CALL(66, set, 1, 12, 0)), say("setval", CALL(66, set, 1, 16, 0));
  struct { short number, operation, flags; } down = {1, -1, 0}, up = {1, 1, 0};
  struct { long s, ns; } brief = {0, 5000000};
  say("timed", CALL(220, set, &down, 1, &brief));
  say("up", CALL(65, set, &up, 1)), say("down", CALL(65, set, &down, 1));
  on_signal(14, alarm, 0x10000000, 0);
  soon(30000);
  say("interrupted", CALL(65, set, &down, 1));
  if (CALL(FORK) == 0) nap(40), leave(CALL(65, set, &up, 1) != 0);
  say("by a child", CALL(65, set, &down, 1));
  CALL(WAIT4, -1, 0, 0, 0);
  say("bad operations", CALL(65, set, 8, 1)), say("none", CALL(65, set, &up, 0));
  say("bad array", CALL(66, set, 0, 13, 8)), say("bad command", CALL(66, set, 0, 77, 0));
  say("remove", CALL(66, set, 0, 0, 0));
  struct { long kind; char text[8]; } message = {7, "seven"}, answer = {0, ""};
  say("send", CALL(69, queue, &message, 6, 0));
  say("receive", CALL(70, queue, &answer, 8, 7, 0)), text(answer.text), say("", answer.kind);
  say("nothing there", CALL(70, queue, &answer, 8, 0, 04000));
  soon(30000);
  say("interrupted", CALL(70, queue, &answer, 8, 0, 0));
  say("stat", CALL(71, queue, 2, status)), say("bad", CALL(71, queue, 2, 8));
  say("remove", CALL(71, queue, 0, 0));
  return 0;
}

/* structures with pointers inside: only what the payload itself may reach is reached */

static int inner(void)
{
  int tcp = CALL(SOCKET, 2, 1, 0), udp = CALL(SOCKET, 2, 2, 0), pair[2];
  CALL(SOCKETPAIR, 1, 1, 0, pair);
  struct { short code; u8 yes, no; u32 k; } keep = {6, 0, 0, 0xffff}, got[64] = {{0, 0, 0, 0}};
  struct { short length; void *instructions; } filter = {1, &keep}, bad = {1, (void *)0x700000000000};
  say("filter", CALL(SETSOCKOPT, udp, 1, 26, &filter, 16));
  say("nowhere", CALL(SETSOCKOPT, udp, 1, 26, &bad, 16));
  say("short", CALL(SETSOCKOPT, udp, 1, 26, &filter, 8));
  say("no structure", CALL(SETSOCKOPT, udp, 1, 26, 8, 16));
  u32 size = 64;
  say("get it", CALL(55, udp, 1, 26, got, &size)), say("instructions", size), say("", got[0].k);
  size = 1;
  char *edge = (char *)CALL(MMAP, 0, 8192, 3, 0x22, -1, 0) + 4096;
  CALL(MPROTECT, edge, 4096, 0);
  say("at the edge", CALL(55, udp, 1, 26, edge - 8, &size));
  say("over it", (size = 1, CALL(55, udp, 1, 26, edge - 4, &size)));
  int yes = 1;
  say("reuse", CALL(SETSOCKOPT, tcp, 1, 2, &yes, 4));
  say("negative", CALL(SETSOCKOPT, tcp, 1, 2, &yes, -1));
  say("no socket", CALL(SETSOCKOPT, 0, 283, 4, &yes, 4) < 0);
  say("nodelay", CALL(SETSOCKOPT, tcp, 6, 1, &yes, 4));
  struct { u32 version, pid; } head = {0x20080522, 0};
  u32 sets[6];
  say("capget", CALL(125, &head, sets)), say("at the edge", CALL(125, &head, edge - 24));
  say("over it", CALL(125, &head, edge - 20));
  head.version = 0x19980330;
  say("version 1", CALL(125, &head, edge - 12)), say("over it", CALL(125, &head, edge - 8));
  head.version = 5;
  say("unknown", CALL(125, &head, sets)), say("is", head.version);
  return 0;
}

/* what Linux allows and a payload may not: the data hold addresses, which would be the monitor's */

static int refused(void)
{
  int tcp = CALL(SOCKET, 2, 1, 0), pair[2];
  u64 zerocopy[8] = {(u64)area, 4096, 0, (u64)area, 4096}, data[32] = {0};
  u32 size = 64;
  CALL(SOCKETPAIR, 1, 1, 0, pair);
  say("TCP_ZEROCOPY_RECEIVE", CALL(55, tcp, 6, 35, zerocopy, &size));
  say("XDP_UMEM_REG", CALL(SETSOCKOPT, tcp, 283, 4, data, 24));
  say("IPT_SO_SET_REPLACE", CALL(SETSOCKOPT, tcp, 0, 64, data, 96));
  say("IP6T_SO_SET_REPLACE", CALL(SETSOCKOPT, tcp, 41, 64, data, 96));
  say("MPTCP_FULL_INFO", CALL(55, tcp, 284, 4, data, &size));
  say("RDS_GET_MR", CALL(SETSOCKOPT, tcp, 276, 2, data, 24));
  say("PACKET_FANOUT_DATA", CALL(SETSOCKOPT, tcp, 263, 22, data, 16));
  data[0] = 24, data[1] = 276 | 1UL << 32;
  struct { void *base; u64 size; } iov = {area, 1};
  struct { void *name; u64 name_size; void *iov; u64 count; void *control; u64 size; u64 flags; }
    message = {0, 0, &iov, 1, data, 24, 0};
  say("RDS_CMSG_RDMA_ARGS", CALL(SENDMSG, pair[0], &message, 0));
  return 0;
}

int payload(int argc, char **argv, char **envp)
{
  const char *case_ = argc > 1 ? argv[1] : "";
  (void)envp;
  if (same(case_, "interrupted")) return interrupted(argv[2]);
  if (same(case_, "partial")) return partial();
  if (same(case_, "priority")) return priority();
  if (same(case_, "ipc")) return ipc();
  if (same(case_, "inner")) return inner();
  if (same(case_, "refused")) return refused();
  text("no such case\n");
  return 127;
}
