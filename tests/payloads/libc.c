/*
 * What C libraries do with a kernel: threads, condition variables, thread-local storage, jumps out
 * of handlers, floating point across signals, posix_spawn, popen, large allocations, cancellation.
 * Prints the same natively and in a monitor.
 */
#include <math.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

extern char **environ;

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t condition = PTHREAD_COND_INITIALIZER;
static int total;
static __thread int mine;
static sigjmp_buf place;
static volatile double sum;

static void *work(void *argument)
{
  (void)argument;
  for (int i = 0; i < 500; i++) {
    pthread_mutex_lock(&mutex);
    total++, mine++;
    pthread_cond_signal(&condition);
    pthread_mutex_unlock(&mutex);
  }
  return (void *)(long)mine;
}

static void *rest(void *argument)
{
  for (;;) pause();
  return argument;
}

static void jump(int signal)
{
  siglongjmp(place, signal);
}

static void compute(int signal)
{
  for (int i = 0; i < 100; i++) sum = sqrt(sum + i + signal);
}

static void threads(void)
{
  pthread_t thread[4];
  long own = 0;
  void *result;
  for (int i = 0; i < 4; i++) pthread_create(&thread[i], 0, work, 0);
  pthread_mutex_lock(&mutex);
  while (total < 1500) pthread_cond_wait(&condition, &mutex);
  pthread_mutex_unlock(&mutex);
  for (int i = 0; i < 4; i++) pthread_join(thread[i], &result), own += (long)result;
  printf("%d %ld\n", total, own);
  pthread_create(&thread[0], 0, rest, 0);
  pthread_cancel(thread[0]);
  pthread_join(thread[0], &result);
  printf("canceled %d\n", result == PTHREAD_CANCELED);
}

static void processes(void)
{
  char *words[] = {"/bin/echo", "spawned", 0}, line[64] = "";
  pid_t child;
  int status;
  fflush(stdout);
  if (!posix_spawn(&child, words[0], 0, 0, words, environ)) waitpid(child, &status, 0);
  printf("%d\n", status);
  printf("missing: %d\n", posix_spawn(&child, "/nonexistent", 0, 0, words, environ));
  FILE *file = popen("echo popened", "r");
  if (!fgets(line, sizeof line, file)) puts("nothing");
  printf("%s%d\n", line, pclose(file));
}

int main(void)
{
  double x = 1.5;
  struct timespec start, end;
  threads();
  signal(SIGSEGV, jump);
  if (!sigsetjmp(place, 1)) *(volatile int *)8 = 1;
  puts("caught");
  signal(SIGUSR1, compute);
  for (int i = 0; i < 20; i++) x *= 1.01, raise(SIGUSR1);
  printf("%.9f %.9f\n", x, sum);
  processes();
  clock_gettime(CLOCK_MONOTONIC, &start);
  usleep(20000);
  clock_gettime(CLOCK_MONOTONIC, &end);
  printf("%d\n", (end.tv_sec - start.tv_sec) * 1000000000L + end.tv_nsec - start.tv_nsec >= 20000000);
  char *big = malloc(64 << 20);
  for (long i = 0; i < 64 << 20; i += 4096) big[i] = 1;
  big = realloc(big, 128 << 20);
  printf("%d\n", big[4096] + big[(64 << 20) - 4096]);
  free(big);
  return 0;
}
