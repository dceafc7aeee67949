#include "internal.h"

#include <stdlib.h>
#include <string.h>

size_t bt_item_size(bertile_dtype dtype) {
    static const unsigned char sizes[] = {0, 1, 2, 4, 8, 1, 2, 4, 8, 2, 4, 8};
    return sizes[dtype];
}

/* The dtype of a tensor of TVM, or 0. */
static bertile_dtype dtype_of(const bt_dltensor *tensor) {
    static const bertile_dtype known[3][4] = {
        {BERTILE_INT8, BERTILE_INT16, BERTILE_INT32, BERTILE_INT64},
        {BERTILE_UINT8, BERTILE_UINT16, BERTILE_UINT32, BERTILE_UINT64},
        {0, BERTILE_FLOAT16, BERTILE_FLOAT32, BERTILE_FLOAT64},
    };
    int size = tensor->bits == 8 ? 0 : tensor->bits == 16 ? 1 : tensor->bits == 32 ? 2 : 3;
    return tensor->code < 3 && tensor->lanes == 1 && tensor->bits <= 64 ? known[tensor->code][size]
                                                                        : (bertile_dtype)0;
}

bertile_result *bt_make_result(const bt_manifest *manifest) {
    bertile_result *result = calloc(1, sizeof *result);
    size_t count = manifest->output_count, names = 0;
    for (size_t i = 0; i < count; i++) names += strlen(manifest->outputs[i].name) + 1;
    if (result) result->tensors = calloc(count, sizeof *result->tensors);
    if (result) result->shapes = calloc(1, count * sizeof *result->shapes + names);
    if (!result || !result->tensors || !result->shapes) {
        bertile_free(result);
        return NULL;
    }
    char *name = (char *)(result->shapes + count);
    for (size_t i = 0; i < count; i++) {
        result->tensors[i].name = strcpy(name, manifest->outputs[i].name);
        name += strlen(name) + 1;
    }
    result->count = count;
    return result;
}

/* Whether a piece is as the manifest says of one that was computed as (step, width). */
static int is_as_said(const bt_output *spec, const bt_dltensor *piece, int64_t step,
                      int64_t width) {
    if (dtype_of(piece) != spec->dtype || piece->rank != spec->rank) return 0;
    for (int axis = 0; axis < spec->rank; axis++) {
        int64_t size = spec->axes[axis] == BT_AXIS_BATCH    ? step
                       : spec->axes[axis] == BT_AXIS_LENGTH ? width
                                                            : spec->sizes[axis];
        if (piece->shape[axis] != size) return 0;
    }
    return 1;
}

/* Give an output its memory once its first piece has shown its dtype and its fixed axes. */
static bertile_status allocate(bertile_tensor *tensor, int64_t *shape, const bt_output *spec,
                               const bt_dltensor *piece, const bt_request *request) {
    size_t size = bt_item_size(tensor->dtype = dtype_of(piece));
    for (int axis = 0; axis < spec->rank; axis++) {
        shape[axis] = spec->axes[axis] == BT_AXIS_BATCH    ? request->batch
                      : spec->axes[axis] == BT_AXIS_LENGTH ? request->length
                                                           : piece->shape[axis];
        if (!bt_times(&size, shape[axis])) return bt_no_memory();
    }
    tensor->rank = spec->rank;
    tensor->shape = shape;
    tensor->data = bt_aligned(size);
    return tensor->data ? BERTILE_OK : bt_no_memory();
}

/* Copy `sizes` entries of each axis, where the last axes are whole on both sides in one piece. */
static void copy(char *to, const int64_t *to_shape, const char *from, const int64_t *from_shape,
                 const int64_t *sizes, int rank, size_t item) {
    size_t to_step = item, from_step = item;
    int whole = 1;
    for (int axis = 1; axis < rank; axis++) {
        to_step *= (size_t)to_shape[axis];
        from_step *= (size_t)from_shape[axis];
        whole &= sizes[axis] == to_shape[axis] && sizes[axis] == from_shape[axis];
    }
    if (!rank || whole) {
        memcpy(to, from, rank ? to_step * (size_t)sizes[0] : item);
        return;
    }
    for (int64_t i = 0; i < sizes[0]; i++)
        copy(to + to_step * (size_t)i, to_shape + 1, from + from_step * (size_t)i, from_shape + 1,
             sizes + 1, rank - 1, item);
}

bertile_status bt_place(bertile_result *result, const bt_output *spec, size_t index,
                        const bt_dltensor *piece, const bt_request *request, int64_t first,
                        int64_t rows, int64_t step, int64_t width) {
    bertile_tensor *tensor = &result->tensors[index];
    int64_t *shape = result->shapes[index], sizes[BT_RANK];
    size_t skip = 0, item;
    if (!is_as_said(spec, piece, step, width))
        return bt_fail(BERTILE_FAILED,
                       "the output %s is not what the manifest says; compile the bundle again",
                       spec->name);
    if (!tensor->data) {
        bertile_status status = allocate(tensor, shape, spec, piece, request);
        if (status) return status;
    }
    item = bt_item_size(tensor->dtype);
    int batched = 0;
    for (int axis = 0; axis < spec->rank; axis++) {
        int batch = spec->axes[axis] == BT_AXIS_BATCH;
        sizes[axis] = batch ? rows : shape[axis];
        batched |= batch;
        skip = skip * (size_t)shape[axis] + (batch ? (size_t)first : 0);
    }
    if (!batched && first) return BERTILE_OK; /* the same of every chunk */
    copy((char *)tensor->data + skip * item, shape, (const char *)piece->data + piece->offset,
         piece->shape, sizes, spec->rank, item);
    return BERTILE_OK;
}

/* Clear what lies behind the ends of an output whose axes are in another order. */
static void clear_entries(char **at, const bertile_tensor *tensor, const bt_output *spec, int axis,
                          const int64_t *place, const bt_request *request) {
    size_t item = bt_item_size(tensor->dtype);
    if (axis == tensor->rank) {
        if (place[BT_AXIS_LENGTH] >= request->ends[place[BT_AXIS_BATCH]]) memset(*at, 0, item);
        *at += item;
        return;
    }
    int64_t inner[BT_AXIS_KINDS];
    memcpy(inner, place, sizeof inner);
    int again = 0; /* rows and tokens are those of the first axis of their kind */
    for (int other = 0; other < axis; other++) again |= spec->axes[other] == spec->axes[axis];
    for (int64_t i = 0; i < tensor->shape[axis]; i++) {
        if (!again) inner[spec->axes[axis]] = i;
        clear_entries(at, tensor, spec, axis + 1, inner, request);
    }
}

static int has_axis(const bt_output *spec, bt_axis kind) {
    for (int axis = 0; axis < spec->rank; axis++)
        if (spec->axes[axis] == kind) return 1;
    return 0;
}

void bt_clear_tails(bertile_result *result, const bt_manifest *manifest,
                    const bt_request *request) {
    for (size_t i = 0; i < result->count; i++) {
        const bt_axis *axes = manifest->outputs[i].axes;
        const bertile_tensor *tensor = &result->tensors[i];
        const bt_output *spec = &manifest->outputs[i];
        if (!has_axis(spec, BT_AXIS_BATCH) || !has_axis(spec, BT_AXIS_LENGTH)) continue;
        if (axes[0] != BT_AXIS_BATCH || axes[1] != BT_AXIS_LENGTH) {
            char *at = (char *)tensor->data;
            const int64_t start[BT_AXIS_KINDS] = {0};
            clear_entries(&at, tensor, spec, 0, start, request);
            continue;
        }
        size_t step = bt_item_size(tensor->dtype);
        for (int axis = 2; axis < tensor->rank; axis++) step *= (size_t)tensor->shape[axis];
        for (int64_t row = 0; row < request->batch; row++) {
            int64_t end = request->ends[row], length = request->length;
            char *tail = (char *)tensor->data + step * (size_t)(row * length + end);
            memset(tail, 0, step * (size_t)(length - end));
        }
    }
}

const bertile_tensor *bertile_output(const bertile_result *result, size_t index) {
    return result && index < result->count ? &result->tensors[index] : NULL;
}

const bertile_tensor *bertile_find(const bertile_result *result, const char *name) {
    for (size_t i = 0; result && name && i < result->count; i++)
        if (!strcmp(result->tensors[i].name, name)) return &result->tensors[i];
    return NULL;
}

void bertile_free(bertile_result *result) {
    if (!result) return;
    for (size_t i = 0; i < result->count; i++) free((void *)result->tensors[i].data);
    free(result->tensors);
    free(result->shapes);
    free(result);
}
