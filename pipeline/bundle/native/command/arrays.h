/* numpy's files of arrays, for bertile-run: .npy holds one, .npz is a zip archive of them. */
#ifndef BERTILE_ARRAYS_H
#define BERTILE_ARRAYS_H

#include "internal.h"

typedef struct bt_array {
    char *name;
    bertile_dtype dtype;
    int32_t rank;
    int64_t shape[BT_RANK];
    void *data;
} bt_array;

/* Read a .npy (its name is empty) or .npz file. */
bertile_status bt_read_arrays(const char *path, bt_array **arrays, size_t *count);
void bt_free_arrays(bt_array *arrays, size_t count);
/* Write all tensors (.npz) or the first one (.npy). */
bertile_status bt_write_arrays(const char *path, const bertile_tensor *const *tensors,
                               size_t count);

/* npy.c: the bytes of one .npy file; the reason in `why` (100 bytes) where it returns -1. */
int bt_parse_npy(const unsigned char *bytes, size_t size, bt_array *array, char *why);
/* The header of a tensor, of a multiple of 64 bytes; returns its size. */
size_t bt_npy_header(const bertile_tensor *tensor, char header[512]);
size_t bt_tensor_bytes(const bertile_tensor *tensor);

/* inflate.c: unpack exactly `out_size` bytes of deflate data; -1 where it is damaged. */
int bt_inflate(const unsigned char *in, size_t size, unsigned char *out, size_t out_size);

#endif
