/* What a compiled library takes and gives, in lines: loading/interface.py shows them. The library
 * has the text; it is written here again from the manifest and the header of the weights. */
#include "internal.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void write_calls(FILE *out, const bt_manifest *manifest) {
    fprintf(out, "lanes %" PRId64 "\nmax_length %" PRId64 "\n", manifest->lanes,
            manifest->max_length);
    fprintf(out, "static %" PRId64 " %" PRId64 " %d %d\n", manifest->static_batch,
            manifest->static_length, manifest->together, manifest->padded);
    for (size_t i = 0; i < manifest->input_count; i++) {
        const bt_input *input = &manifest->inputs[i];
        fprintf(out, "input %s int%d %" PRId64 " %s\n", input->name, input->bits, input->below,
                bt_fill_name(input->fill));
    }
    for (size_t i = 0; i < manifest->output_count; i++) {
        const bt_output *output = &manifest->outputs[i];
        fprintf(out, "output %s %s", output->name, output->type);
        for (int axis = 0; axis < output->rank; axis++)
            if (output->axes[axis] == BT_AXIS_FIXED)
                fprintf(out, " %" PRId64, output->sizes[axis]);
            else
                fputs(output->axes[axis] == BT_AXIS_BATCH ? " batch" : " length", out);
        fputc('\n', out);
    }
}

static void write_weights(FILE *out, const json *names, const bt_params *params) {
    const json *name = names->first;
    for (size_t i = 0; i < params->count && name; i++, name = name->next) {
        const bt_dltensor *tensor = &params->managed[i].tensor;
        fprintf(out, "weight %s %s", name->text, bt_dtype_name(tensor));
        for (int axis = 0; axis < tensor->rank; axis++)
            fprintf(out, " %" PRId64, params->shapes[i][axis]);
        fputc('\n', out);
    }
}

/* The first line of `text` that is not so in `other`, in quotes cut to 200 characters. */
static void differing_line(const char *text, const char *other, char line[200]) {
    const char *start = text;
    for (; *text && *text == *other; text++, other++)
        if (*text == '\n') start = text + 1;
    size_t length = strcspn(start, "\n");
    snprintf(line, 200, "%.*s", length > 199 ? 199 : (int)length, *start ? start : "nothing more");
}

bertile_status bt_check_interface(const char *said, const bt_manifest *manifest,
                                  const bt_params *params) {
    char *wanted = NULL, ours[200], theirs[200];
    size_t size = 0;
    FILE *out = open_memstream(&wanted, &size);
    if (!out) return bt_no_memory();
    write_calls(out, manifest);
    write_weights(out, manifest->params, params);
    int failed = ferror(out);
    failed |= fclose(out);
    bertile_status status = failed ? bt_no_memory() : BERTILE_OK;
    if (!status && strcmp(said, wanted)) {
        differing_line(said, wanted, ours);
        differing_line(wanted, said, theirs);
        status = bt_fail(BERTILE_FAILED,
                         "it was compiled for '%s', the manifest or the weights say '%s'; compile "
                         "the bundle again",
                         ours, theirs);
    }
    free(wanted);
    return status;
}

bertile_status bt_check_ids(const bt_manifest *manifest, const bt_params *params) {
    int64_t most = 0;
    for (size_t i = 0; i < params->count; i++)
        for (int axis = 0; axis < params->managed[i].tensor.rank; axis++)
            if (params->shapes[i][axis] > most) most = params->shapes[i][axis];
    for (size_t i = 0; i < manifest->input_count; i++) {
        const bt_input *input = &manifest->inputs[i];
        if (!strcmp(input->name, "attention_mask") || input->below <= most) continue;
        return bt_fail(BERTILE_FAILED,
                       "the manifest is damaged: %s has %" PRId64 " ids, and no weight has so many "
                       "rows; compile the bundle again",
                       input->name, input->below);
    }
    return BERTILE_OK;
}
