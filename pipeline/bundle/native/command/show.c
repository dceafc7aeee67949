#include "show.h"

#include "arrays.h"

#include <math.h>
#include <stdio.h>

static const char *word(const json *object, const char *key) {
    const json *found = json_get_kind(object, key, JSON_STRING);
    return found ? found->text : "unknown";
}

void show_model(const bertile_model *model, const json *manifest, double took) {
    const json *source = json_get(manifest, "model"), *target = json_get(manifest, "target");
    printf("model    %s (%s, %s", word(source, "source"), word(source, "family"),
           word(source, "head"));
    if (bertile_max_length(model)) printf(", at most %lld tokens", (long long)bertile_max_length(model));
    printf(")\ntarget   %s (%s", word(target, "name"), word(target, "arch"));
    for (const json *one = json_get(target, "features")->first; one; one = one->next)
        printf(" %s", one->text);
    printf(")\nloaded   in %.0f ms, %d threads\n", took * 1e3, bertile_threads(model));
}

static double number_at(const bertile_tensor *tensor, size_t index) {
    switch (tensor->dtype) {
    case BERTILE_FLOAT32: return ((const float *)tensor->data)[index];
    case BERTILE_FLOAT64: return ((const double *)tensor->data)[index];
    case BERTILE_INT64: return (double)((const int64_t *)tensor->data)[index];
    case BERTILE_INT32: return ((const int32_t *)tensor->data)[index];
    default: return 0;
    }
}

void show_tensor(const char *kind, const bertile_tensor *tensor, int values) {
    size_t count = bt_tensor_bytes(tensor) / bt_item_size(tensor->dtype);
    printf("%s %s (", kind, tensor->name);
    for (int axis = 0; axis < tensor->rank; axis++)
        printf("%s%lld", axis ? ", " : "", (long long)tensor->shape[axis]);
    printf(tensor->rank == 1 ? ",)" : ")");
    for (size_t i = 0; values && i < 4 && i < count; i++)
        printf("%s%.4f", i ? ", " : ": ", number_at(tensor, i));
    printf(values && count > 4 ? ", …\n" : "\n");
}

bertile_status show_outputs(const bertile_result *result) {
    for (size_t i = 0; i < result->count; i++) {
        const bertile_tensor *tensor = bertile_output(result, i);
        size_t count = bt_tensor_bytes(tensor) / bt_item_size(tensor->dtype);
        show_tensor("output  ", tensor, 1);
        for (size_t place = 0; place < count; place++)
            if (!isfinite(number_at(tensor, place)))
                return bt_fail(BERTILE_FAILED, "the output %s is not finite", tensor->name);
    }
    return BERTILE_OK;
}
