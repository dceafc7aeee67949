/* A thread for each model: TVM has one pool for each calling thread, which cannot grow, and whose
 * workers are gone after a fork. A new thread has a new pool, and the caller's stays as it is. */
#include "internal.h"

#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Give the calling thread a pool of `threads` threads. */
static bertile_status size_pool(int32_t threads) {
    cpu_set_t set;
    int known = !sched_getaffinity(0, sizeof set, &set);
    size_t core = 0;
    char (*texts)[12] = calloc((size_t)threads, sizeof *texts);
    bt_any *cores = calloc((size_t)threads, sizeof *cores), list = {0}, none = {0};
    bertile_status status = texts && cores ? BERTILE_OK : bt_no_memory();
    for (int32_t i = 0; i < threads && !status; i++, core++) {
        while (known && core < CPU_SETSIZE && !CPU_ISSET(core, &set)) core++;
        snprintf(texts[i], sizeof *texts, "%zu", core);
        cores[i] = bt_text(texts[i]);
    }
    if (!status) status = bt_call(bt_functions[BT_ARRAY], cores, threads, &list);
    /* -3: as many threads as the list is long, and they may share those cores */
    if (!status) {
        bt_any arguments[] = {bt_integer(-3), bt_integer(threads), list};
        status = bt_call(bt_functions[BT_CONFIG_POOL], arguments, 3, &none);
    }
    bt_release(&none);
    bt_release(&list);
    free(cores);
    free(texts);
    return status;
}

static void *run(void *data) {
    bt_worker *worker = data;
    bertile_status ready = size_pool(worker->threads);
    pthread_mutex_lock(&worker->lock);
    for (;;) {
        while (worker->state != BT_ASKED && worker->state != BT_STOP)
            pthread_cond_wait(&worker->changed, &worker->lock);
        if (worker->state == BT_STOP) break;
        pthread_mutex_unlock(&worker->lock);
        bertile_status status = ready ? ready : worker->work(worker->data);
        pthread_mutex_lock(&worker->lock);
        worker->status = status;
        if (status) memcpy(worker->message, bertile_error(), sizeof worker->message);
        worker->state = BT_DONE;
        pthread_cond_broadcast(&worker->changed);
    }
    pthread_mutex_unlock(&worker->lock);
    return NULL;
}

static bertile_status start(bt_worker *worker) {
    pthread_attr_t attributes;
    pthread_mutex_init(&worker->lock, NULL);
    pthread_cond_init(&worker->changed, NULL);
    worker->state = BT_IDLE;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, 8 << 20); /* musl's own would be 128 KB */
    int failed = pthread_create(&worker->thread, &attributes, run, worker);
    pthread_attr_destroy(&attributes);
    if (failed)
        return bt_fail(BERTILE_FAILED, "cannot start a thread: %s", strerror(failed));
    worker->process = bt_process();
    return BERTILE_OK;
}

bertile_status bt_work_on(bt_worker *worker, bt_work work, void *data) {
    bertile_status status = worker->process == bt_process() ? BERTILE_OK : start(worker);
    if (status) return status;
    pthread_mutex_lock(&worker->lock);
    worker->work = work;
    worker->data = data;
    worker->state = BT_ASKED;
    pthread_cond_broadcast(&worker->changed);
    while (worker->state != BT_DONE) pthread_cond_wait(&worker->changed, &worker->lock);
    worker->state = BT_IDLE;
    status = worker->status;
    pthread_mutex_unlock(&worker->lock);
    return status ? bt_fail(status, "%s", worker->message) : BERTILE_OK;
}

void bt_stop_worker(bt_worker *worker) {
    if (worker->process != bt_process()) return; /* it never ran, or ran in the parent of a fork */
    pthread_mutex_lock(&worker->lock);
    worker->state = BT_STOP;
    pthread_cond_broadcast(&worker->changed);
    pthread_mutex_unlock(&worker->lock);
    pthread_join(worker->thread, NULL);
    pthread_mutex_destroy(&worker->lock);
    pthread_cond_destroy(&worker->changed);
    worker->process = 0;
}
