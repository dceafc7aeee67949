#include "internal.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

int bt_map(const char *path, bt_mapping *mapping) {
    struct stat about;
    int file = open(path, O_RDONLY | O_CLOEXEC);
    *mapping = (bt_mapping){NULL, 0};
    if (file < 0) return -1;
    int failed = fstat(file, &about);
    if (!failed && about.st_size) {
        void *data = mmap(NULL, (size_t)about.st_size, PROT_READ, MAP_SHARED, file, 0);
        failed = data == MAP_FAILED;
        if (!failed) *mapping = (bt_mapping){data, (size_t)about.st_size};
    }
    int reason = errno;
    close(file);
    errno = reason;
    return failed ? -1 : 0;
}

void bt_unmap(bt_mapping *mapping) {
    if (mapping->size) munmap((void *)mapping->data, mapping->size);
    *mapping = (bt_mapping){NULL, 0};
}

/* Whether a name with slashes stays below where it starts, as far as its letters say. */
static int stays_inside(const char *name) {
    if (*name == '/' || !*name) return 0;
    for (const char *part = name; part; part = strchr(part, '/')) {
        part += *part == '/';
        if (!strncmp(part, "..", 2) && (!part[2] || part[2] == '/')) return 0;
    }
    return 1;
}

/* Whether links lead out of the bundle; a file that is missing is reported by who opens it. */
static int leads_out(const char *root, const char *path) {
    char *top = realpath(root, NULL), *real = realpath(path, NULL);
    size_t length = top ? strlen(top) : 0;
    int out = top && real && (strncmp(real, top, length) || real[length] != '/');
    free(top);
    free(real);
    return out;
}

static bertile_status check_hash(const char *path, const char *expected) {
    bt_mapping mapping;
    char found[65];
    if (bt_map(path, &mapping))
        return bt_fail(BERTILE_FAILED, "cannot read %s: %s", path, strerror(errno));
    bt_sha256(mapping.data, mapping.size, found);
    bt_unmap(&mapping);
    if (!strcmp(found, expected)) return BERTILE_OK;
    return bt_fail(BERTILE_FAILED,
                   "%s has changed since it was compiled; copy or compile the bundle again", path);
}

static bertile_status check_file(const char *root, const json *file, int hashes) {
    char path[PATH_MAX];
    struct stat about;
    if ((size_t)snprintf(path, sizeof path, "%s/%s", root, file->key) >= sizeof path)
        return bt_fail(BERTILE_FAILED, "the path of %s is too long", file->key);
    if (!stays_inside(file->key) || leads_out(root, path))
        return bt_fail(BERTILE_FAILED,
                       "the manifest of %s names '%s', which is outside the bundle", root,
                       file->key);
    if (stat(path, &about) || !S_ISREG(about.st_mode))
        return bt_fail(BERTILE_FAILED, "%s is missing; copy or compile the bundle again", path);
    int64_t expected = json_get(file, "bytes")->integer;
    if (about.st_size != expected)
        return bt_fail(BERTILE_FAILED,
                       "%s has %lld bytes, not %lld; it is truncated or changed: "
                       "copy or compile the bundle again",
                       path, (long long)about.st_size, (long long)expected);
    return hashes ? check_hash(path, json_get(file, "sha256")->text) : BERTILE_OK;
}

bertile_status bt_check_files(const char *root, const json *files, int hashes) {
    bertile_status status = BERTILE_OK;
    /* all sizes first: they are quick, and say more than a changed hash */
    for (int pass = 0; pass <= (hashes != 0); pass++)
        for (const json *file = files->first; file && !status; file = file->next)
            status = check_file(root, file, pass);
    return status;
}
