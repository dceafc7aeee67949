/* check_forks BUNDLE CHILD: forks while threads call, open and close models; each child does what
 * CHILD says and must end by itself. Prints how many children did not, or got other numbers. */
#include "bertile.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

enum { CALLERS = 3, FORKS = 12, TOKENS = 60, SECONDS = 20, DONE = 7 };

static const char *directory;
static bertile_model *model, *other;
static float wanted[8];
static atomic_int stop;

static int get(bertile_model *from, float *numbers) {
    int64_t shape[] = {8, TOKENS}, ids[8 * TOKENS];
    for (int i = 0; i < 8 * TOKENS; i++) ids[i] = 7 * i % 50;
    bertile_tensor input = {"input_ids", BERTILE_INT64, 2, shape, ids};
    bertile_result *result = NULL;
    if (bertile_run(from, &input, 1, &result)) {
        fprintf(stderr, "%s\n", bertile_error());
        return 0;
    }
    memcpy(numbers, bertile_find(result, "pooled")->data, sizeof wanted);
    bertile_free(result);
    return 1;
}

static int is_right(bertile_model *from) {
    float numbers[8];
    return get(from, numbers) && !memcmp(numbers, wanted, sizeof wanted);
}

static bertile_model *open_again(void) {
    bertile_model *again = NULL;
    if (bertile_open(directory, NULL, &again)) fprintf(stderr, "%s\n", bertile_error());
    return again;
}

static void *call(void *from) {
    long wrong = 0;
    while (!stop) wrong += !is_right(from);
    return (void *)wrong;
}

static void *open_and_close(void *unused) {
    long wrong = 0;
    while (!stop) {
        bertile_model *again = open_again();
        wrong += !again || !is_right(again);
        bertile_close(again);
    }
    return unused ? unused : (void *)wrong;
}

static pid_t start(const char *what) {
    pid_t pid = fork();
    if (pid) return pid;
    int right = 1, state;
    alarm(SECONDS); /* a child that hangs is killed, which its state tells */
    if (!strcmp(what, "calls")) right = is_right(model) && is_right(other) && is_right(model);
    if (!strcmp(what, "closes")) bertile_close(model);
    if (!strcmp(what, "calls and closes")) right = is_right(model), bertile_close(model);
    if (!strcmp(what, "changes threads"))
        right = !bertile_set_threads(model, 1) && bertile_threads(model) == 1 && is_right(model);
    if (!strcmp(what, "opens")) {
        bertile_model *again = open_again();
        right = again && is_right(again);
        bertile_close(again);
    }
    if (!strcmp(what, "forks")) {
        pid_t child = start("calls");
        right = is_right(model) && waitpid(child, &state, 0) == child && WIFEXITED(state) &&
                WEXITSTATUS(state) == DONE;
    }
    exit(right ? DONE : 1); /* with all that is to be done at the end of a process */
}

int main(int count, char **words) {
    pthread_t threads[CALLERS + 1];
    pid_t children[FORKS];
    long wrong = 0;
    void *state;
    int ended;
    if (count < 3) return 2;
    directory = words[1];
    model = open_again();
    other = open_again();
    if (!model || !other || !get(model, wanted)) return 1;
    for (int i = 0; i < CALLERS; i++)
        pthread_create(&threads[i], NULL, call, i % 2 ? other : model);
    pthread_create(&threads[CALLERS], NULL, open_and_close, NULL);
    for (int i = 0; i < FORKS; i++) {
        usleep(1000 * (unsigned)(i % 4));
        children[i] = start(words[2]);
    }
    for (int i = 0; i < FORKS; i++)
        wrong += waitpid(children[i], &ended, 0) != children[i] || !WIFEXITED(ended) ||
                 WEXITSTATUS(ended) != DONE;
    stop = 1;
    for (int i = 0; i <= CALLERS; i++) {
        pthread_join(threads[i], &state);
        wrong += (long)state;
    }
    wrong += !is_right(model);
    bertile_close(other);
    bertile_close(model);
    printf("%ld wrong\n", wrong);
    return wrong != 0;
}
