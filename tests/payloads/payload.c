/*
 * The payload of the end-to-end tests: a program without libc that uses general registers only, so that it
 * runs natively, in km and in krun's own monitor, with and without hardware virtualization.
 *
 *   payload args A…      each argument on a line        payload exit N     end with status N
 *   payload env          the environment                payload err TEXT   TEXT on standard error
 *   payload uname        the kernel's release           payload ids        uid gid pid
 *   payload cat          standard input to output       payload read FILE  the file's content
 *   payload nap          wait; SIGTERM ends with 42     payload wait       wait for ever, no handlers
 *   payload kill N       send itself signal N           payload write FILE TEXT
 *   payload talk         "talking", then as cat     payload notify TEXT…
 *
 * notify sends each TEXT to NOTIFY_SOCKET, 0.1 s apart, then does as nap.
 */
typedef unsigned long size_t;

#define SYS_read 0
#define SYS_write 1
#define SYS_open 2
#define SYS_rt_sigaction 13
#define SYS_rt_sigreturn 15
#define SYS_nanosleep 35
#define SYS_getpid 39
#define SYS_socket 41
#define SYS_connect 42
#define SYS_kill 62
#define SYS_uname 63
#define SYS_getuid 102
#define SYS_getgid 104
#define SYS_exit_group 231

static long call(long number, long a, long b, long c, long d)
{
  long result;
  register long r10 __asm__("r10") = d;
  __asm__ volatile("syscall"
                   : "=a"(result)
                   : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10)
                   : "rcx", "r11", "memory");
  return result;
}

static void leave(int status)
{
  for (;;)
    call(SYS_exit_group, status, 0, 0, 0);
}

static size_t length(const char *s)
{
  size_t n = 0;
  while (s[n])
    n++;
  return n;
}

static void write_to(int fd, const char *s, size_t n)
{
  while (n) {
    long done = call(SYS_write, fd, (long)s, n, 0);
    if (done <= 0)
      leave(9);
    s += done;
    n -= done;
  }
}

static void line(int fd, const char *s)
{
  write_to(fd, s, length(s));
  write_to(fd, "\n", 1);
}

static int same(const char *a, const char *b)
{
  while (*a && *a == *b)
    a++, b++;
  return *a == *b;
}

static int number(const char *s)
{
  int n = 0;
  while (*s >= '0' && *s <= '9')
    n = n * 10 + *s++ - '0';
  return n;
}

static void put_number(long n)
{
  char digits[24];
  int at = 24;
  do
    digits[--at] = '0' + n % 10;
  while (n /= 10);
  write_to(1, digits + at, 24 - at);
}

static void copy(int fd)
{
  static char buffer[4096];
  long n;
  while ((n = call(SYS_read, fd, (long)buffer, sizeof buffer, 0)) > 0)
    write_to(1, buffer, n);
  if (n < 0)
    leave(8);
}

static volatile int ended;

static void on_term(int signal)
{
  ended = signal;
}

__asm__(".globl restorer\nrestorer:\n  mov $15, %eax\n  syscall\n");
extern void restorer(void);

static struct {
  void (*handler)(int);
  unsigned long flags;
  void (*restorer)(void);
  unsigned long mask;
} action;

static void nap(void)
{
  long fifty_ms[2] = {0, 50 * 1000 * 1000};
  call(SYS_nanosleep, (long)fifty_ms, 0, 0, 0);
}

static void wait_for_term(void)
{
  action.handler = on_term;
  action.flags = 0x04000000; /* SA_RESTORER */
  action.restorer = restorer;
  call(SYS_rt_sigaction, 15, (long)&action, 0, 8);
  line(1, "napping");
  while (!ended)
    nap();
  leave(42);
}

static struct {
  unsigned short family;
  char path[108];
} address = {1, ""};

/* A socket connected to what NOTIFY_SOCKET names, as the last lines of sd_notify(3) do it. */
static long notify_socket(char **envp)
{
  static const char name[] = "NOTIFY_SOCKET=";
  size_t n = 0;
  for (; *envp; envp++) {
    const char *a = *envp, *b = name;
    while (*b && *a == *b)
      a++, b++;
    if (*b)
      continue;
    for (; a[n] && n < sizeof address.path - 1; n++)
      address.path[n] = a[n];
    long fd = call(SYS_socket, 1, 2, 0, 0);
    if (fd < 0 || call(SYS_connect, fd, (long)&address, 2 + n + 1, 0) < 0)
      leave(7);
    return fd;
  }
  leave(8);
  return -1;
}

static char names[6][65];

__attribute__((used)) static void start(long *stack)
{
  int argc = stack[0];
  char **argv = (char **)(stack + 1), **envp = argv + argc + 1;
  const char *word = argc > 1 ? argv[1] : "args";
  if (same(word, "args")) {
    for (int i = 2; i < argc; i++)
      line(1, argv[i]);
  } else if (same(word, "exit") && argc > 2) {
    leave(number(argv[2]));
  } else if (same(word, "err") && argc > 2) {
    line(2, argv[2]);
  } else if (same(word, "env")) {
    for (; *envp; envp++)
      line(1, *envp);
  } else if (same(word, "uname")) {
    call(SYS_uname, (long)names, 0, 0, 0);
    line(1, names[2]);
  } else if (same(word, "ids")) {
    static const long calls[] = {SYS_getuid, SYS_getgid, SYS_getpid};
    for (int i = 0; i < 3; i++) {
      put_number(call(calls[i], 0, 0, 0, 0));
      write_to(1, i < 2 ? " " : "\n", 1);
    }
  } else if (same(word, "cat")) {
    copy(0);
  } else if (same(word, "talk")) {
    line(1, "talking");
    copy(0);
  } else if (same(word, "read") && argc > 2) {
    long fd = call(SYS_open, (long)argv[2], 0, 0, 0);
    if (fd < 0)
      leave(7);
    copy(fd);
  } else if (same(word, "write") && argc > 3) {
    long fd = call(SYS_open, (long)argv[2], 01 | 0100 | 02000, 0644, 0);
    if (fd < 0)
      leave(7);
    line(fd, argv[3]);
  } else if (same(word, "nap")) {
    wait_for_term();
  } else if (same(word, "notify")) {
    long fd = notify_socket(envp);
    for (int i = 2; i < argc; i++) {
      call(SYS_write, fd, (long)argv[i], length(argv[i]), 0); /* nobody may listen any more */
      nap(), nap();
    }
    wait_for_term();
  } else if (same(word, "wait")) {
    line(1, "waiting");
    for (;;)
      nap();
  } else if (same(word, "kill") && argc > 2) {
    call(SYS_kill, call(SYS_getpid, 0, 0, 0, 0), number(argv[2]), 0, 0);
    nap();
    leave(6);
  } else {
    line(2, "payload: unknown word");
    leave(64);
  }
  leave(0);
}

__asm__(".globl _start\n_start:\n  mov %rsp, %rdi\n  and $-16, %rsp\n  call start\n");
