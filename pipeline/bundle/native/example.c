/* Open a bundle, run one text's ids on it, print the first numbers: example BUNDLE */
#include <stdio.h>

#include "bertile.h"

int main(int count, char **arguments) {
    const int64_t ids[] = {101, 7592, 2088, 102}, shape[] = {1, 4};
    const bertile_tensor input = {"input_ids", BERTILE_INT64, 2, shape, ids};
    bertile_model *model = NULL;
    bertile_result *result = NULL;
    bertile_status status = bertile_open(count > 1 ? arguments[1] : ".", NULL, &model);
    if (!status) status = bertile_run(model, &input, 1, &result);
    if (!status) {
        const bertile_tensor *output = bertile_output(result, 0);
        printf("%s:", output->name);
        for (int i = 0; i < 4 && output->dtype == BERTILE_FLOAT32; i++)
            printf(" %.4f", ((const float *)output->data)[i]);
        printf("\n");
    } else {
        fprintf(stderr, "example: %s\n", bertile_error());
    }
    bertile_free(result);
    bertile_close(model);
    return (int)status;
}
