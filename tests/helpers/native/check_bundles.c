/* check_bundles RUNTIME, with lines "bundle PATH" and "arrays PATH" to its input: opens each, runs
 * two rows on a bundle, and prints the code with a message, or 0 with all numbers. */
#include "command/arrays.h"

#include <stdio.h>
#include <string.h>

static bertile_status run(const char *path, const char *runtime) {
    const int64_t ids[] = {1, 2, 3, 4, 5, 0}, mask[] = {1, 1, 1, 1, 1, 0}, shape[] = {2, 3};
    const bertile_tensor inputs[] = {{"input_ids", BERTILE_INT64, 2, shape, ids},
                                     {"attention_mask", BERTILE_INT64, 2, shape, mask}};
    bertile_options options = {.size = sizeof options, .threads = 1, .runtime = runtime};
    bertile_model *model = NULL;
    bertile_result *result = NULL;
    bertile_status status = bertile_open(path, &options, &model);
    if (!status) status = bertile_run(model, inputs, 2, &result);
    if (status) printf("%d %s", status, bertile_error());
    for (size_t i = 0; !status && bertile_output(result, i); i++) {
        const bertile_tensor *output = bertile_output(result, i);
        int64_t count = 1;
        for (int axis = 0; axis < output->rank; axis++) count *= output->shape[axis];
        printf(i ? " | %s" : "0 %s", output->name);
        for (int64_t at = 0; at < count && output->dtype == BERTILE_FLOAT32; at++)
            printf(" %.9g", (double)((const float *)output->data)[at]);
    }
    bertile_free(result);
    bertile_close(model);
    return status;
}

static bertile_status read_all(const char *path) {
    bt_array *arrays = NULL;
    size_t count = 0;
    bertile_status status = bt_read_arrays(path, &arrays, &count);
    if (status)
        printf("%d %s", status, bertile_error());
    else
        printf("0 %zu", count);
    bt_free_arrays(arrays, count);
    return status;
}

int main(int count, char **words) {
    static char line[8192];
    while (count > 1 && fgets(line, sizeof line, stdin)) {
        line[strcspn(line, "\n")] = 0;
        const char *path = strchr(line, ' ') + 1;
        if (!strncmp(line, "bundle", 6))
            run(path, words[1]);
        else
            read_all(path);
        putchar('\n');
        fflush(stdout); /* what is read next may be the last */
    }
    return 0;
}
