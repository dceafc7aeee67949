#include "internal.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int64_t value_at(const bertile_tensor *tensor, int64_t index) {
    switch (tensor->dtype) {
    case BERTILE_INT8: return ((const int8_t *)tensor->data)[index];
    case BERTILE_INT16: return ((const int16_t *)tensor->data)[index];
    case BERTILE_INT32: return ((const int32_t *)tensor->data)[index];
    case BERTILE_UINT8: return ((const uint8_t *)tensor->data)[index];
    case BERTILE_UINT16: return ((const uint16_t *)tensor->data)[index];
    case BERTILE_UINT32: return ((const uint32_t *)tensor->data)[index];
    default: return ((const int64_t *)tensor->data)[index];
    }
}

/* The shape as Python writes it: (2, 3), and (3,) of one axis. */
static const char *shape_text(const bertile_tensor *tensor, char text[200]) {
    int used = snprintf(text, 200, "(");
    for (int axis = 0; axis < tensor->rank && used < 160; axis++)
        used += snprintf(text + used, 200 - (size_t)used, "%s%" PRId64, axis ? ", " : "",
                         tensor->shape[axis]);
    snprintf(text + used, 200 - (size_t)used, tensor->rank == 1 ? ",)" : ")");
    return text;
}

static void list_names(const bt_manifest *manifest, char text[400]) {
    size_t used = 0;
    *text = 0;
    for (size_t i = 0; i < manifest->input_count && used < 400; i++)
        used += (size_t)snprintf(text + used, 400 - used, "%s%s", i ? ", " : "",
                                 manifest->inputs[i].name);
}

static bertile_status check_array(const bertile_tensor *tensor) {
    if (tensor->rank != 2)
        return bt_fail(BERTILE_INPUT,
                       "%s has %d dimension%s; give (batch, length), for one text [ids]",
                       tensor->name, tensor->rank, tensor->rank == 1 ? "" : "s");
    if (tensor->dtype < BERTILE_INT8 || tensor->dtype > BERTILE_UINT64)
        return bt_fail(BERTILE_INPUT, "%s does not hold integers; give integers", tensor->name);
    if (!tensor->shape || !tensor->data)
        return bt_fail(BERTILE_INPUT, "%s has no shape or no data", tensor->name);
    return BERTILE_OK;
}

/* What a missing array holds in a column; 0 where it must not be missing. */
static int64_t filled(bt_fill fill, int64_t column) {
    return fill == BT_FILL_PLACES ? column : fill == BT_FILL_ONES;
}

/* What tokenizers give to every model: one that has no such input takes what changes nothing. */
static bt_fill neutral(const char *name) {
    static const struct {
        const char *name;
        bt_fill fill;
    } known[] = {{"attention_mask", BT_FILL_ONES},
                 {"token_type_ids", BT_FILL_ZEROS},
                 {"position_ids", BT_FILL_PLACES}};
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (!strcmp(known[i].name, name)) return known[i].fill;
    return BT_FILL_NONE;
}

static size_t place_of(const bt_manifest *manifest, const char *name) {
    size_t place = 0;
    while (place < manifest->input_count && strcmp(manifest->inputs[place].name, name)) place++;
    return place;
}

static bertile_status check_neutral(const bt_manifest *manifest, const bertile_tensor *tensor) {
    static const char *const words[] = {"", "all zeros", "all ones", "0, 1, 2, …"};
    char known[400];
    bt_fill fill = neutral(tensor->name);
    int64_t length = tensor->shape[1], count = tensor->shape[0] * length;
    for (int64_t i = 0; i < count; i++) {
        if (value_at(tensor, i) == filled(fill, i % length)) continue;
        list_names(manifest, known);
        return bt_fail(BERTILE_INPUT, "the model has no input '%s', which is not %s; known: %s",
                       tensor->name, words[fill], known);
    }
    return BERTILE_OK;
}

static bertile_status sort_inputs(const bt_manifest *manifest, const bertile_tensor *inputs,
                                  size_t count, bt_request *request) {
    char known[400];
    list_names(manifest, known);
    for (size_t i = 0; i < count; i++) {
        const char *name = inputs[i].name ? inputs[i].name : "";
        size_t place = place_of(manifest, name);
        int without = place == manifest->input_count;
        if (without && neutral(name) == BT_FILL_NONE)
            return bt_fail(BERTILE_INPUT, "the model has no input '%s'; known: %s", name, known);
        if (!without && request->given[place])
            return bt_fail(BERTILE_INPUT, "the input %s is given twice", name);
        bertile_status status = check_array(&inputs[i]);
        if (status) return status;
        if (!without) request->given[place] = &inputs[i];
    }
    for (size_t i = 0; i < manifest->input_count; i++)
        if (!request->given[i] && manifest->inputs[i].fill == BT_FILL_NONE)
            return bt_fail(BERTILE_INPUT, "the input %s is missing", manifest->inputs[i].name);
    if (!count) return bt_fail(BERTILE_INPUT, "no input was given; known: %s", known);
    return BERTILE_OK;
}

static bertile_status check_shapes(const bt_manifest *manifest, const bertile_tensor *inputs,
                                   size_t count) {
    char text[200], other[200];
    const int64_t *shape = inputs[0].shape;
    if (shape[0] < 1 || shape[1] < 1)
        return bt_fail(BERTILE_INPUT, "%s has shape %s; give at least one row and one token",
                       inputs[0].name, shape_text(&inputs[0], text));
    for (size_t i = 1; i < count; i++)
        if (memcmp(inputs[i].shape, shape, 2 * sizeof *shape))
            return bt_fail(BERTILE_INPUT, "%s has shape %s, but %s has %s", inputs[i].name,
                           shape_text(&inputs[i], text), inputs[0].name,
                           shape_text(&inputs[0], other));
    if (shape[0] > INT32_MAX / shape[1])
        return bt_fail(BERTILE_INPUT, "%s has shape %s; give fewer rows", inputs[0].name,
                       shape_text(&inputs[0], text));
    if (manifest->max_length && shape[1] > manifest->max_length)
        return bt_fail(BERTILE_INPUT,
                       "the input has %" PRId64 " tokens, the model takes at most %" PRId64
                       "; shorten or split the text",
                       shape[1], manifest->max_length);
    return BERTILE_OK;
}

static bertile_status check_range(const bt_input *spec, const bertile_tensor *tensor) {
    int64_t length = tensor->shape[1], count = tensor->shape[0] * length;
    for (int64_t i = 0; i < count; i++) {
        int64_t value = value_at(tensor, i);
        if (value >= 0 && value <= spec->limit) continue;
        char text[32];
        snprintf(text, sizeof text, tensor->dtype == BERTILE_UINT64 ? "%" PRIu64 : "%" PRId64,
                 value);
        return bt_fail(BERTILE_INPUT,
                       "%s[%" PRId64 ", %" PRId64 "] is %s, the model takes 0 to %" PRId64,
                       spec->name, i / length, i % length, text, spec->limit);
    }
    return BERTILE_OK;
}

static bertile_status check_static(const bt_manifest *manifest, int64_t length, int masked) {
    int64_t width = manifest->static_length;
    if (!width || length == width || (length < width && masked)) return BERTILE_OK;
    return bt_fail(BERTILE_INPUT, "the input has %" PRId64 " tokens, this bundle takes %s %" PRId64,
                   length, length > width ? "at most" : "exactly", width);
}

static bertile_status check_rows(const bt_manifest *manifest, int64_t rows) {
    int64_t exactly = manifest->static_batch;
    if (!manifest->together || !exactly || rows == exactly) return BERTILE_OK;
    return bt_fail(BERTILE_INPUT,
                   "the input has %" PRId64 " rows, this bundle takes exactly %" PRId64
                   ": its outputs depend on all of them",
                   rows, exactly);
}

/* Find the end of every row: behind its last token whose mask is not 0, at least 1. */
static bertile_status find_ends(const bertile_tensor *mask, bt_request *request) {
    request->ends = malloc((size_t)request->batch * sizeof *request->ends);
    if (!request->ends) return bt_no_memory();
    for (int64_t row = 0; row < request->batch; row++) {
        int64_t end = request->length;
        while (mask && end > 1 && !value_at(mask, row * request->length + end - 1)) end--;
        request->ends[row] = end;
    }
    return BERTILE_OK;
}

bertile_status bt_check_inputs(const bt_manifest *manifest, const bertile_tensor *inputs,
                               size_t count, bt_request *request) {
    const bertile_tensor *mask = NULL;
    int masked = 0;
    *request = (bt_request){0};
    bertile_status status = sort_inputs(manifest, inputs, count, request);
    if (!status) status = check_shapes(manifest, inputs, count);
    for (size_t i = 0; i < manifest->input_count && !status; i++) {
        if (request->given[i]) status = check_range(&manifest->inputs[i], request->given[i]);
        if (strcmp(manifest->inputs[i].name, "attention_mask")) continue;
        if (manifest->padded) continue;
        mask = request->given[i];
        masked = 1;
    }
    for (size_t i = 0; i < count && !status; i++)
        if (place_of(manifest, inputs[i].name) == manifest->input_count)
            status = check_neutral(manifest, &inputs[i]);
    if (!status) status = check_static(manifest, inputs[0].shape[1], masked);
    if (!status) status = check_rows(manifest, inputs[0].shape[0]);
    if (status) return status;
    request->batch = inputs[0].shape[0];
    request->length = inputs[0].shape[1];
    return find_ends(mask, request);
}

void bt_fit(const bt_input *spec, const bertile_tensor *given, const bt_request *request,
            int64_t first, int64_t rows, int64_t step, int64_t width, void *out) {
    for (int64_t row = 0; row < step; row++)
        for (int64_t column = 0; column < width; column++) {
            int64_t value = 0, place = row * width + column;
            if (row < rows && column < request->length)
                value = given ? value_at(given, (first + row) * request->length + column)
                              : filled(spec->fill, column);
            if (spec->bits == 64)
                ((int64_t *)out)[place] = value;
            else
                ((int32_t *)out)[place] = (int32_t)value;
        }
}

int64_t bt_blocks(const bt_request *request, int64_t first, int64_t rows, int64_t step,
                  int64_t block_tokens, int32_t *table) {
    int64_t total = 0;
    for (int64_t row = 0; row < step; row++) { /* rows of padding have one token */
        int64_t end = row < rows ? request->ends[first + row] : 1;
        int64_t count = (end + block_tokens - 1) / block_tokens;
        for (int64_t block = 0; table && block < count; block++) {
            int32_t *line = table + 4 * (total + block);
            line[0] = (int32_t)row;
            line[1] = (int32_t)(block * block_tokens);
            line[2] = (int32_t)total;
            line[3] = (int32_t)count;
        }
        total += count;
    }
    return total;
}
