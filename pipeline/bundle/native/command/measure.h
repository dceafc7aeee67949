/* Candidate kernels of an archive, run and timed where they are meant to run. */
#ifndef BERTILE_MEASURE_H
#define BERTILE_MEASURE_H

#include "internal.h"

enum { BT_PACK_SCHEMA = 1 };

/* Run every candidate of `place`, an archive (.tar) or the directory of one, each in a process of
 * its own, and write a line of JSON about each to `output` (NULL: standard output). `runtime` is
 * the directory of the TVM libraries, or NULL. */
bertile_status bt_measure(const char *place, const char *output, const char *runtime);

/* unpack.c: the files of a tar archive in a new directory, whose name goes to `directory`. */
bertile_status bt_unpack(const char *archive, char *directory, size_t size);
/* Remove such a directory. */
void bt_remove(const char *directory);

/* trial.c: run one candidate and write its line, and outputs that no line has shown yet. */
typedef struct bt_seen { /* outputs that were written, shared by all processes */
    size_t count;
    char digests[4096][65];
} bt_seen;

bertile_status bt_try(const char *root, const json *manifest, const json *candidate,
                      const char *runtime, bt_seen *seen, int output);

#endif
