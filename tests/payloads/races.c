/*
 * What several threads do at once: one word a case, the same lines natively and in the monitor.
 */
#include "support.h"

#define SIGCHLD 17
#define ANOTHER 10

static volatile u32 gone[8], go, counted;
static char **words_of_all;

static void nap(long milliseconds)
{
  struct { long s, ns; } time = {milliseconds / 1000, milliseconds % 1000 * 1000000};
  CALL(NANOSLEEP, &time, 0);
}

static long now(void)
{
  long time[2];
  CALL(CLOCK_GETTIME, 1, time);
  return time[0] * 1000 + time[1] / 1000000;
}

static void *map(u64 size, int prot)
{
  return (void *)CALL(MMAP, 0, size, prot, 0x22, -1, 0);
}

static long start(void (*function)(void *), void *argument, int index)
{
  return thread(function, argument, (char *)map(65536, 3) + 65536, &gone[index]);
}

static void count(int signal) { (void)signal, counted++; }

static void idle(void *argument)
{
  (void)argument;
  for (;;) CALL(PAUSE);
}

static void nothing(void *argument) { (void)argument; }

/* an execve while others are made */

static void execute(void *argument)
{
  (void)argument;
  char *words[] = {words_of_all[0], words_of_all[1], words_of_all[2] + 1, 0}, *variables[] = {0};
  go = 1;
  CALL(EXECVE, words_of_all[0], words, variables);
}

static int executing(void)
{
  if (!*words_of_all[2]) return text("the last one\n"), 0;
  char *stacks = map(64 * 8192, 3);
  start(execute, 0, 0);
  for (int i = 1; i < 64; i++) thread(idle, 0, stacks + 8192 * i, &gone[1]);
  for (;;) CALL(PAUSE);
}

/* one thread after another */

static int many(long wanted)
{
  char *stack = (char *)map(65536, 3) + 65536;
  for (long i = 0; i < wanted; i++) {
    long result = thread(nothing, 0, stack, &gone[0]);
    if (result < 0) return say("made", i), say("then", result), 1;
    join(&gone[0]);
  }
  return say("made", wanted), 0;
}

/* many at once */

static int crowd(long wanted)
{
  char *stacks = map(wanted * 8192, 3);
  for (long i = 1; i <= wanted; i++)
    if (thread(idle, 0, stacks + 8192 * i, &gone[0]) < 0) return say("made", i), 1;
  return say("made", wanted), 0;
}

/* a handler that one thread sets, and another runs */

static void set_handler(void *argument)
{
  (void)argument;
  nap(50);
  on_signal(SIGCHLD, count, 0, 0);
  if (CALL(FORK) == 0) nap(300), leave(0);
}

static int handler(void)
{
  start(set_handler, 0, 0);
  struct { long s, ns; } time = {10, 0};
  say("sleep", CALL(NANOSLEEP, &time, 0));
  say("handled", counted);
  return 0;
}

/* vfork beside fork */

static volatile long children[10];

static void forker(void *argument)
{
  (void)argument;
  while (!go) CALL(YIELD);
  for (int i = 0; i < 10; i++) {
    children[i] = CALL(FORK);
    if (children[i] == 0) idle(0);
  }
}

static int vforks(void)
{
  start(forker, 0, 0);
  go = 1;
  for (int i = 0; i < 10; i++) {
    long pid = CALL(VFORK);
    if (pid == 0) leave(0);
    CALL(WAIT4, pid, 0, 0, 0);
  }
  join(&gone[0]);
  for (int i = 0; i < 10; i++) CALL(KILL, children[i], 9), CALL(WAIT4, children[i], 0, 0, 0);
  return text("none waits for another\n"), 0;
}

/* an execve beside a vfork */

static void vforker(void *argument)
{
  (void)argument;
  if (CALL(VFORK) == 0) CALL(CLOSE, 1), CALL(CLOSE, 2), nap(3000), leave(0);
}

static int left_behind(void)
{
  if (words_of_all[2]) return nap(300), say("child runs", CALL(WAIT4, -1, 0, 1, 0) == 0), 0;
  start(vforker, 0, 0);
  nap(200);
  char *words[] = {words_of_all[0], words_of_all[1], "again", 0}, *variables[] = {0};
  CALL(EXECVE, words_of_all[0], words, variables);
  return 1;
}

/* pages replaced while they are used */

static char *volatile page;

static void replace(void *argument)
{
  for (long i = 0; i < (long)argument; i++)
    if (CALL(MMAP, page, 8192, 3, 0x32, -1, 0) != (long)page) say("mmap", i);
  go = 1;
}

static int replaced(long times)
{
  long bad = 0;
  page = map(8192, 3);
  int fd = CALL(OPEN, "/dev/null", 1, 0);
  start(replace, (void *)times, 0);
  while (!go) {
    for (int i = 0; i < 100; i++) *(volatile char *)(page + 4096);
    if (CALL(PWRITE, fd, page, 8, 0) != 8 || CALL(CLOCK_GETTIME, 1, page)) bad++;
    if (CALL(MSYNC, page, 8192, 1) || CALL(MLOCK, page, 8192)) bad++;
  }
  return say("bad", bad), 0;
}

/* children that need what other threads are the first to ask for */

static void first(void *argument)
{
  while (!go);
  switch ((long)argument) {
    case 0: CALL(POLL, 0, 0, 0); break;
    case 1: CALL(RECVFROM, -1, 0, 0, 0, 0, 0); break;
    case 2: nap(0); break;
    case 3: CALL(IOCTL, -1, 0, 0); break;
    case 4: CALL(68, -1, 0); break;
  }
}

static int fresh(void)
{
  int worst = 0;
  for (long i = 0; i < 5; i++) start(first, (void *)i, i);
  go = 1;
  for (int i = 0; i < 4; i++) {
    long pid = CALL(FORK);
    if (pid == 0) {
      CALL(ALARM, 5);
      for (long j = 0; j < 5; j++) first((void *)j);
      leave(0);
    }
  }
  int status = 0;
  while (CALL(WAIT4, -1, &status, 0, 0) > 0)
    if (status > worst) worst = status;
  return say("children", worst), 0;
}

/* children made while threads are */

static void makes_threads(void *argument)
{
  char *stack = (char *)map(65536, 3) + 65536;
  while (!go) {
    thread(nothing, argument, stack, &gone[1]);
    join(&gone[1]);
  }
}

static int beside(long wanted)
{
  start(makes_threads, 0, 0);
  for (long i = 0; i < wanted; i++)
    if (CALL(FORK) == 0) text("made\n"), idle(0);
  go = 1;
  join(&gone[0]);
  idle(0);
  return 0;
}

/* a signal that comes while it is now ignored and now handled */

static int switched(long times)
{
  on_signal(ANOTHER, (void *)1, 0, 0);
  long me = CALL(GETPID);
  long pid = CALL(FORK);
  if (pid == 0) {
    CALL(CLOSE, 1), CALL(CLOSE, 2);
    while (CALL(KILL, me, ANOTHER) == 0);
    leave(0);
  }
  for (long i = 0; i < times; i++) {
    on_signal(ANOTHER, (void *)1, 0, 0);
    on_signal(ANOTHER, count, 0, 0);
  }
  CALL(KILL, pid, 9);
  CALL(WAIT4, pid, 0, 0, 0);
  return text("lived\n"), 0;
}

/* a SIGCHLD that nobody wanted */

static int unwanted(void)
{
  u64 mask = 1 << (SIGCHLD - 1), pending = 0;
  long pid = CALL(FORK);
  if (pid == 0) leave(0);
  nap(100);
  CALL(WAIT4, pid, 0, 0, 0);
  CALL(SIGPROCMASK, 0, &mask, 0, 8);
  CALL(127, &pending, 8);
  say("pending", pending);
  return 0;
}

/* a thread waits for its child with SIGCHLD blocked; another child is another thread's business */

static void wait_masked(void *argument)
{
  u64 mask = 1 << (SIGCHLD - 1);
  CALL(SIGPROCMASK, 0, &mask, 0, 8);
  long pid = CALL(FORK);
  if (pid == 0) nap(1500), leave(0);
  go = 1;
  say("its own", CALL(WAIT4, pid, 0, 0, 0) == pid);
  (void)argument;
}

static int masked(void)
{
  on_signal(SIGCHLD, count, 0, 0);
  start(wait_masked, 0, 0);
  while (!go) CALL(YIELD);
  nap(50);
  if (CALL(FORK) == 0) nap(50), leave(0);
  struct { long s, ns; } time = {10, 0};
  say("sleep", CALL(NANOSLEEP, &time, 0));
  say("handled", counted);
  join(&gone[0]);
  return 0;
}

/* one thread reads the SIGCHLD of a signalfd, another waits for the child */

static void wait_child(void *argument)
{
  go = 1;
  for (long i = 0; i < (long)argument; i++) {
    long pid = CALL(FORK);
    if (pid == 0) leave(0);
    if (CALL(WAIT4, pid, 0, 0, 0) != pid) text("no child\n");
  }
}

static int by_descriptor(long times)
{
  u64 mask = 1 << (SIGCHLD - 1);
  char info[128];
  CALL(SIGPROCMASK, 0, &mask, 0, 8);
  int fd = CALL(289, -1, &mask, 8, 04000);
  start(wait_child, (void *)times, 0);
  struct { int fd; short events, revents; } f = {fd, 1, 0};
  while (gone[0]) {
    CALL(POLL, &f, 1, 50);
    CALL(READ, fd, info, 128);
  }
  return text("all waited for\n"), 0;
}

/* a thread's processor must not know what the one before it could do */

static void write_page(void *argument)
{
  (void)argument;
  *(volatile char *)page = 1;
}

static int forgotten(void)
{
  page = map(4096, 3);
  start(write_page, 0, 0);
  join(&gone[0]);
  nap(20);
  CALL(MPROTECT, page, 4096, 1);
  start(write_page, 0, 0);
  join(&gone[0]);
  return text("written\n"), 0;
}

/* many readers of one byte */

#define READERS 8

static volatile long results[READERS];
static int ends[2];
static volatile int served;

static void reader(void *argument)
{
  char byte;
  results[(long)argument] = CALL(READ, ends[0], &byte, 1);
  served = 1;
}

/* Once one has what all wait for, signals end the others' waits; the sum of what they got. */
static long interrupt(const long *tids)
{
  long sum = 0;
  while (!served) nap(1);
  for (int i = 0; i < READERS; i++) {
    for (; gone[i]; nap(20)) CALL(TGKILL, CALL(GETPID), tids[i], ANOTHER);
    sum += results[i];
  }
  return sum;
}

static int readers(void)
{
  long tids[READERS];
  CALL(PIPE, ends);
  on_signal(ANOTHER, count, 0, 0);
  for (long i = 0; i < READERS; i++) tids[i] = start(reader, (void *)i, i);
  nap(50);
  CALL(WRITE, ends[1], "x", 1);
  say("sum", interrupt(tids));
  return 0;
}

/* many writers where there is room for one */

static void writer(void *argument)
{
  long written = CALL(WRITE, ends[1], page, 4096);
  results[(long)argument] = written == 4096 ? 1 : written;
  served = 1;
}

static int writers(void)
{
  long tids[READERS];
  page = map(65536, 3);
  CALL(PIPE, ends);
  CALL(WRITE, ends[1], page, 65536);
  on_signal(ANOTHER, count, 0, 0);
  for (long i = 0; i < READERS; i++) tids[i] = start(writer, (void *)i, i);
  nap(50);
  CALL(READ, ends[0], page, 4096);
  say("sum", interrupt(tids));
  return 0;
}

/* two that accept one connection */

struct address { short family; char path[14]; };

static void acceptor(void *argument)
{
  long fd = CALL(ACCEPT, ends[0], 0, 0);
  results[(long)argument] = fd > 0 ? 1 : fd;
  served = 1;
}

static int acceptors(void)
{
  struct address at = {1, "\0two-accept"};
  long tids[READERS];
  long pid = CALL(GETPID);
  memcpy(at.path + 10, &pid, 4);
  ends[0] = CALL(SOCKET, 1, 1, 0);
  CALL(BIND, ends[0], &at, sizeof at);
  CALL(LISTEN, ends[0], 8);
  on_signal(ANOTHER, count, 0, 0);
  for (long i = 0; i < READERS; i++) tids[i] = start(acceptor, (void *)i, i);
  nap(50);
  say("connect", CALL(CONNECT, CALL(SOCKET, 1, 1, 0), &at, sizeof at));
  say("sum", interrupt(tids));
  return 0;
}

/* a socket's own time limits */

static int limits(void)
{
  struct address at = {1, "\0limits"};
  struct { long s, us; } limit = {0, 100000};
  struct { void *base; u64 size; } in = {ends, 4};
  long pid = CALL(GETPID);
  memcpy(at.path + 8, &pid, 4);
  int listener = CALL(SOCKET, 1, 1, 0);
  CALL(BIND, listener, &at, sizeof at);
  CALL(LISTEN, listener, 8);
  CALL(SETSOCKOPT, listener, 1, 20, &limit, 16);
  say("accept", CALL(ACCEPT, listener, 0, 0));
  CALL(SOCKETPAIR, 1, 1, 0, ends);
  CALL(SETSOCKOPT, ends[0], 1, 20, &limit, 16);
  CALL(SETSOCKOPT, ends[0], 1, 21, &limit, 16);
  long before = now();
  say("recv", CALL(RECVFROM, ends[0], &limit, 1, 0, 0, 0));
  say("read", CALL(READ, ends[0], &limit, 1));
  say("readv", CALL(READV, ends[0], &in, 1));
  say("early", now() - before < 300);
  while (CALL(SENDTO, ends[0], words_of_all[0], 1, 0, 0, 0) == 1);
  say("send", CALL(SENDTO, ends[0], words_of_all[0], 1, 0, 0, 0));
  return 0;
}

/* all of it at once, by chance */

#define PLAYERS 4
static volatile u32 word_of_all;
static volatile long players[PLAYERS], wrong;

static void child_of(long me, int number)
{
  int status = 0;
  long pid = CALL(number);
  if (pid == 0) leave(number == FORK ? 7 : 8);
  if (pid < 0) return;
  long got;
  while ((got = CALL(WAIT4, pid, &status, 0, 0)) == -4);
  if (got != pid || status >> 8 != (number == FORK ? 7 : 8)) wrong++, say("child", me), say("got", got), say("status", status);
}

static void mapped(u64 x)
{
  u64 size = (x % 16 + 1) * 4096;
  volatile char *p = map(size, 3);
  p[size - 1] = 1;
  CALL(MPROTECT, p, 4096, x >> 8 & 1);
  CALL(MPROTECT, p, size, 3);
  if (p[size - 1] != 1) wrong++, text("memory\n");
  CALL(MUNMAP, p, size);
}

static void play(void *argument)
{
  long me = (long)argument, own[2];
  u64 x = me * 2654435761u + 88172645463325252u;
  int pair[2];
  char byte;
  struct { long s, ns; } brief = {0, 200000};
  char *stack = (char *)map(16384, 3) + 16384;
  CALL(PIPE, pair);
  players[me] = CALL(GETTID);
  for (int i = 0; i < 200; i++) {
    x ^= x << 13, x ^= x >> 7, x ^= x << 17;
    switch (x >> 20 & 7) {
      case 0: child_of(me, FORK); break;
      case 1: child_of(me, VFORK); break;
      case 2: mapped(x); break;
      case 3: CALL(FUTEX, &word_of_all, 128, 0, &brief); break;
      case 4: CALL(FUTEX, &word_of_all, 129, 2); break;
      case 5:
        CALL(WRITE, pair[1], "x", 1);
        while (CALL(READ, pair[0], &byte, 1) == -4);
        break;
      case 6:
        if (players[x >> 32 & 3]) CALL(TGKILL, CALL(GETPID), players[x >> 32 & 3], ANOTHER);
        break;
      case 7:
        if (thread(nothing, 0, stack, &gone[PLAYERS + me]) > 0) join(&gone[PLAYERS + me]);
        break;
    }
    if (CALL(CLOCK_GETTIME, 1, own)) wrong++, text("clock\n");
  }
  players[me] = 0;
}

static int chance(void)
{
  on_signal(ANOTHER, count, 0, 0);
  for (long i = 0; i < PLAYERS; i++) start(play, (void *)i, i);
  for (int i = 0; i < PLAYERS; i++) join(&gone[i]);
  return say("wrong", wrong), 0;
}

/* the status is the leader's */

static void later(void *argument)
{
  (void)argument;
  nap(300);
  for (;;) CALL(EXIT, 3);
}

static int leader(void)
{
  start(later, 0, 0);
  for (;;) CALL(EXIT, 5);
  return 0;
}

int payload(int argc, char **argv, char **envp)
{
  (void)envp;
  const char *word = argc > 1 ? argv[1] : "";
  long number = argc > 2 ? parse(argv[2]) : 0;
  words_of_all = argv;
  if (same(word, "executing")) return executing();
  if (same(word, "many")) return many(number);
  if (same(word, "crowd")) return crowd(number);
  if (same(word, "handler")) return handler();
  if (same(word, "vforks")) return vforks();
  if (same(word, "left behind")) return left_behind();
  if (same(word, "replaced")) return replaced(number);
  if (same(word, "fresh")) return fresh();
  if (same(word, "beside")) return beside(number);
  if (same(word, "switched")) return switched(number);
  if (same(word, "unwanted")) return unwanted();
  if (same(word, "masked")) return masked();
  if (same(word, "by descriptor")) return by_descriptor(number);
  if (same(word, "forgotten")) return forgotten();
  if (same(word, "readers")) return readers();
  if (same(word, "writers")) return writers();
  if (same(word, "acceptors")) return acceptors();
  if (same(word, "limits")) return limits();
  if (same(word, "chance")) return chance();
  if (same(word, "leader")) return leader();
  text("no such case\n");
  return 127;
}
