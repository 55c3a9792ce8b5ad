/*
 * An HTTP server without libc, for a VM: `http PORT [FILE]` answers every request with "hello\n",
 * or with the content of FILE. It listens on [::] for IPv4 and IPv6, and uses general registers only.
 */
typedef unsigned long size_t;

#define SYS_read 0
#define SYS_write 1
#define SYS_open 2
#define SYS_close 3
#define SYS_socket 41
#define SYS_accept 43
#define SYS_bind 49
#define SYS_listen 50
#define SYS_exit_group 231

#define AF_INET6 10
#define SOCK_STREAM 1

struct address {
  unsigned short family;
  unsigned char port[2];
  unsigned int flow;
  unsigned char ip[16];
  unsigned int scope;
};

static long call(long number, long a, long b, long c)
{
  long result;
  __asm__ volatile("syscall"
                   : "=a"(result)
                   : "a"(number), "D"(a), "S"(b), "d"(c)
                   : "rcx", "r11", "memory");
  return result;
}

static void leave(int status)
{
  for (;;)
    call(SYS_exit_group, status, 0, 0);
}

static size_t length(const char *s)
{
  size_t n = 0;
  while (s[n])
    n++;
  return n;
}

static void send_all(int fd, const char *s, size_t n)
{
  while (n) {
    long done = call(SYS_write, fd, (long)s, n);
    if (done <= 0)
      return;
    s += done;
    n -= done;
  }
}

static void answer(int fd, const char *file)
{
  static const char head[] = "HTTP/1.0 200 OK\r\nContent-Type: text/plain\r\n\r\n";
  static char buffer[4096];
  call(SYS_read, fd, (long)buffer, sizeof buffer);
  send_all(fd, head, sizeof head - 1);
  if (!file) {
    send_all(fd, "hello\n", 6);
    return;
  }
  long content = call(SYS_open, (long)file, 0, 0);
  for (;;) {
    long n = call(SYS_read, content, (long)buffer, sizeof buffer);
    if (n <= 0)
      break;
    send_all(fd, buffer, n);
  }
  call(SYS_close, content, 0, 0);
}

static void serve(int argc, char **argv)
{
  struct address any = {.family = AF_INET6};
  unsigned port = 0;
  for (const char *digit = argc > 1 ? argv[1] : "80"; *digit; digit++)
    port = port * 10 + (*digit - '0');
  any.port[0] = port >> 8;
  any.port[1] = port & 255;
  long server = call(SYS_socket, AF_INET6, SOCK_STREAM, 0);
  if (server < 0)
    leave(2);
  if (call(SYS_bind, server, (long)&any, sizeof any) < 0)
    leave(3);
  if (call(SYS_listen, server, 16, 0) < 0)
    leave(4);
  static const char ready[] = "serving\n";
  call(SYS_write, 1, (long)ready, length(ready));
  for (;;) {
    long client = call(SYS_accept, server, 0, 0);
    if (client < 0)
      leave(5);
    answer(client, argc > 2 ? argv[2] : 0);
    call(SYS_close, client, 0, 0);
  }
}

__attribute__((used)) static void start(long *stack)
{
  serve((int)stack[0], (char **)(stack + 1));
}

__asm__(".globl _start\n_start:\n\txor %ebp,%ebp\n\tmov %rsp,%rdi\n\tand $-16,%rsp\n\tcall start\n");
