/* check_threads BUNDLE: four threads, a change of the threads and a fork get the same numbers. */
#include "bertile.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

enum { CASES = 6, CALLS = 30, LONGEST = 60 };

static bertile_model *model;
static float *wanted[CASES];
static size_t sizes[CASES];

static bertile_result *run(int number) {
    int64_t shape[] = {1 + number % 3, 1 + 11 * number}, ids[3 * LONGEST];
    for (int i = 0; i < 3 * LONGEST; i++) ids[i] = (7 * i + number) % 50;
    bertile_tensor input = {"input_ids", BERTILE_INT64, 2, shape, ids};
    bertile_result *result = NULL;
    if (bertile_run(model, &input, 1, &result)) {
        fprintf(stderr, "%s\n", bertile_error());
        exit(1);
    }
    return result;
}

static size_t bytes(const bertile_tensor *tensor) {
    size_t size = sizeof(float);
    for (int axis = 0; axis < tensor->rank; axis++) size *= (size_t)tensor->shape[axis];
    return size;
}

static int is_right(int number) {
    bertile_result *result = run(number);
    const bertile_tensor *hidden = bertile_find(result, "hidden");
    int same = bytes(hidden) == sizes[number] && !memcmp(hidden->data, wanted[number], sizes[number]);
    bertile_free(result);
    return same;
}

static void *call(void *start) {
    long wrong = 0;
    for (int i = 0; i < CALLS; i++) wrong += !is_right((*(int *)start + i) % CASES);
    /* an error of one thread is not seen in another */
    bertile_tensor none = {"nothing", BERTILE_INT64, 2, NULL, NULL};
    bertile_result *result = NULL;
    wrong += bertile_run(model, &none, 1, &result) != BERTILE_INPUT;
    wrong += strstr(bertile_error(), "no input 'nothing'") == NULL;
    return (void *)wrong;
}

int main(int count, char **words) {
    pthread_t threads[4];
    int starts[4], state;
    long wrong = 0;
    void *found;
    if (count < 2 || bertile_open(words[1], NULL, &model)) {
        fprintf(stderr, "%s\n", bertile_error());
        return 1;
    }
    for (int i = 0; i < CASES; i++) {
        bertile_result *result = run(i);
        const bertile_tensor *hidden = bertile_find(result, "hidden");
        sizes[i] = bytes(hidden);
        wanted[i] = malloc(sizes[i]);
        memcpy(wanted[i], hidden->data, sizes[i]);
        bertile_free(result);
    }
    for (int i = 0; i < 4; i++) {
        starts[i] = i;
        pthread_create(&threads[i], NULL, call, &starts[i]);
    }
    wrong += bertile_set_threads(model, 1) != BERTILE_OK || bertile_threads(model) != 1;
    for (int i = 0; i < 4; i++) {
        pthread_join(threads[i], &found);
        wrong += (long)found;
    }
    pid_t child = fork();
    if (!child) _exit(is_right(1) ? 0 : 1);
    wrong += waitpid(child, &state, 0) != child || !WIFEXITED(state) || WEXITSTATUS(state);
    wrong += bertile_set_threads(model, 1 << 20) != BERTILE_INPUT;
    wrong += !is_right(2);
    bertile_close(model);
    for (int i = 0; i < CASES; i++) free(wanted[i]);
    printf("%ld wrong\n", wrong);
    return wrong != 0;
}
