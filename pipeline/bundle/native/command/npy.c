/* One array in numpy's format (NEP 1): a magic, a header that is a Python dictionary, the data. */
#include "arrays.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char *const descriptions[] = {
    [BERTILE_INT8] = "|i1",    [BERTILE_INT16] = "<i2",   [BERTILE_INT32] = "<i4",
    [BERTILE_INT64] = "<i8",   [BERTILE_UINT8] = "|u1",   [BERTILE_UINT16] = "<u2",
    [BERTILE_UINT32] = "<u4",  [BERTILE_UINT64] = "<u8",  [BERTILE_FLOAT16] = "<f2",
    [BERTILE_FLOAT32] = "<f4", [BERTILE_FLOAT64] = "<f8",
};

size_t bt_tensor_bytes(const bertile_tensor *tensor) {
    size_t size = bt_item_size(tensor->dtype);
    for (int axis = 0; axis < tensor->rank; axis++) size *= (size_t)tensor->shape[axis];
    return size;
}

static int refuse(char *why, const char *what) {
    snprintf(why, 100, "%s", what);
    return -1;
}

static int read_shape(const char *header, bt_array *array) {
    const char *at = strstr(header, "'shape': (");
    if (!at) return -1;
    at += strlen("'shape': (");
    while (*at != ')') {
        char *end;
        long long size = strtoll(at, &end, 10);
        if (end == at || size < 0 || array->rank == BT_RANK) return -1;
        array->shape[array->rank++] = size;
        at = end + strspn(end, ", ");
    }
    return 0;
}

static int read_header(const char *header, bt_array *array, char *why) {
    const char *type = strstr(header, "'descr': '");
    if (!type || read_shape(header, array)) return refuse(why, "its header is damaged");
    type += strlen("'descr': '");
    if (strstr(header, "'fortran_order': True"))
        return refuse(why, "it is in column-major order; save numpy.ascontiguousarray of it");
    for (int i = BERTILE_INT8; i <= BERTILE_FLOAT64; i++)
        if (!strncmp(type, descriptions[i], 3) && type[3] == '\'') array->dtype = (bertile_dtype)i;
    if (!strncmp(type, "|b1'", 4)) array->dtype = BERTILE_UINT8;
    return array->dtype ? 0 : refuse(why, "its dtype is none that can be read; save int64");
}

int bt_parse_npy(const unsigned char *bytes, size_t size, bt_array *array, char *why) {
    char header[4096];
    if (size < 10 || memcmp(bytes, "\x93NUMPY", 6)) return refuse(why, "it is no .npy file");
    size_t start = bytes[6] == 1 ? 10 : 12, length = (size_t)(bytes[8] | bytes[9] << 8);
    if (start == 12 && size >= 12) length |= (size_t)bytes[10] << 16 | (size_t)bytes[11] << 24;
    if (length >= sizeof header || start + length > size) return refuse(why, "it is truncated");
    memcpy(header, bytes + start, length);
    header[length] = 0;
    if (read_header(header, array, why)) return -1;
    size_t wanted = bt_item_size(array->dtype), room = size - start - length;
    for (int axis = 0; axis < array->rank; axis++)
        if (!array->shape[axis]) wanted = 0;
    for (int axis = 0; axis < array->rank && wanted; axis++) {
        if (wanted > room / (size_t)array->shape[axis]) return refuse(why, "it is truncated");
        wanted *= (size_t)array->shape[axis];
    }
    if (wanted != room) return refuse(why, "it has more bytes than its shape");
    array->data = bt_aligned(wanted);
    if (!array->data) return refuse(why, "out of memory");
    memcpy(array->data, bytes + start + length, wanted);
    return 0;
}

size_t bt_npy_header(const bertile_tensor *tensor, char header[512]) {
    char shape[256];
    int used = 0;
    for (int axis = 0; axis < tensor->rank; axis++)
        used += snprintf(shape + used, sizeof shape - (size_t)used, "%s%lld", axis ? ", " : "",
                         (long long)tensor->shape[axis]);
    if (tensor->rank == 1) used += snprintf(shape + used, sizeof shape - (size_t)used, ",");
    shape[used] = 0;
    int length = snprintf(header + 10, 502,
                          "{'descr': '%s', 'fortran_order': False, 'shape': (%s), }",
                          descriptions[tensor->dtype], shape);
    size_t size = (10 + (size_t)length + 1 + 63) / 64 * 64;
    memset(header + 10 + length, ' ', size - 10 - (size_t)length);
    header[size - 1] = '\n';
    memcpy(header, "\x93NUMPY\x01\x00", 8);
    header[8] = (char)((size - 10) & 0xff);
    header[9] = (char)((size - 10) >> 8);
    return size;
}
