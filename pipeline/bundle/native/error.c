#include "internal.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static _Thread_local char message[BT_MESSAGE];

const char *bertile_error(void) { return message; }

int32_t bertile_abi(void) { return BERTILE_ABI; }

bertile_status bt_fail(bertile_status code, const char *format, ...) {
    char made[BT_MESSAGE]; /* an argument may be the old message itself */
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(made, sizeof made, format, arguments);
    va_end(arguments);
    memcpy(message, made, sizeof made);
    return code;
}

bertile_status bt_no_memory(void) { return bt_fail(BERTILE_FAILED, "out of memory"); }

int bt_times(size_t *product, int64_t size) {
    return size >= 0 && !__builtin_mul_overflow(*product, (size_t)size, product) &&
           *product <= PTRDIFF_MAX;
}

void *bt_aligned(size_t size) {
    void *memory = NULL;
    return posix_memalign(&memory, BT_ALIGNMENT, size ? size : 1) ? NULL : memory;
}
