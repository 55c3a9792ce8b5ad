/*
 * km stand-in for tests: takes the command line of the Kontain Monitor, refuses what it refuses,
 * writes down what it was given, and then runs the payload natively. It is no monitor.
 *
 * Where it differs from the real km on purpose:
 *  - the payload runs by execve on the host kernel: signals, pid 1 and uname are the kernel's own;
 *  - a string of more than 4096 bytes is refused (2); the real km silently cuts it;
 *  - options of gdb, core dumps, management and tracing are checked and written down, not acted upon;
 *  - a snapshot (ET_CORE) is written down and not resumed (status 0).
 *
 * The record is one JSON object a line, appended to /km-record if that file exists where km runs.
 */
#define _GNU_SOURCE
#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <grp.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/wait.h>
#include <unistd.h>

#define RECORD "/km-record"
#define KM_LOGGING 731
#define NOFILE_NEEDED 737
#define STRING_MAX 4096
#define STRINGS_MAX (128 * 1024)
#define KVM_GET_API_VERSION 0xAE00
#define KVM_API_VERSION 12
#define KKM_IDENTITY_REQUEST 0xAEFF
#define KKM_IDENTITY 0x6B6B6D

extern char **environ;

enum {
  OPT_LOG_TO = 256, OPT_COPYENV, OPT_1G_ON, OPT_1G_OFF, OPT_OVERCOMMIT, OPT_CORE_ON_ERR, OPT_DUMP_SHUTDOWN,
  OPT_SNAPSHOT, OPT_MGTPIPE, OPT_WAIT, OPT_GDB_LISTEN, OPT_GDB_DYNLINK, OPT_VENDORID, OPT_KILL_SCALL,
};

static const struct option options[] = {
  {"verbose", optional_argument, 0, 'V'},
  {"km-log-to", required_argument, 0, 'k'},
  {"log-to", required_argument, 0, OPT_LOG_TO},
  {"putenv", required_argument, 0, 'e'},
  {"copyenv", required_argument, 0, OPT_COPYENV},
  {"virt-device", required_argument, 0, 'F'},
  {"membus-width", required_argument, 0, 'P'},
  {"enable-1g-pages", no_argument, 0, OPT_1G_ON},
  {"disable-1g-pages", no_argument, 0, OPT_1G_OFF},
  {"overcommit-memory", no_argument, 0, OPT_OVERCOMMIT},
  {"coredump", required_argument, 0, 'C'},
  {"core-on-err", no_argument, 0, OPT_CORE_ON_ERR},
  {"dump-shutdown", no_argument, 0, OPT_DUMP_SHUTDOWN},
  {"snapshot", required_argument, 0, OPT_SNAPSHOT},
  {"mgtpipe", required_argument, 0, OPT_MGTPIPE},
  {"wait-for-signal", no_argument, 0, OPT_WAIT},
  {"gdb-server-port", optional_argument, 0, 'g'},
  {"gdb-listen", no_argument, 0, OPT_GDB_LISTEN},
  {"gdb-dynlink", no_argument, 0, OPT_GDB_DYNLINK},
  {"hcall-stats", no_argument, 0, 'S'},
  {"vendorid", no_argument, 0, OPT_VENDORID},
  {"kill-unimpl-scall", no_argument, 0, OPT_KILL_SCALL},
  {"version", no_argument, 0, 'v'},
  {0, 0, 0, 0},
};
static const char short_options[] = "+V::k:e:F:P:C:g::SvA";

static FILE *km_log;
static char log_path[64];

/* km's own log: a dup of a terminal or file at fd 2; for a pipe or socket a file made at the first line. */
static void say(const char *format, ...)
{
  if (!km_log && log_path[0]) {
    km_log = fopen(log_path, "we");
    if (!km_log)
      km_log = stderr;
  }
  if (!km_log)
    return;
  va_list arguments;
  va_start(arguments, format);
  vfprintf(km_log, format, arguments);
  va_end(arguments);
  fputc('\n', km_log);
  fflush(km_log);
}

#define fail(status, ...) do { say(__VA_ARGS__); exit(status); } while (0)

static void usage(void)
{
  fprintf(stderr, "km: Kontain Monitor usage (km stand-in for tests): km [options] payload [args]\n");
  exit(1);
}

static void crash(void)
{
  signal(SIGSEGV, SIG_DFL);
  *(volatile int *)8 = 0;
}

static void open_log(const char *target)
{
  struct rlimit limit;
  getrlimit(RLIMIT_NOFILE, &limit);
  struct stat status;
  if (fstat(2, &status) < 0 && !target)
    return;
  if (target && !strcmp(target, "none"))
    return;
  if (limit.rlim_cur < NOFILE_NEEDED) {
    fprintf(stderr, "km: Assertion `fd == KM_LOGGING' failed.\n");
    abort();
  }
  if (!target && (S_ISFIFO(status.st_mode) || S_ISSOCK(status.st_mode))) {
    snprintf(log_path, sizeof log_path, "/tmp/km_%d.log", getpid());
    return;
  }
  int fd = 2;
  if (target && strcmp(target, "stderr")) {
    fd = open(target, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    if (fd < 0) {
      fprintf(stderr, "km: Assertion `fd == KM_LOGGING' failed.\n");
      abort();
    }
  }
  km_log = fdopen(fcntl(fd, F_DUPFD_CLOEXEC, KM_LOGGING), "w");
}

/* JSON */

static char *text;
static size_t used, room;

static void put(const char *format, ...)
{
  va_list arguments;
  for (;;) {
    va_start(arguments, format);
    int n = vsnprintf(text + used, room - used, format, arguments);
    va_end(arguments);
    if (used + n < room) {
      used += n;
      return;
    }
    room = (room + n) * 2 + 65536;
    text = realloc(text, room);
  }
}

static void put_string(const char *string)
{
  put("\"");
  for (; *string; string++) {
    unsigned char c = *string;
    if (c == '"' || c == '\\')
      put("\\%c", c);
    else if (c < 0x20)
      put("\\u%04x", c);
    else
      put("%c", c);
  }
  put("\"");
}

static void put_strings(const char *name, char *const *strings)
{
  put("\"%s\": [", name);
  for (int i = 0; strings[i]; i++) {
    put(i ? ", " : "");
    put_string(strings[i]);
  }
  put("], ");
}

static void put_pair(const char *name, const char *value)
{
  put("\"%s\": ", name);
  put_string(value);
  put(", ");
}

/* The lines of /proc/self/status that say what the runtime set. */
static void put_status(void)
{
  static const char *const wanted[] = {"CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs",
                                       "Seccomp", "Umask", "SigBlk", "SigIgn", "Groups", "NSpid"};
  FILE *file = fopen("/proc/self/status", "re");
  char line[4096];
  put("\"status\": {");
  int count = 0;
  while (file && fgets(line, sizeof line, file))
    for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++) {
      size_t length = strlen(wanted[i]);
      if (strncmp(line, wanted[i], length) || line[length] != ':')
        continue;
      char *value = line + length + 1;
      value += strspn(value, " \t");
      value[strcspn(value, "\n")] = 0;
      for (char *end = value + strlen(value); end > value && end[-1] == ' ';)
        *--end = 0;
      put(count++ ? ", \"%s\": " : "\"%s\": ", wanted[i]);
      put_string(value);
    }
  put("}, ");
  if (file)
    fclose(file);
}

static void put_limits(void)
{
  static const char *const names[] = {"cpu", "fsize", "data", "stack", "core", "rss", "nproc", "nofile",
                                      "memlock", "as", "locks", "sigpending", "msgqueue", "nice", "rtprio", "rttime"};
  put("\"rlimits\": {");
  for (int i = 0; i < 16; i++) {
    struct rlimit limit;
    getrlimit(i, &limit);
    put("%s\"%s\": [%lld, %lld]", i ? ", " : "", names[i], (long long)limit.rlim_cur, (long long)limit.rlim_max);
  }
  put("}, ");
}

static void put_descriptors(int own)
{
  put("\"fds\": {");
  int count = 0;
  struct rlimit limit;
  getrlimit(RLIMIT_NOFILE, &limit);
  for (int fd = 0; fd < (int)limit.rlim_cur && fd < KM_LOGGING; fd++) {
    char name[64], target[PATH_MAX];
    snprintf(name, sizeof name, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(name, target, sizeof target - 1);
    if (n < 0 || fd == own)
      continue;
    target[n] = 0;
    put(count++ ? ", \"%d\": " : "\"%d\": ", fd);
    put_string(target);
  }
  put("}, ");
}

static int open_device(const char *wanted, const char **opened)
{
  static const char *const search[] = {"/dev/kontain", "/dev/kvm", "/dev/kkm"};
  if (wanted) {
    int fd = open(wanted, O_RDWR | O_CLOEXEC);
    if (fd < 0)
      fail(1, "KVM: Can't open device file %s: %s", wanted, strerror(errno));
    *opened = wanted;
    return fd;
  }
  int cause = ENOENT;
  for (int i = 0; i < 3; i++) {
    int fd = open(search[i], O_RDWR | O_CLOEXEC);
    if (fd >= 0) {
      *opened = search[i];
      return fd;
    }
    if (errno != ENOENT)
      cause = errno;
  }
  fail(1, "Can't open default device file: %s", strerror(cause));
}

/* km, its vCPU thread and the kernel's worker are three tasks of the pids cgroup. */
static void need_three_tasks(void)
{
  pid_t tasks[2] = {-1, -1};
  int cause[2] = {0, 0};
  for (int i = 0; i < 2; i++) {
    tasks[i] = fork();
    if (tasks[i] == 0) {
      pause();
      _exit(0);
    }
    cause[i] = errno;
  }
  for (int i = 0; i < 2; i++)
    if (tasks[i] > 0) {
      kill(tasks[i], SIGKILL);
      waitpid(tasks[i], NULL, 0);
    }
  if (tasks[0] < 0)
    fail(2, "Failed to start guest: %s", strerror(cause[0]));
  if (tasks[1] < 0)
    fail(1, "KVM: vcpu run failed with errno %d (%s)", cause[1], strerror(cause[1]));
}

static int has_prefix_of(const char *variable, const char *list)
{
  char *copy = strdup(list);
  for (char *word = strtok(copy, "="); word; word = strtok(NULL, "="))
    if (!strncmp(variable, word, strlen(word)))
      return 1;
  return 0;
}

static void check_sizes(char *const *strings, size_t *total)
{
  for (int i = 0; strings[i]; i++) {
    size_t length = strlen(strings[i]);
    if (length > STRING_MAX)
      fail(2, "string of %zu bytes (\"%.20s...\"): km cuts it at %d", length, strings[i], STRING_MAX);
    *total += length + 1;
  }
  if (*total > STRINGS_MAX)
    fail(2, "arguments and environment take %zu bytes, the limit is %d", *total, STRINGS_MAX);
}

static void check_handover(void)
{
  static const char *const names[] = {"KM_EXEC_VERS", "KM_EXEC_VMFDS", "KM_EXEC_EVENTFDS",
                                      "KM_EXEC_GUESTFDS", "KM_EXEC_PIDINFO", "KM_EXEC_GDBINFO"};
  int found = 0;
  for (int i = 0; i < 6; i++)
    found += getenv(names[i]) != NULL;
  if (found == 6)
    fail(2, "bad exec state");
  if (found) {
    fprintf(stderr, "km: Assertion `KM_EXEC state is whole' failed.\n");
    abort();
  }
}

/* The file km loads: the payload, or the interpreter its first line names. Says whether it is a snapshot. */
static int check_payload(char **path, char ***argv)
{
  char head[513] = {0};
  for (int level = 0;; level++) {
    struct stat status;
    int fd = open(*path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
      fail(2, "Cannot open %s: %s", *path, strerror(errno));
    fstat(fd, &status);
    if (S_ISDIR(status.st_mode))
      fail(2, "Cannot read EHDR %s: Is a directory", *path);
    memset(head, 0, sizeof head);
    ssize_t n = read(fd, head, sizeof head - 1);
    close(fd);
    if (n < 2)
      fail(2, "Failed to read even 2 bytes from %s", *path);
    if (level == 0 && !strncmp(head, "#!", 2)) {
      head[strcspn(head, "\n")] = 0;
      size_t length = strcspn(head + 2, " \t");
      char *interpreter = strndup(head + 2, length);
      char *rest = head + 2 + length;
      rest += strspn(rest, " \t");
      int count = 0;
      while ((*argv)[count])
        count++;
      char **longer = calloc(count + 3, sizeof *longer);
      int at = 0;
      longer[at++] = interpreter;
      if (*rest)
        longer[at++] = strdup(rest);
      memcpy(longer + at, *argv, count * sizeof **argv);
      *argv = longer;
      *path = interpreter;
      continue;
    }
    if (n < (ssize_t)sizeof(Elf64_Ehdr))
      fail(2, "Cannot read EHDR %s", *path);
    const Elf64_Ehdr *header = (const void *)head;
    if (memcmp(header->e_ident, ELFMAG, SELFMAG))
      fail(2, "EHDR magic number mismatch %s", *path);
    if (header->e_ident[EI_CLASS] != ELFCLASS64 || header->e_machine != EM_X86_64)
      fail(2, "%s is not an x86-64 ELF file", *path);
    if (header->e_type != ET_EXEC && header->e_type != ET_DYN && header->e_type != ET_CORE)
      fail(2, "%s: ELF type %d", *path, header->e_type);
    return header->e_type == ET_CORE;
  }
}

int main(int argc, char **argv)
{
  const char *log_target = getenv("KM_LOGTO"), *device = NULL, *copyenv = NULL, *log_to = NULL;
  char **given = calloc(argc + 1, sizeof *given);
  int given_count = 0, wait_for_signal = 0, version = 0, named_files = 0, c;

  if (access("/proc/self/maps", F_OK) < 0 || fcntl(0, F_GETFD) < 0 || fcntl(1, F_GETFD) < 0)
    crash();
  while ((c = getopt_long(argc, argv, short_options, options, NULL)) != -1) {
    if (c == '?' || c == 'A')
      continue;
    if (c == 'k')
      log_target = optarg;
  }
  open_log(log_target);
  check_handover();

  optind = 0;
  while ((c = getopt_long(argc, argv, short_options, options, NULL)) != -1)
    switch (c) {
    case '?':
    case 'A':
      usage();
      break;
    case 'e':
      given[given_count++] = optarg;
      break;
    case OPT_COPYENV:
      if (!*optarg)
        crash();
      if (copyenv)
        usage();
      copyenv = optarg;
      break;
    case 'F':
      device = optarg;
      break;
    case 'P': {
      char *end;
      long width = strtol(optarg, &end, 10);
      if (*end || width < 32 || width > 39) {
        say("Guest memory bus width must be between 32 and 39 - got '%s'", optarg);
        usage();
      }
      break;
    }
    case 'v':
      version = 1;
      break;
    case OPT_SNAPSHOT:
    case OPT_MGTPIPE:
      named_files = 1;
      break;
    case OPT_LOG_TO:
      log_to = optarg;
      break;
    case OPT_WAIT:
      wait_for_signal = 1;
      break;
    }
  if (version) {
    say("km stand-in for tests, no Kontain Monitor");
    return 0;
  }
  if (given_count && copyenv) {
    say("Wrong options: '--putenv' cannot be used with '--copyenv'");
    usage();
  }
  const char *management = getenv("KM_MGTDIR");
  if (management && *management && named_files) {
    say("KM_MGTDIR cannot be used with --mgtpipe or --snapshot");
    usage();
  }
  if (optind >= argc)
    usage();

  char **payload_argv = argv + optind;
  char *path = payload_argv[0];
  char resolved[PATH_MAX], own[PATH_MAX];
  if (!*path || !realpath(path, resolved)) {
    say("Failed to determine payload name or find .km file for %s", path);
    usage();
  }
  ssize_t n = readlink("/proc/self/exe", own, sizeof own - 1);
  if (n < 0)
    fail(1, "realpath /proc/self/exe failed: %s", strerror(errno));
  own[n] = 0;
  if (access(own, F_OK) < 0)
    fail(1, "realpath /proc/self/exe failed: %s", strerror(errno));

  const char *opened = NULL;
  int fd = open_device(device, &opened);
  int api = ioctl(fd, KVM_GET_API_VERSION, 0);
  if (api < 0)
    fail(1, "KVM: get API version failed: %s", strerror(errno));
  if (api != KVM_API_VERSION)
    fail(1, "KVM: API version mismatch: %d", api);
  int kkm = ioctl(fd, KKM_IDENTITY_REQUEST, 0) == KKM_IDENTITY;
  close(fd);

  char **payload_env = calloc(10000, sizeof *payload_env);
  int env_count = 0;
  if (given_count)
    payload_env = given;
  else
    for (char **variable = environ; *variable && env_count < 9999; variable++)
      if (strncmp(*variable, "KM_MGTPIPE=", 11) && !(copyenv && has_prefix_of(*variable, copyenv)))
        payload_env[env_count++] = *variable;

  int snapshot = check_payload(&path, &payload_argv);
  if (snapshot && payload_argv[1])
    fail(1, "cannot set payload arguments when resuming a snapshot");
  size_t total = 0;
  check_sizes(payload_argv, &total);
  check_sizes(payload_env, &total);
  need_three_tasks();

  int record = open(RECORD, O_WRONLY | O_APPEND | O_CLOEXEC);
  if (record >= 0) {
    struct statvfs mount = {0};
    statvfs(own, &mount);
    char cwd[PATH_MAX] = "";
    if (!getcwd(cwd, sizeof cwd))
      strcpy(cwd, "?");
    put("{");
    put_strings("argv", argv);
    put_strings("env", environ);
    put_strings("payload_argv", payload_argv);
    put_strings("payload_env", payload_env);
    put_pair("cwd", cwd);
    put_pair("exe", own);
    put_pair("device", opened);
    put_pair("kind", kkm ? "kkm" : "kvm");
    put_status();
    put_limits();
    put_descriptors(record);
    put("\"exe_read_only\": %s, ", mount.f_flag & ST_RDONLY ? "true" : "false");
    put("\"terminal\": [%s, %s, %s], ", isatty(0) ? "true" : "false", isatty(1) ? "true" : "false",
        isatty(2) ? "true" : "false");
    put("\"uid\": %d, \"gid\": %d, \"pid\": %d, \"ppid\": %d, \"sid\": %d}\n", getuid(), getgid(), getpid(), getppid(), getsid(0));
    if (write(record, text, used) != (ssize_t)used)
      fail(2, "km stand-in: %s: %s", RECORD, strerror(errno));
    close(record);
  }
  if (snapshot) {
    say("km stand-in: %s is a snapshot; it is not resumed here", path);
    return 0;
  }
  if (log_to) {
    int out = open(log_to, O_WRONLY | O_CREAT, 0644);
    if (out < 0)
      fail(1, "Cannot open %s: %s", log_to, strerror(errno));
    dup2(out, 1);
    dup2(out, 2);
  }
  if (wait_for_signal) {
    sigset_t set;
    int number;
    sigemptyset(&set);
    sigaddset(&set, SIGUSR1);
    sigprocmask(SIG_BLOCK, &set, NULL);
    say("Waiting for kill -SIGUSR1 %d", getpid());
    sigwait(&set, &number);
    sigprocmask(SIG_UNBLOCK, &set, NULL);
  }
  /* The payload of a real km sees the descriptors 0, 1 and 2 alone. */
  for (int other = 3; other < 1024; other++)
    if (other != KM_LOGGING)
      fcntl(other, F_SETFD, FD_CLOEXEC);
  execve(path, payload_argv, payload_env);
  fail(2, "km stand-in: %s cannot be run natively: %s", path, strerror(errno));
}
