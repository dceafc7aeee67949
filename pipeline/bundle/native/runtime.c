#include "internal.h"

#include <dlfcn.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct bytes { /* TVMFFIByteArray */
    const char *data;
    size_t size;
} bytes;

enum { HEADER = 24, CPU = 1 }; /* bytes of TVMFFIObject before an object's fields; kDLCPU */
enum { NAMES = BT_FUNCTION_COUNT };

static const char *const libraries[] = {"libtvm_ffi.so", "libtvm_runtime.so"};
static const char *const names[NAMES] = {
    [BT_ARRAY] = "ffi.Array",
    [BT_ARRAY_GET] = "ffi.ArrayGetItem",
    [BT_ARRAY_SIZE] = "ffi.ArraySize",
    [BT_MODULE_LOAD] = "ffi.ModuleLoadFromFile",
    [BT_MODULE_FUNCTION] = "ffi.ModuleGetFunction",
    [BT_CONFIG_POOL] = "runtime.config_threadpool",
    [BT_CLEAR_MEMORY] = "vm.builtin.memory_manager.clear",
};

void *bt_functions[BT_FUNCTION_COUNT];

static struct {
    int (*call)(void *function, const bt_any *arguments, int32_t count, bt_any *result);
    int (*get_global)(const bytes *name, void **function);
    int (*from_dlpack)(bt_managed *from, int32_t alignment, int32_t contiguous, void **tensor);
    void (*raised)(void **error);
    int (*release)(void *object);
} ffi;

/* The message of TVM's last error in this thread, on one line. */
static bertile_status tvm_error(void) {
    void *error = NULL;
    char text[500] = "no reason was reported";
    ffi.raised(&error);
    if (error) { /* TVMFFIErrorCell: kind, message */
        const bytes *message = (const bytes *)((const char *)error + HEADER) + 1;
        size_t used = 0;
        for (size_t i = 0; i < message->size && used < sizeof text - 1; i++) {
            char c = message->data[i];
            int space = strchr(" \t\r\n", c) != NULL;
            if (!space || (used && text[used - 1] != ' ')) text[used++] = space ? ' ' : c;
        }
        text[used] = 0;
        ffi.release(error);
    }
    return bt_fail(BERTILE_FAILED, "TVM reports: %s", text);
}

bertile_status bt_call(void *function, const bt_any *arguments, int32_t count, bt_any *result) {
    *result = (bt_any){0};
    return ffi.call(function, arguments, count, result) ? tvm_error() : BERTILE_OK;
}

void bt_release(bt_any *object) {
    if (object->kind >= BT_OBJECT && object->value.pointer) ffi.release(object->value.pointer);
    *object = (bt_any){0};
}

bertile_status bt_tensor(bt_managed *managed, void *data, int32_t rank, int64_t *shape, int code,
                         int bits, bt_any *tensor) {
    *managed = (bt_managed){.tensor = {.data = data,
                                       .device_type = CPU,
                                       .rank = rank,
                                       .code = (uint8_t)code,
                                       .bits = (uint8_t)bits,
                                       .lanes = 1,
                                       .shape = shape}};
    void *made = NULL;
    if (ffi.from_dlpack(managed, BT_ALIGNMENT, 1, &made)) return tvm_error();
    *tensor = (bt_any){.kind = 70, .value.pointer = made}; /* kTVMFFITensor */
    return BERTILE_OK;
}

const bt_dltensor *bt_fields(const bt_any *tensor) {
    return (const bt_dltensor *)((const char *)tensor->value.pointer + HEADER);
}

const char *bt_string(const bt_any *string) {
    if (string->kind != 65) return NULL; /* kTVMFFIStr: a bytes, with a zero behind it */
    return ((const bytes *)((const char *)string->value.pointer + HEADER))->data;
}

bt_any bt_integer(int64_t value) { return (bt_any){.kind = BT_INT, .value.integer = value}; }

bt_any bt_text(const char *text) { return (bt_any){.kind = BT_RAW_STR, .value.text = text}; }

static bertile_status find_symbols(void *library) {
    const struct {
        void **place;
        const char *name;
    } symbols[] = {{(void **)&ffi.call, "TVMFFIFunctionCall"},
                   {(void **)&ffi.get_global, "TVMFFIFunctionGetGlobal"},
                   {(void **)&ffi.from_dlpack, "TVMFFITensorFromDLPack"},
                   {(void **)&ffi.raised, "TVMFFIErrorMoveFromRaised"},
                   {(void **)&ffi.release, "TVMFFIObjectDecRef"}};
    for (size_t i = 0; i < sizeof symbols / sizeof *symbols; i++)
        if (!(*symbols[i].place = dlsym(library, symbols[i].name)))
            return bt_fail(BERTILE_PLATFORM, "the TVM runtime has no function %s",
                           symbols[i].name);
    return BERTILE_OK;
}

static bertile_status find_functions(void) {
    for (int i = 0; i < NAMES; i++) {
        bytes name = {names[i], strlen(names[i])};
        if (ffi.get_global(&name, &bt_functions[i])) return tvm_error();
        if (!bt_functions[i])
            return bt_fail(BERTILE_PLATFORM, "the TVM runtime has no function %s", names[i]);
    }
    return BERTILE_OK;
}

static int has_own(const json *files) {
    return json_get(files, "runtime/libtvm_ffi.so") && json_get(files, "runtime/libtvm_runtime.so");
}

static bertile_status load_libraries(const char *root, const json *files, const char *given) {
    char path[PATH_MAX];
    void *handles[2];
    const char *folder = given ? given : has_own(files) ? root : NULL;
    /* Before the pool starts, what the user has not set: TVM would pin its workers to the first
     * cores of the machine, and spin 300,000 rounds after each kernel. */
    setenv("TVM_BIND_THREADS", "0", 0);
    setenv("TVM_THREAD_POOL_SPIN_COUNT", "2000", 0);
    for (int i = 0; i < 2; i++) {
        /* a second copy in one process would end it, so one that is there comes first */
        handles[i] = dlopen(libraries[i], RTLD_NOW | RTLD_GLOBAL | RTLD_NOLOAD);
        if (handles[i]) continue;
        int length = snprintf(path, sizeof path, "%s%s%s%s", folder ? folder : "",
                              folder && !given ? "/runtime" : "", folder ? "/" : "", libraries[i]);
        handles[i] = (size_t)length < sizeof path ? dlopen(path, RTLD_NOW | RTLD_GLOBAL) : NULL;
        if (!handles[i])
            return bt_fail(BERTILE_PLATFORM, "cannot load the TVM runtime: %s%s", dlerror(),
                           folder ? "" : "; compile without --no-runtime, or give its directory");
    }
    return find_symbols(handles[0]);
}

bertile_status bt_open_runtime(const char *root, const json *files, const char *given) {
    static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    static int opened;
    bertile_status status = BERTILE_OK;
    pthread_mutex_lock(&lock);
    if (!opened) {
        status = load_libraries(root, files, given);
        if (!status) status = find_functions();
        opened = !status;
    }
    pthread_mutex_unlock(&lock);
    return status;
}
