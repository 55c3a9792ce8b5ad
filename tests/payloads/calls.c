/*
 * Every system call of the monitor's table, with good arguments; in mode "bad" each call also with
 * one argument after the other replaced by values that are no good, in a child of fork; with a
 * seed several at once, at random.
 *
 * A line is: number, result, and for results in memory their checksum.  Natively and in the
 * monitor it must be the same.  What is different in any two runs (ids, addresses, times) is
 * written as + only.
 */
#include "support.h"

static char log_text[1 << 19];
static u64 logged;
static int bad_too;
static u64 seed;

static void flush(void)
{
  CALL(WRITE, 1, log_text, logged);
  logged = 0;
}

static void put(const char *t)
{
  while (*t) log_text[logged++] = *t++;
}

static void put_number(long value)
{
  char digits[24];
  int at = 23;
  u64 rest = value < 0 ? -(u64)value : (u64)value;
  digits[at] = 0;
  do digits[--at] = '0' + rest % 10; while (rest /= 10);
  if (value < 0) digits[--at] = '-';
  put(digits + at);
}

static char out[1 << 16] __attribute__((aligned(4096)));
static char kept[64]; /* what the kernel goes on using */
static char *edge; /* the last two bytes before it are good, and 0 */

/* What a step may vary: NUMBER shows the result, SIGN only whether it is positive. */
enum { NUMBER, SIGN };

static void show(int how, long result, long size)
{
  if (how == SIGN && result > 0) put(" +"); else put(" "), put_number(result);
  if (size && result >= 0) {
    u32 sum = 1;
    for (long i = 0; i < size; i++) sum = sum * 31 + (u8)out[i];
    put(" #"), put_number(sum);
  }
}

static void vary(int how, int n, const long *a, int arguments, int fixed)
{
  const long values[] = {
    0, 1, -1, 8, 77, 0x7fffffff, 0x80000000, 1L << 40, 0x700000000000, 0x7ffffffff000,
    0x800000000000, 0xffff800000000000, 0xffffff8000001000, (long)edge - 2, (long)edge
  };
  long pid;
  flush();
  pid = CALL(FORK);
  if (pid == 0) {
    on_signal(14, 0, 0, 0);
    /* what hangs must not hang for ever */
    const long limit[4] = {0, 0, bad_too == 1 ? 5 : 0, bad_too == 1 ? 0 : 200000};
    CALL(SETITIMER, 0, limit, 0);
    for (int i = 0; bad_too > 1 && i < 60; i++) {
      long b[6];
      for (int k = 0; k < 6; k++) {
        seed ^= seed << 13, seed ^= seed >> 7, seed ^= seed << 17;
        b[k] = fixed >> k & 1 || seed & 1 ? a[k] : values[(seed >> 8) % (sizeof values / sizeof values[0])];
      }
      CALL(n, b[0], b[1], b[2], b[3], b[4], b[5]);
    }
    for (int k = 0; bad_too == 1 && k < arguments; k++) {
      if (fixed >> k & 1) continue;
      put(" bad "), put_number(n), put(" "), put_number(k), put(":");
      for (u64 v = 0; v < sizeof values / sizeof values[0]; v++) {
        long b[6];
        for (int i = 0; i < 6; i++) b[i] = a[i];
        b[k] = values[v];
        edge[-1] = edge[-2] = 0;
        show(how, CALL(n, b[0], b[1], b[2], b[3], b[4], b[5]), 0);
      }
      put("\n");
    }
    flush();
    leave(0);
  }
  int status = 0;
  while (CALL(WAIT4, pid, &status, 0, 0) == -4) {}
  if (status) put(" died "), put_number(n), put(" "), put_number(status & 0x7f), put("\n");
}

static long step(int how, long size, int fixed, int n, int arguments, long a, long b, long c, long d, long e, long f)
{
  long all[] = {a, b, c, d, e, f};
  if (bad_too && fixed >= 0) vary(how, n, all, arguments, fixed);
  memset(out, 0, sizeof out);
  long result = CALL(n, a, b, c, d, e, f);
  put_number(n), show(how, result, size), put("\n");
  if (logged > sizeof log_text / 2) flush();
  return result;
}

/* Arguments are counted; good[] of them are the last six. */
#define COUNT_(a, b, c, d, e, f, g, n, ...) n
#define COUNT(...) COUNT_(__VA_ARGS__, 6, 5, 4, 3, 2, 1, 0, 0)
#define STEP_(how, size, fixed, args, n, a, b, c, d, e, f, ...) \
  step(how, size, fixed, n, args, (long)(a), (long)(b), (long)(c), (long)(d), (long)(e), (long)(f))
/* a call, varied in all arguments; with a result in `out`; with a result that is never the same */
#define T(...) STEP_(NUMBER, 0, 0, COUNT(__VA_ARGS__), __VA_ARGS__, 0, 0, 0, 0, 0, 0, 0)
#define O(size, ...) STEP_(NUMBER, size, 0, COUNT(__VA_ARGS__), __VA_ARGS__, 0, 0, 0, 0, 0, 0, 0)
#define P(...) STEP_(SIGN, 0, 0, COUNT(__VA_ARGS__), __VA_ARGS__, 0, 0, 0, 0, 0, 0, 0)
/* the same with the arguments of the mask `fixed` left alone; all of them: -1 */
#define TF(fixed, ...) STEP_(NUMBER, 0, fixed, COUNT(__VA_ARGS__), __VA_ARGS__, 0, 0, 0, 0, 0, 0, 0)
#define PF(fixed, ...) STEP_(SIGN, 0, fixed, COUNT(__VA_ARGS__), __VA_ARGS__, 0, 0, 0, 0, 0, 0, 0)
#define OF(size, fixed, ...) STEP_(NUMBER, size, fixed, COUNT(__VA_ARGS__), __VA_ARGS__, 0, 0, 0, 0, 0, 0, 0)

static int ticks;
static void tick(int signal) { (void)signal, ticks++; }

struct vector { void *base; u64 size; };
struct time { long s, ns; };
struct message { void *name; u64 name_size; void *iov; u64 count; void *control; u64 size; long flags; };
struct messages { struct message header; u64 length; };

static const struct time brief = {0, 2000000}, none = {0, 0}, past = {1, 0}, settled = {0, 100000000};
static u64 empty_set, usr1 = 1 << 9;

static void files(void)
{
  long f = T(2, "file", 0102, 0644), d, n;
  TF(4, 1, f, "hello, world", 12);
  P(8, f, 0, 0);
  OF(12, 4, 0, f, out, 12);
  TF(4, 17, f, out, 5, 7);
  TF(12, 18, f, "W", 1, 7);
  struct vector two[2] = {{"ab", 2}, {"cde", 3}}, in[2] = {{out, 3}, {out + 100, 4}};
  TF(4, 20, f, two, 2);
  P(8, f, 3, 0);
  OF(110, 4, 19, f, in, 2);
  TF(28, 296, f, two, 2, 1, 0);
  OF(110, 4, 295, f, in, 2, 1, 0);
  TF(28, 328, f, two, 2, 1, 0, 0);
  OF(110, 4, 327, f, in, 2, 1, 0, 0);
  P(4, "file", out), P(5, f, out), P(6, "file", out);
  T(262, -100, "file", out, 0), T(262, f, "", out, 0x1000);
  T(332, -100, "file", 0, 0x7ff, out), T(332, f, "", 0x1000, 1, out);
  T(21, "file", 4), T(269, -100, "file", 4), T(439, -100, "file", 4, 0x200);
  TF(4, 257, -100, "other", 0102, 0600), T(257, -100, "none", 0, 0), T(85, "third", 0600);
  struct { u64 flags, mode, resolve; } how = {0, 0, 8};
  T(437, -100, "file", &how, 24);
  T(32, f), TF(2, 33, f, 20), TF(2, 292, f, 21, 02000000), T(33, f, f), T(292, f, f, 0);
  T(72, 20, 1), T(72, 21, 1), T(72, f, 3), T(72, f, 0, 30), T(72, f, 1030, 30), TF(2, 72, f, 2, 1);
  struct { short type, whence; long start, length; int pid; } lock = {1, 0, 0, 0, 0};
  TF(3, 72, f, 6, &lock), TF(3, 72, f, 5, &lock), TF(3, 72, f, 37, &lock), TF(3, 72, f, 1033, 0);
  T(3, 20), T(3, 20), TF(7, 436, 21, 21, 0), T(436, 50, 40, 0), T(436, 60, 70, 99);
  T(73, f, 4 | 2), T(73, f, 8);
  TF(2, 77, f, 100), TF(2, 76, "file", 50), TF(12, 285, f, 0, 0, 4096), T(74, f), T(75, f), T(306, f), T(162);
  T(277, f, 0, 10, 2), T(187, f, 0, 10), T(221, f, 0, 10, 4);
  T(83, "dir", 0755), T(258, -100, "dir2", 0755), T(84, "dir2"), T(263, -100, "dir", 0x200);
  T(83, "dir", 0755), T(82, "third", "moved"), T(264, -100, "moved", -100, "third");
  T(316, -100, "third", -100, "other", 2), T(316, -100, "third", -100, "other", 1);
  T(86, "file", "hard"), T(265, -100, "file", -100, "hard2", 0), T(87, "hard"), T(263, -100, "hard2", 0);
  T(88, "file", "soft"), T(266, "file", -100, "soft2"), O(4, 89, "soft", out, 100);
  O(4, 267, -100, "soft2", out, 4), T(87, "soft");
  T(90, "file", 0600), T(91, f, 0640), T(268, -100, "file", 0644), T(452, -100, "soft2", 0, 0x100);
  T(92, "file", 5, 6), T(93, f, 7, 8), T(94, "soft2", 9, 10), T(260, -100, "file", 11, 12, 0);
  T(133, "pipe", 0010600, 0), T(259, -100, "pipe2", 0010600, 0);
  struct { long a, m; } times = {1000, 2000};
  struct time stamps[2] = {{5, 6}, {7, 8}};
  T(132, "file", &times), T(235, "file", stamps), T(261, -100, "file", stamps), T(280, -100, "file", stamps, 0);
  T(280, f, 0, stamps, 0), T(132, "file", 0);
  T(188, "file", "user.a", "value", 5, 0), T(189, "file", "user.b", "v", 1, 0), T(190, f, "user.c", "w", 1, 0);
  O(5, 191, "file", "user.a", out, 100), O(1, 192, "file", "user.b", out, 100), O(1, 193, f, "user.c", out, 100);
  T(194, "file", out, 200), T(195, "file", out, 200), T(196, f, out, 200);
  T(197, "file", "user.a"), T(198, "file", "user.b"), T(199, f, "user.c"), T(197, "file", "user.a");
  P(137, ".", out), P(138, f, out);
  d = T(2, "dir", 0200000, 0);
  O(0, 78, d, out, 4096), P(8, d, 0, 0), T(217, d, out, 4096), P(8, d, 0, 0);
  T(80, "dir"), P(79, out, 4096), T(81, d), T(80, ".."), TF(1, 95, 022);
  n = T(319, "name", 0);
  TF(12, 18, n, "0123456789", 10, 0);
  long offset = 2;
  TF(1, 40, f, n, &offset, 4), PF(3, 40, f, n, 0, 100);
  long from = 0, to = 5;
  T(326, n, &from, f, &to, 5, 0);
  int p[2], q[2];
  T(22, p), T(293, q, 02000000);
  for (int each = 0; each < 2; each++) CALL(FCNTL, p[each], 4, 04000), CALL(FCNTL, q[each], 4, 04000);
  TF(5, 275, n, &from, p[1], 0, 5, 0), TF(2, 276, p[0], q[1], 3, 2), OF(3, 4, 0, q[0], out, 3), OF(3, 4, 0, p[0], out, 3);
  T(161, "/none"), TF(2, 16, p[0], 0x541b, out), TF(2, 16, f, 0x5401, out), TF(2, 16, f, 0x5451, 0), TF(2, 16, f, 0x5421, &p);
  int i = T(294, 0), old = T(253);
  P(254, i, "file", 2), T(255, i, 1), T(255, i, 1);
  for (int each = 3; each < 64; each++) CALL(CLOSE, each);
  (void)old;
}

static void sockets(void)
{
  int pair[2], data[2];
  struct { short family; u8 port[2]; u8 address[4]; u64 zero; } at = {2, {0, 0}, {127, 0, 0, 1}, 0}, peer;
  u32 size = sizeof at;
  int s = T(41, 2, 1, 0), c = T(41, 2, 1, 0);
  int yes = 1;
  T(54, s, 1, 2, &yes, 4);
  T(49, s, &at, sizeof at), T(50, s, 5);
  T(51, s, &at, &size), T(42, c, &at, sizeof at);
  size = sizeof peer;
  long a = TF(-1, 43, s, &peer, &size);
  put_number(size), put("\n");
  size = sizeof peer, T(52, c, &peer, &size);
  size = 4, O(0, 55, c, 1, 3, out, &size);
  TF(-1, 44, c, "bytes", 5, 0x4000, 0, 0);
  /* On a busy machine what was sent arrives later. */
  CALL(35, &settled, 0);
  OF(5, -1, 45, a, out, 100, 0x40, 0, 0);
  CALL(SOCKETPAIR, 1, 2, 0, data);
  TF(12, 44, data[0], "bytes", 5, 0x4040, 0, 0), OF(5, 13, 45, data[1], out, 100, 0x40, 0, 0);
  CALL(CLOSE, data[0]), CALL(CLOSE, data[1]);
  T(48, c, 1), T(48, c, 77);
  c = CALL(SOCKET, 2, 1, 0), CALL(CONNECT, c, &at, sizeof at);
  TF(-1, 288, s, 0, 0, 02000000), T(288, c, 0, 0, 0);
  T(53, 1, 1, 0, pair), T(53, 1, 2, 0, data);
  struct vector two[2] = {{"ab", 2}, {"cde", 3}}, in[2] = {{out, 3}, {out + 100, 4}};
  struct { u64 size; int level, kind, fd, pad; } rights = {20, 1, 1, 0, 0}, got = {0, 0, 0, 0, 0};
  struct message m = {0, 0, two, 2, &rights, 20, 0}, r = {0, 0, in, 2, &got, 24, 0};
  T(46, pair[0], &m, 0x4000), OF(110, 5, 47, pair[1], &r, 0x40);
  put_number(got.fd), put(" "), put_number(r.size), put(" "), put_number(r.flags), put("\n");
  rights.fd = 19999, T(46, pair[0], &m, 0x4000);
  m.control = 0, m.size = 0, r.control = 0, r.size = 0;
  struct messages many[2] = {{m, 0}, {m, 0}}, answers[2] = {{r, 0}, {r, 0}};
  TF(4, 307, data[0], many, 2, 0x4000), OF(110, -1, 299, data[1], answers, 2, 0x40, 0);
  put_number(many[1].length), put(" "), put_number(answers[1].length), put("\n");
  m.iov = (void *)0x700000000000, T(46, pair[0], &m, 0x4000);
  m.iov = two, m.count = 2000, T(46, pair[0], &m, 0x4000), m.count = 2;
  two[1].base = (void *)0x700000000000, T(46, pair[0], &m, 0x4000), TF(4, 20, pair[0], two, 2);
  two[1].base = "x", two[1].size = 1L << 63, TF(4, 20, pair[0], two, 2);
  two[1].size = 1, m.name = (void *)8, m.name_size = 16, T(46, data[0], &m, 0x4000);
  for (int each = 3; each < 64; each++) CALL(CLOSE, each);
}

static void waiting(void)
{
  int p[2];
  CALL(PIPE, p);
  struct { int fd; short events, revents; } f[2] = {{p[0], 1, 0}, {p[1], 4, 0}};
  TF(6, 7, f, 2, 0), TF(6, 271, f, 2, &none, 0, 8), TF(6, 271, f, 2, &none, &usr1, 8);
  u64 set = 1UL << p[1];
  TF(17, 23, p[1] + 1, 0, &set, 0, &none), TF(17, 270, p[1] + 1, 0, &set, 0, &none, 0);
  int e = T(291, 0), older = T(213, 1), ev = T(290, 3, 04000), ev2 = T(284, 1);
  struct { u32 events; u64 data; } __attribute__((packed)) event = {1, 42};
  TF(2, 233, e, 1, ev, &event), T(233, e, 1, ev, &event), OF(12, 8, 232, e, out, 4, 0);
  OF(12, 8, 281, e, out, 4, 0, 0, 8), OF(12, 8, 441, e, out, 4, &none, 0, 8);
  TF(2, 233, e, 3, ev, &event), TF(2, 233, e, 2, ev, 0);
  OF(8, 4, 0, ev, out, 8), TF(4, 1, ev, "1234567", 8);
  int t = T(283, 1, 04000);
  struct { struct time interval, value; } timer = {{0, 0}, {0, 1000000}};
  T(286, t, 0, &timer, out), T(287, t, out);
  T(35, &brief, 0), TF(3, 230, 1, 0, &brief, 0), TF(3, 230, 0, 1, &past, 0);
  P(201, 0), P(96, out, 0), P(228, 1, out), P(229, 1, out), P(100, out);
  struct { struct time interval, value; } later = {{0, 0}, {1000, 0}};
  on_signal(14, tick, 0, 0);
  T(36, 0, out), TF(7, 38, 0, &later, out), TF(1, 37, 0);
  struct time alarm_in[2] = {{0, 0}, {0, 20000}};
  CALL(SETITIMER, 0, alarm_in), TF(-1, 34);
  int id = 0;
  T(222, 1, 0, &id), TF(-1, 223, id, 0, &later, out), P(224, id, out), T(225, id), T(226, id), T(226, id);
  CALL(NANOSLEEP, &brief, 0);
  u64 mask = 1 << 11, old;
  T(14, 0, &mask, &old, 8), T(14, 1, &mask, &old, 8), TF(0, 13, 12, 0, out, 8);
  CALL(SIGPROCMASK, 0, &usr1, 0, 8);
  long me = CALL(GETPID), self = CALL(GETTID);
  struct { int signal, error, code, pad; u64 rest[14]; } info = {10, 0, -1, 0, {0}};
  TF(-1, 62, me, 10), TF(3, 200, self, 10), TF(7, 234, me, self, 10), TF(3, 129, me, 10, &info);
  TF(7, 297, me, self, 10, &info);
  T(127, out, 8), TF(12, 128, &usr1, 0, &none, 8), TF(12, 128, &usr1, 0, &none, 8), TF(4, 128, &usr1, 0, &none, 8);
  int sfd = T(289, -1, &usr1, 8, 04000), sfd2 = T(282, -1, &usr1, 8);
  TF(-1, 62, me, 10), OF(12, 5, 0, sfd, out, 128);
  long pid_fd = TF(1, 434, me, 0);
  TF(3, 424, pid_fd, 10, 0, 0);
  CALL(SIGPROCMASK, 0, &mask, 0, 8);
  on_signal(10, tick, 0, 0);
  TF(3, 130, &empty_set, 8);
  struct { void *sp; int flags, pad; u64 size; } alt = {out, 0, 0, 32768};
  TF(1, 131, &alt, 0), T(131, 0, out);
  alt.flags = 2, TF(1, 131, &alt, 0);
  static u32 word = 5;
  TF(3, 202, &word, 129, 1, 0, 0, 0), TF(3, 202, &word, 128, 4, 0, 0, 0), TF(11, 202, &word, 128, 5, &brief, 0, 0);
  TF(3, 202, &word, 132, 1, 1, &word, 5), TF(3, 202, &word, 131, 1, 1, &word, 0), TF(3, 202, &word, 133, 1, 1, &word, 0);
  int status = 0;
  long child = PF(-1, 57);
  if (child == 0) leave(3);
  PF(1, 61, child, out, 0, 0), put_number(*(int *)out), put("\n");
  child = CALL(VFORK);
  if (child == 0) leave(4);
  put_number(58), show(SIGN, child, 0), put("\n");
  TF(3, 247, 1, child, out, 4, 0), put_number(((int *)out)[2] * 1000 + ((int *)out)[6]), put("\n");
  T(247, 0, 0, out, 5, 0), T(61, -1, &status, 1, 0);
  put_number(ticks), put("\n");
  for (int each = 3; each < 64; each++) CALL(CLOSE, each);
  (void)older, (void)ev2, (void)sfd2;
}

static volatile u32 gone;
static void nothing(void *argument) { (void)argument; }

static void memory(void)
{
  char *p = (char *)PF(-1, 9, 0, 65536, 3, 0x22, -1, 0);
  TF(7, 10, p, 4096, 1), PF(3, 25, p, 65536, 32768, 1), T(26, p, 4096, 4), TF(3, 27, p, 8192, out), TF(7, 28, p, 4096, 4);
  T(149, p, 4096), T(150, p, 4096), T(325, p, 4096, 0), TF(1, 151, 1), T(152), TF(3, 11, p, 32768), PF(1, 12, 0);
  P(9, 0, 0, 3, 0x22, -1, 0), T(9, 0, 4096, 3, 0, -1, 0), T(11, 1, 1), T(10, 1, 1, 1), T(25, 1, 1, 1, 1), T(28, 1, 1, 4);
  long segment = PF(7, 29, 0, 8192, 01600);
  char *q = (char *)PF(3, 30, segment, 0, 0);
  OF(0, 3, 31, segment, 2, out), TF(1, 67, q), TF(3, 31, segment, 0, 0);
  long set = PF(7, 64, 0, 2, 01600), queue = PF(3, 68, 0, 01600);
  short values[2] = {3, 4};
  struct { short number, operation, flags; } up = {1, 1, 04000};
  struct { long kind; char text[8]; } message = {7, "seven"};
  T(66, set, 0, 17, values), OF(4, 7, 66, set, 0, 13, out), T(65, set, &up, 1), T(220, set, &up, 1, &brief);
  TF(5, 69, queue, &message, 6, 04000), OF(14, 21, 70, queue, out, 8, 0, 04000), T(71, queue, 2, out);
  TF(7, 66, set, 0, 0), TF(3, 71, queue, 0);
}

static void process(char *program)
{
  T(24), P(39), P(186), P(110), P(111), P(102), P(104), P(107), P(108), P(121, 0), P(124, 0);
  T(98, 0, out), P(99, out), O(0, 63, out), P(309, out, out + 8, 0);
  T(97, 7, out), TF(3, 160, 4, &none), OF(16, 1, 302, 0, 3, 0, out), TF(3, 302, 0, 6, 0, out);
  T(140, 0, 0), TF(3, 141, 0, 0, 0), T(143, 0, out), T(145, 0), TF(1, 142, 0, &empty_set), TF(1, 144, 0, 0, &empty_set);
  T(146, 1), T(147, 1), P(148, 0, out), PF(2, 204, 0, 128, out), TF(5, 203, 0, 0, out);
  u64 processors[16] = {~0UL};
  CALL(204, 0, 128, processors), TF(3, 203, 0, 128, processors);
  TF(-1, 135, 0), TF(1, 157, 15, "name"), OF(5, 1, 157, 16, out), TF(-1, 157, 4, 1), TF(1, 157, 3), TF(3, 157, 39);
  OF(0, 1, 158, 0x1003, out), TF(1, 158, 0x1002, 0), T(158, 0x1234, 0);
  struct { u32 version, pid; } head = {0x20080522, 0};
  u32 sets[6];
  OF(24, 0, 125, &head, out), CALL(125, &head, sets), TF(0, 126, &head, sets);
  T(115, 0, out), T(115, 77, out), T(116, 1, &usr1), P(112), T(324, 0, 0), PF(2, 318, out, 16, 0);
  TF(1, 273, kept, 24), TF(1, 274, 0, out, out + 8), PF(1, 218, kept + 32), TF(-1, 219);
  T(118, out, out + 4, out + 8), T(120, out, out + 4, out + 8);
  /* a thread, a process, and programs that cannot be */
  char *stack = (char *)CALL(MMAP, 0, 65536, 3, 0x22, -1, 0);
  put_number(56), show(SIGN, thread(nothing, 0, stack + 65536, &gone), 0), put("\n");
  join(&gone);
  TF(-1, 56, 0x10000, 0, 0, 0, 0), TF(-1, 56, 0x800, 0, 0, 0, 0);
  u64 arguments[11] = {0, 0, 0, 0, 17};
  long child = PF(-1, 435, arguments, 88);
  if (child == 0) leave(5);
  PF(1, 61, child, out, 0, 0), put_number(*(int *)out), put("\n");
  PF(-1, 435, arguments, 8), T(435, 0, 88);
  char *words[] = {program, 0, 0};
  T(59, "none", words, 0), T(59, "/", words, 0), T(59, program, 8, 0), T(59, program, words, 8);
  T(322, -100, "none", words, 0, 0), T(322, -100, program, 8, 0, 0), T(322, -100, program, words, 0, 77);
  flush();
  child = CALL(FORK);
  if (child == 0) {
    /* what ends as it was: given up for good only here */
    T(105, 0), T(106, 0), T(113, -1, -1), T(114, -1, -1), T(117, -1, -1, -1), T(119, -1, -1, -1);
    PF(1, 122, 0), PF(1, 123, 0), T(117, 5, 5, 5), T(102), T(118, out, out + 4, out + 8), T(105, 0);
    flush();
    words[1] = "executed";
    put_number(59), put(" 0\n"), flush();
    CALL(EXECVE, program, words, 0);
    leave(1);
  }
  CALL(WAIT4, child, 0, 0, 0);
  child = CALL(FORK);
  if (child == 0) {
    words[1] = "executed";
    put_number(322), put(" 0\n"), flush();
    CALL(322, -100, program, words, 0, 0);
    leave(1);
  }
  CALL(WAIT4, child, 0, 0, 0);
  child = CALL(FORK);
  if (child == 0) TF(3, 109, 0, 0), T(161, "dir"), T(80, "/"), O(2, 79, out, 10), flush(), leave(0);
  CALL(WAIT4, child, 0, 0, 0);
}

int payload(int argc, char **argv, char **envp)
{
  (void)envp;
  if (argc == 2) return text("executed\n"), 0;
  if (argc != 4) return text("calls good|bad|SEED DIRECTORY PROGRAM\n"), 2;
  seed = parse(argv[1]);
  bad_too = seed ? 2 : same(argv[1], "bad");
  CALL(80, argv[2]);
  edge = (char *)CALL(MMAP, 0x500000000000, 12288, 3, 0x32, -1, 0) + 4096;
  CALL(MPROTECT, edge, 8192, 0);
  on_signal(13, (void *)1, 0, 0), on_signal(25, (void *)1, 0, 0);
  /* no length may fill the disk */
  const u64 most[2] = {1 << 20, 1 << 20};
  CALL(160, 1, most);
  files();
  sockets();
  waiting();
  memory();
  process(argv[3]);
  flush();
  put_number(60), put(" 0\n"), put_number(231), put(" 0\n"), put_number(15), put(" 0\n"), flush();
  long child = CALL(FORK);
  if (child == 0) for (;;) CALL(EXIT, 6);
  CALL(WAIT4, child, out, 0, 0);
  say("exit", *(int *)out);
  leave(7);
}
