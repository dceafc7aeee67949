/* A fork waits until no thread is within TVM, whose locks a child would find locked for ever, and
 * holds back what would enter meanwhile. */
#include "internal.h"

#include <string.h>

static pthread_once_t once = PTHREAD_ONCE_INIT;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* of all below; a fork has it throughout */
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static int failed;        /* why forks cannot be waited for */
static int64_t inside;    /* calls within TVM, or about to be */
static int64_t forks;     /* that wait for these */
static uint64_t process = 1;

static void before_fork(void) {
    pthread_mutex_lock(&lock);
    forks++;
    while (inside) pthread_cond_wait(&changed, &lock);
}

static void after_fork_in_parent(void) {
    forks--;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
}

static void after_fork_in_child(void) {
    forks = 0; /* nor is there another thread that waits */
    process++;
    pthread_cond_init(&changed, NULL);
    pthread_mutex_unlock(&lock);
}

static void register_hooks(void) {
    failed = pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child);
}

bertile_status bt_enter(void) {
    pthread_once(&once, register_hooks);
    if (failed) return bt_fail(BERTILE_FAILED, "forks cannot be waited for: %s", strerror(failed));
    pthread_mutex_lock(&lock);
    while (forks) pthread_cond_wait(&changed, &lock);
    inside++;
    pthread_mutex_unlock(&lock);
    return BERTILE_OK;
}

void bt_leave(void) {
    pthread_mutex_lock(&lock);
    if (!--inside && forks) pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
}

uint64_t bt_process(void) { return process; }
