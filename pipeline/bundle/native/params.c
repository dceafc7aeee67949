#include "internal.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* safetensors' names of what can be stored, and DLPack's */
static const struct {
    const char *name;
    int code, bits;
} dtypes[] = {
    {"F64", 2, 64}, {"F32", 2, 32}, {"F16", 2, 16}, {"BF16", 4, 16}, {"BOOL", 6, 8},
    {"I64", 0, 64}, {"I32", 0, 32}, {"I16", 0, 16}, {"I8", 0, 8},
    {"U64", 1, 64}, {"U32", 1, 32}, {"U16", 1, 16}, {"U8", 1, 8},
};

const char *bt_dtype_name(const bt_dltensor *tensor) {
    size_t kind = 0, last = sizeof dtypes / sizeof *dtypes - 1;
    while (kind < last && (dtypes[kind].code != tensor->code || dtypes[kind].bits != tensor->bits))
        kind++;
    return dtypes[kind].name;
}

static const char *read_shape(const json *entry, int64_t *shape, int64_t *count) {
    const json *sizes = json_get_kind(entry, "shape", JSON_ARRAY);
    if (!sizes || sizes->count > BT_RANK) return "a tensor has no shape";
    *count = 1;
    int axis = 0;
    for (const json *size = sizes->first; size; size = size->next, axis++) {
        if (size->kind != JSON_INTEGER || size->integer < 0) return "a tensor has a negative size";
        shape[axis] = size->integer;
        if (size->integer && *count > INT64_MAX / 64 / size->integer) return "a tensor is too large";
        *count *= size->integer;
    }
    return NULL;
}

/* Make the tensor of one entry; `start` is where the header of the file ends. */
static const char *read_tensor(const json *entry, size_t start, size_t index, bt_params *params) {
    const json *dtype = json_get_kind(entry, "dtype", JSON_STRING);
    const json *offsets = json_get_kind(entry, "data_offsets", JSON_ARRAY);
    int64_t count, *shape = params->shapes[index], room = (int64_t)(params->mapping.size - start);
    size_t kind = 0, kinds = sizeof dtypes / sizeof *dtypes;
    while (dtype && kind < kinds && strcmp(dtypes[kind].name, dtype->text)) kind++;
    if (!dtype || kind == kinds) return "a tensor has an unknown dtype";
    const char *wrong = read_shape(entry, shape, &count);
    if (wrong) return wrong;
    if (!offsets || offsets->count != 2 || offsets->first->kind != JSON_INTEGER ||
        offsets->first->next->kind != JSON_INTEGER)
        return "a tensor has no data_offsets";
    int64_t begin = offsets->first->integer, end = offsets->first->next->integer;
    if (begin < 0 || begin > end || end > room || (end - begin) != count * (dtypes[kind].bits / 8))
        return "a tensor reaches beyond its bytes";
    if ((start + (size_t)begin) % BT_ALIGNMENT) return "a tensor does not start on 64 bytes";
    void *data = (void *)(params->mapping.data + start + begin);
    int32_t rank = (int32_t)json_get(entry, "shape")->count;
    bt_any *tensor = &params->tensors[index];
    if (bt_tensor(&params->managed[index], data, rank, shape, dtypes[kind].code, dtypes[kind].bits,
                  tensor))
        return bertile_error();
    return NULL;
}

static const char *read_header(const char *path, const json *names, bt_params *params,
                               json **header, char *why) {
    size_t size = 0;
    if (bt_map(path, &params->mapping)) return strerror(errno);
    const unsigned char *data = params->mapping.data;
    if (params->mapping.size >= 8)
        for (int i = 7; i >= 0; i--) size = size << 8 | data[i];
    if (params->mapping.size < 8 || size > params->mapping.size - 8)
        return "its header is longer than the file";
    if (!(*header = json_parse((const char *)data + 8, size, why))) return why;
    if ((*header)->kind != JSON_OBJECT) return "its header is no object";
    params->tensors = calloc(names->count + 1, sizeof *params->tensors);
    params->managed = calloc(names->count + 1, sizeof *params->managed);
    params->shapes = calloc(names->count + 1, sizeof *params->shapes);
    if (!params->tensors || !params->managed || !params->shapes) return "out of memory";
    for (const json *name = names->first; name; name = name->next) {
        const json *entry = json_get_kind(*header, name->text, JSON_OBJECT);
        if (!entry) return "it lacks a tensor";
        const char *wrong = read_tensor(entry, 8 + size, params->count, params);
        if (wrong) return wrong;
        params->count++;
    }
    return NULL;
}

bertile_status bt_read_params(const char *path, const json *names, bt_params *params) {
    json *header = NULL;
    char why[100];
    *params = (bt_params){0};
    const char *wrong = read_header(path, names, params, &header, why);
    bertile_status status = BERTILE_OK;
    if (wrong)
        status = bt_fail(BERTILE_FAILED, "%s is damaged: %s; compile the bundle again", path, wrong);
    json_free(header);
    return status;
}

void bt_free_params(bt_params *params) {
    for (size_t i = 0; i < params->count; i++) bt_release(&params->tensors[i]);
    free(params->tensors);
    free(params->managed);
    free(params->shapes);
    bt_unmap(&params->mapping);
    *params = (bt_params){0};
}
