/* Zip archives of .npy files, as numpy's savez and savez_compressed write them. */
#include "arrays.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { END_SIZE = 22, ENTRY_SIZE = 46, LOCAL_SIZE = 30 };

typedef struct member {
    const unsigned char *name, *data;
    size_t name_size, packed, size;
    unsigned method;
} member;

static size_t little(const unsigned char *at, int count) {
    size_t value = 0;
    while (count--) value = value << 8 | at[count];
    return value;
}

static uint32_t add_crc(uint32_t crc, const void *data, size_t size) {
    const unsigned char *at = data;
    for (crc = ~crc; size--; at++) {
        crc ^= *at;
        for (int bit = 0; bit < 8; bit++) crc = crc >> 1 ^ (crc & 1 ? 0xedb88320u : 0);
    }
    return ~crc;
}

/* The end record, which a comment may follow; NULL where there is none. */
static const unsigned char *find_end(const bt_mapping *file) {
    for (size_t back = END_SIZE; back <= file->size && back <= END_SIZE + 0xffff; back++) {
        const unsigned char *at = file->data + file->size - back;
        if (!memcmp(at, "PK\5\6", 4)) return at;
    }
    return NULL;
}

/* Read the entry of the central directory at `place`; returns where the next one is, or 0. */
static size_t read_entry(const bt_mapping *file, size_t place, member *found) {
    const unsigned char *at = file->data + place;
    if (place + ENTRY_SIZE > file->size || memcmp(at, "PK\1\2", 4)) return 0;
    size_t local = little(at + 42, 4), next = place + ENTRY_SIZE;
    found->method = (unsigned)little(at + 10, 2);
    found->packed = little(at + 20, 4);
    found->size = little(at + 24, 4);
    found->name_size = little(at + 28, 2);
    found->name = at + ENTRY_SIZE;
    next += found->name_size + little(at + 30, 2) + little(at + 32, 2);
    if (next > file->size || local + LOCAL_SIZE > file->size) return 0;
    const unsigned char *header = file->data + local;
    size_t start = local + LOCAL_SIZE + little(header + 26, 2) + little(header + 28, 2);
    if (start > file->size || found->packed > file->size - start) return 0;
    found->data = file->data + start;
    return next;
}

static int read_member(const member *from, bt_array *array, char *why) {
    size_t length = from->name_size;
    if (length > 4 && !memcmp(from->name + length - 4, ".npy", 4)) length -= 4;
    array->name = strndup((const char *)from->name, length);
    if (!array->name) return -1;
    if (from->method == 0) return bt_parse_npy(from->data, from->packed, array, why);
    if (from->method != 8) {
        snprintf(why, 100, "it is packed in an unknown way; save it with numpy.savez");
        return -1;
    }
    unsigned char *unpacked = malloc(from->size + 1);
    int failed = !unpacked || bt_inflate(from->data, from->packed, unpacked, from->size);
    if (failed)
        snprintf(why, 100, "its packed data is damaged");
    else
        failed = bt_parse_npy(unpacked, from->size, array, why);
    free(unpacked);
    return failed;
}

static int read_archive(const bt_mapping *file, bt_array **arrays, size_t *count, char *why) {
    const unsigned char *end = find_end(file);
    snprintf(why, 100, "it is no whole .npz file");
    if (!end) return -1;
    size_t members = little(end + 10, 2), place = little(end + 16, 4);
    *arrays = calloc(members + 1, sizeof **arrays);
    if (!*arrays) return -1;
    while (*count < members) {
        member found;
        place = read_entry(file, place, &found);
        if (!place || read_member(&found, &(*arrays)[(*count)++], why)) return -1;
    }
    return 0;
}

bertile_status bt_read_arrays(const char *path, bt_array **arrays, size_t *count) {
    bt_mapping file;
    char why[100];
    int failed;
    *arrays = NULL;
    *count = 0;
    if (bt_map(path, &file))
        return bt_fail(BERTILE_INPUT, "cannot read %s: %s", path, strerror(errno));
    if (file.size > 1 && !memcmp(file.data, "PK", 2)) {
        failed = read_archive(&file, arrays, count, why);
    } else {
        *arrays = calloc(1, sizeof **arrays);
        *count = *arrays != NULL;
        failed = !*arrays || bt_parse_npy(file.data, file.size, *arrays, why);
    }
    bt_unmap(&file);
    if (!failed) return BERTILE_OK;
    bt_free_arrays(*arrays, *count);
    *arrays = NULL;
    *count = 0;
    return bt_fail(BERTILE_INPUT, "cannot read %s: %s", path, why);
}

void bt_free_arrays(bt_array *arrays, size_t count) {
    for (size_t i = 0; i < count; i++) {
        free(arrays[i].name);
        free(arrays[i].data);
    }
    free(arrays);
}

/* -- writing */

static void put(unsigned char *at, size_t value, int count) {
    for (int i = 0; i < count; i++) at[i] = (unsigned char)(value >> 8 * i);
}

/* The 26 bytes that a local header and an entry of the central directory share. */
static void put_fields(unsigned char *at, uint32_t crc, size_t size, size_t name_size) {
    memset(at, 0, 26);
    put(at, 20, 2);   /* the version of the format that has directories */
    put(at + 8, 0x21, 2); /* the date: 1 January 1980 */
    put(at + 10, crc, 4);
    put(at + 14, size, 4);
    put(at + 18, size, 4);
    put(at + 22, name_size, 2);
}

static void write_member(FILE *file, const bertile_tensor *tensor, unsigned char *entry,
                         const char *name) {
    char header[512];
    unsigned char local[LOCAL_SIZE] = "PK\3\4";
    size_t before = bt_npy_header(tensor, header), bytes = bt_tensor_bytes(tensor);
    uint32_t crc = add_crc(add_crc(0, header, before), tensor->data, bytes);
    memset(entry, 0, ENTRY_SIZE);
    memcpy(entry, "PK\1\2", 4);
    put(entry + 4, 20, 2);
    put(entry + 42, (size_t)ftell(file), 4);
    put_fields(entry + 6, crc, before + bytes, strlen(name));
    put_fields(local + 4, crc, before + bytes, strlen(name));
    fwrite(local, 1, sizeof local, file);
    fputs(name, file);
    fwrite(header, 1, before, file);
    fwrite(tensor->data, 1, bytes, file);
}

static bertile_status write_archive(FILE *file, const bertile_tensor *const *tensors,
                                    size_t count) {
    unsigned char (*entries)[ENTRY_SIZE] = calloc(count + 1, sizeof *entries);
    unsigned char end[END_SIZE] = "PK\5\6";
    char name[256];
    if (!entries) return bt_no_memory();
    for (size_t i = 0; i < count; i++) {
        snprintf(name, sizeof name, "%s.npy", tensors[i]->name);
        write_member(file, tensors[i], entries[i], name);
    }
    size_t start = (size_t)ftell(file);
    for (size_t i = 0; i < count; i++) {
        snprintf(name, sizeof name, "%s.npy", tensors[i]->name);
        fwrite(entries[i], 1, ENTRY_SIZE, file);
        fputs(name, file);
    }
    put(end + 8, count, 2);
    put(end + 10, count, 2);
    put(end + 12, (size_t)ftell(file) - start, 4);
    put(end + 16, start, 4);
    fwrite(end, 1, sizeof end, file);
    free(entries);
    return start >> 32 ? bt_fail(BERTILE_INPUT, "the outputs are too large for one .npz file")
                       : BERTILE_OK;
}

bertile_status bt_write_arrays(const char *path, const bertile_tensor *const *tensors,
                               size_t count) {
    char header[512];
    const char *ending = strrchr(path, '.');
    bertile_status status = BERTILE_OK;
    int single = ending && !strcmp(ending, ".npy");
    if (!single && (!ending || strcmp(ending, ".npz")))
        return bt_fail(BERTILE_INPUT, "'%s' is neither .npz nor .npy", path);
    FILE *file = fopen(path, "wbe");
    if (file && single) {
        fwrite(header, 1, bt_npy_header(tensors[0], header), file);
        fwrite(tensors[0]->data, 1, bt_tensor_bytes(tensors[0]), file);
    } else if (file) {
        status = write_archive(file, tensors, count);
    }
    int failed = !file || ferror(file);
    if ((file && fclose(file)) || failed)
        return bt_fail(BERTILE_FAILED, "cannot write %s: %s", path, strerror(errno));
    return status;
}
