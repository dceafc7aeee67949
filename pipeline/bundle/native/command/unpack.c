/* A tar archive (ustar) of plain files in one directory. */
#include "measure.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { BLOCK = 512, NAME = 100, SIZE = 124, DIGITS = 12, KIND = 156 };

static int write_file(const char *path, const unsigned char *data, size_t size) {
    int file = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0700);
    if (file < 0) return -1;
    while (size) {
        ssize_t written = write(file, data, size);
        if (written < 0 && errno == EINTR) continue;
        if (written <= 0) break;
        data += written;
        size -= (size_t)written;
    }
    return close(file) || size ? -1 : 0;
}

static bertile_status unpack_all(const bt_mapping *archive, const char *directory) {
    char path[PATH_MAX];
    for (size_t at = 0; at + BLOCK <= archive->size && archive->data[at];) {
        char name[NAME + 1] = "", digits[DIGITS + 1] = "", *end;
        memcpy(name, archive->data + at, NAME);
        memcpy(digits, archive->data + at + SIZE, DIGITS);
        unsigned long long size = strtoull(digits, &end, 8);
        int kind = archive->data[at + KIND];
        at += BLOCK;
        if (end == digits || size > archive->size - at || strchr(name, '/') || *name == '.' ||
            (kind && kind != '0'))
            return bt_fail(BERTILE_INPUT, "the archive is damaged, or not one that bertile wrote");
        int length = snprintf(path, sizeof path, "%s/%s", directory, name);
        if (length < 0 || (size_t)length >= sizeof path ||
            write_file(path, archive->data + at, (size_t)size))
            return bt_fail(BERTILE_FAILED, "cannot unpack %s to %s: %s", name, directory,
                           strerror(errno));
        at += (size + BLOCK - 1) / BLOCK * BLOCK;
    }
    return BERTILE_OK;
}

bertile_status bt_unpack(const char *archive, char *directory, size_t size) {
    const char *folder = getenv("TMPDIR");
    bt_mapping mapping;
    snprintf(directory, size, "%s/bertile-measure-XXXXXX", folder && *folder ? folder : "/tmp");
    if (bt_map(archive, &mapping))
        return bt_fail(BERTILE_INPUT, "cannot read %s: %s", archive, strerror(errno));
    if (!mkdtemp(directory)) {
        bt_unmap(&mapping);
        return bt_fail(BERTILE_FAILED, "cannot make a directory in %s: %s; set TMPDIR",
                       folder ? folder : "/tmp", strerror(errno));
    }
    bertile_status status = unpack_all(&mapping, directory);
    bt_unmap(&mapping);
    if (status) bt_remove(directory);
    return status;
}

void bt_remove(const char *directory) {
    char path[PATH_MAX];
    DIR *listing = opendir(directory);
    for (struct dirent *one; listing && (one = readdir(listing));)
        if ((size_t)snprintf(path, sizeof path, "%s/%s", directory, one->d_name) < sizeof path)
            unlink(path); /* . and .. are directories, which it leaves alone */
    if (listing) closedir(listing);
    rmdir(directory);
}
