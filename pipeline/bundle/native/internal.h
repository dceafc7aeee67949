/* What the files of the loader share, and what bertile-run may use of it; no part of the ABI. */
#ifndef BERTILE_INTERNAL_H
#define BERTILE_INTERNAL_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* RTLD_NOLOAD, cpu_set_t; so this header comes before the system's */
#endif

#include <pthread.h>
#include <stdint.h>
#include <sys/types.h>

#include "bertile.h"
#include "json.h"

enum {
    BT_SCHEMA = 1,      /* the newest manifest schema that this loader reads */
    BT_ALIGNMENT = 64,  /* bytes; kernels load whole cache lines, so every tensor starts on one */
    BT_PASS_BLOCKS = 8, /* of a pass through the model, for each thread: see loader.py */
    BT_MESSAGE = 1024,  /* bytes of an error message */
    BT_RANK = 8,        /* most dimensions of a tensor */
    BT_BLOCK_TOKENS = 16,     /* for which kernels are made */
    BT_MOST_PARAMS = 1 << 14, /* tensors of a bundle */
    BT_MOST_TOKENS = 1 << 22  /* of a static shape; its activations would take gigabytes */
};

/* -- error.c: messages, and memory that reports its own end */

/* Keep the message for bertile_error() in this thread and return `code`. */
__attribute__((format(printf, 2, 3))) bertile_status bt_fail(bertile_status code,
                                                             const char *format, ...);
bertile_status bt_no_memory(void);
/* `size` bytes on a multiple of BT_ALIGNMENT, or NULL. */
void *bt_aligned(size_t size);
/* Multiply *product by a size that is not negative; 0 where that is more than memory can have. */
int bt_times(size_t *product, int64_t size);

/* -- sha256.c */

void bt_sha256(const void *data, size_t size, char hex[65]);

/* -- files.c: the files of a bundle */

typedef struct bt_mapping {
    const unsigned char *data;
    size_t size;
} bt_mapping;

/* Map a file to be read; an empty one is no error. errno says why it returns -1. */
int bt_map(const char *path, bt_mapping *mapping);
void bt_unmap(bt_mapping *mapping);
/* Check that every file of the manifest is inside the bundle and unchanged. */
bertile_status bt_check_files(const char *root, const json *files, int hashes);

/* -- manifest.c */

/* What a missing array is filled with; places are 0, 1, 2, … along the length. */
typedef enum bt_fill { BT_FILL_NONE, BT_FILL_ZEROS, BT_FILL_ONES, BT_FILL_PLACES } bt_fill;
/* What the manifest and the interface call a fill: "none" to "places"; BT_FILL_NONE for others. */
const char *bt_fill_name(bt_fill fill);
bt_fill bt_fill_named(const char *text);
typedef enum bt_axis { BT_AXIS_FIXED, BT_AXIS_BATCH, BT_AXIS_LENGTH, BT_AXIS_KINDS } bt_axis;

typedef struct bt_input {
    const char *name;
    int bits;      /* of the signed integers that the model takes: 32 or 64 */
    int64_t below; /* 0: no limit but the dtype's */
    int64_t limit; /* the largest value */
    bt_fill fill;
} bt_input;

typedef struct bt_output {
    const char *name, *type; /* the dtype as the manifest has it */
    bertile_dtype dtype;
    int rank;
    bt_axis axes[BT_RANK];
    int64_t sizes[BT_RANK]; /* of fixed axes */
} bt_output;

typedef struct bt_manifest {
    char *text;
    json *tree; /* owns every name below */
    const char *entry;
    int64_t lanes, max_length, static_batch, static_length; /* 0: none */
    int padded;   /* outputs depend on masked positions: they are computed */
    int together; /* outputs depend on all rows: they are one pass */
    size_t input_count, output_count, param_count;
    bt_input *inputs;
    bt_output *outputs;
    const json *files, *params, *target;
} bt_manifest;

bertile_status bt_read_manifest(const char *root, bt_manifest *manifest);
void bt_free_manifest(bt_manifest *manifest);

/* -- platform.c: what this machine is */

bertile_status bt_check_platform(const json *target);
/* Check a wish for threads (0: none) and give the number to use. */
bertile_status bt_thread_count(int32_t wish, int32_t *threads);

/* -- runtime.c: TVM's C ABI */

enum { BT_NONE = 0, BT_INT = 1, BT_BOOL = 2, BT_RAW_STR = 8, BT_OBJECT = 64 };

typedef struct bt_any { /* TVMFFIAny */
    int32_t kind;
    uint32_t zero;
    union {
        int64_t integer;
        double real;
        void *pointer;
        const char *text;
    } value;
} bt_any;

typedef struct bt_dltensor { /* DLTensor */
    void *data;
    int32_t device_type, device_id, rank;
    uint8_t code, bits;
    uint16_t lanes;
    int64_t *shape, *strides;
    uint64_t offset;
} bt_dltensor;

typedef struct bt_managed { /* DLManagedTensor; must live as long as the tensor made of it */
    bt_dltensor tensor;
    void *context;
    void (*deleter)(struct bt_managed *);
} bt_managed;

/* The functions of the runtime that the loader calls, by index into bt_functions. */
enum {
    BT_ARRAY, BT_ARRAY_GET, BT_ARRAY_SIZE, BT_MODULE_LOAD, BT_MODULE_FUNCTION, BT_CONFIG_POOL, BT_CLEAR_MEMORY,
    BT_FUNCTION_COUNT
};
extern void *bt_functions[BT_FUNCTION_COUNT];

/* Open the runtime of this process once; `files` is that of the manifest, `given` may be NULL. */
bertile_status bt_open_runtime(const char *root, const json *files, const char *given);
bertile_status bt_call(void *function, const bt_any *arguments, int32_t count, bt_any *result);
/* Give back what a call or bt_tensor returned. */
void bt_release(bt_any *object);
bertile_status bt_tensor(bt_managed *managed, void *data, int32_t rank, int64_t *shape, int code,
                         int bits, bt_any *tensor);
/* The fields of a tensor that TVM returned. */
const bt_dltensor *bt_fields(const bt_any *tensor);
/* The text of a string that TVM returned, or NULL for anything else; it lives as long as that. */
const char *bt_string(const bt_any *string);
bt_any bt_integer(int64_t value);
bt_any bt_text(const char *text);

/* -- params.c: tensors of a safetensors file, in place */

typedef struct bt_params {
    bt_mapping mapping;
    size_t count;
    bt_any *tensors;
    bt_managed *managed;
    int64_t (*shapes)[BT_RANK];
} bt_params;

bertile_status bt_read_params(const char *path, const json *names, bt_params *params);
/* What safetensors calls the dtype of such a tensor. */
const char *bt_dtype_name(const bt_dltensor *tensor);
void bt_free_params(bt_params *params);

/* -- interface.c: what the library says of itself */

/* Check that the text of the library is that of the manifest and the weights. */
bertile_status bt_check_interface(const char *said, const bt_manifest *manifest,
                                  const bt_params *params);
/* Check that some weight has as many rows as an input takes ids. */
bertile_status bt_check_ids(const bt_manifest *manifest, const bt_params *params);

/* -- fork.c: a fork waits for all calls, and a child starts threads of its own */

/* Around whatever calls TVM; not twice in one thread, since a fork may wait between the two. */
bertile_status bt_enter(void);
void bt_leave(void);
/* Another number in each process that a fork has made, from 1 on. Unlike that of getpid() it is
 * also another one in a child that is the first of its namespace, as its parent was. */
uint64_t bt_process(void);

/* -- worker.c: the thread that a model runs in */

typedef bertile_status (*bt_work)(void *data);

typedef struct bt_worker {
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    uint64_t process; /* whose thread it is, by bt_process(); 0: none runs */
    int32_t threads;
    enum { BT_IDLE, BT_ASKED, BT_DONE, BT_STOP } state;
    bt_work work;
    void *data;
    bertile_status status;
    char message[BT_MESSAGE];
} bt_worker;

/* Run `work` where TVM's pool has worker->threads threads, and return what it returns. */
bertile_status bt_work_on(bt_worker *worker, bt_work work, void *data);
void bt_stop_worker(bt_worker *worker);

/* -- inputs.c: what a caller gives, checked */

typedef struct bt_request {
    const bertile_tensor *given[16]; /* one for each input of the model, or NULL */
    int64_t batch, length;
    int64_t *ends; /* of each row the position behind its last token */
} bt_request;

enum { BT_INPUTS = 16 };

bertile_status bt_check_inputs(const bt_manifest *manifest, const bertile_tensor *inputs,
                               size_t count, bt_request *request);
/* Write `rows` rows of an input from row `first` on, padded to (step, width), as its integers. */
void bt_fit(const bt_input *spec, const bertile_tensor *given, const bt_request *request,
            int64_t first, int64_t rows, int64_t step, int64_t width, void *out);
/* How many blocks of so many tokens such rows have; `table` (count, 4) is written unless NULL. */
int64_t bt_blocks(const bt_request *request, int64_t first, int64_t rows, int64_t step,
                  int64_t block_tokens, int32_t *table);

/* -- outputs.c: what the caller gets */

struct bertile_result {
    size_t count;
    bertile_tensor *tensors;
    int64_t (*shapes)[BT_RANK];
};

bertile_result *bt_make_result(const bt_manifest *manifest);
/* Copy one tensor of a chunk of rows, computed as (step, width), to its place in the result. */
bertile_status bt_place(bertile_result *result, const bt_output *spec, size_t index,
                        const bt_dltensor *piece, const bt_request *request, int64_t first,
                        int64_t rows, int64_t step, int64_t width);
/* Set what lies behind the last token of each sequence to zero. */
void bt_clear_tails(bertile_result *result, const bt_manifest *manifest, const bt_request *request);
size_t bt_item_size(bertile_dtype dtype);

#endif
