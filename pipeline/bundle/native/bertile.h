/* Bertile's C interface: open a bundle, run it on token ids, read what comes out.
 *
 * Every function may be called from any thread, and any number of threads may call one model: it
 * answers them one after the other. A model must not be in use while it is closed. A process may
 * fork: the fork waits for the calls that have begun, and a child that calls starts threads of its
 * own. No function throws or ends the process. Names, layouts and codes here do not change; later
 * versions add. */
#ifndef BERTILE_H
#define BERTILE_H

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define BERTILE_API __attribute__((visibility("default")))
#else
#define BERTILE_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define BERTILE_ABI 1 /* grows when something is added */

/* The codes are also the exit codes of bertile-run. */
typedef enum bertile_status {
    BERTILE_OK = 0,
    BERTILE_FAILED = 1,   /* the bundle is missing, damaged or changed; or TVM reports an error */
    BERTILE_INPUT = 2,    /* ids, masks or options that the model cannot take */
    BERTILE_PLATFORM = 3, /* this machine lacks an architecture, a CPU feature or a library */
    BERTILE_STATUS_MAX = 0x7fffffff
} bertile_status;

typedef enum bertile_dtype {
    BERTILE_INT8 = 1,
    BERTILE_INT16 = 2,
    BERTILE_INT32 = 3,
    BERTILE_INT64 = 4,
    BERTILE_UINT8 = 5,
    BERTILE_UINT16 = 6,
    BERTILE_UINT32 = 7,
    BERTILE_UINT64 = 8,
    BERTILE_FLOAT16 = 9,
    BERTILE_FLOAT32 = 10,
    BERTILE_FLOAT64 = 11,
    BERTILE_DTYPE_MAX = 0x7fffffff
} bertile_dtype;

/* An array in row-major order, in the memory of the caller (inputs) or of the result (outputs). */
typedef struct bertile_tensor {
    const char *name;
    bertile_dtype dtype;
    int32_t rank;
    const int64_t *shape;
    const void *data;
} bertile_tensor;

typedef struct bertile_options {
    size_t size;         /* sizeof(bertile_options), by which later versions know this one */
    int32_t threads;     /* cores that one call may use; 0: all that this process may use */
    int32_t skip_hashes; /* not 0: do not compare the files' hashes with the manifest */
    const char *runtime; /* directory of libtvm_ffi.so and libtvm_runtime.so; NULL: see below */
} bertile_options;

typedef struct bertile_model bertile_model;
typedef struct bertile_result bertile_result;

/* The ABI of the library that runs, which may be newer than the BERTILE_ABI compiled against. */
BERTILE_API int32_t bertile_abi(void);

/* What went wrong in this thread's last call that returned another code than BERTILE_OK. */
BERTILE_API const char *bertile_error(void);

/* Open the bundle in a directory; `options` may be NULL. Without options->runtime, TVM's runtime
 * libraries are those that the process has loaded, else the bundle's own in runtime/, else those
 * that the system's loader finds. They are loaded once for the process and stay. */
BERTILE_API bertile_status bertile_open(const char *directory, const bertile_options *options,
                                        bertile_model **model);

/* Give back the library and the weights; NULL is allowed. Results stay valid. */
BERTILE_API void bertile_close(bertile_model *model);

/* Let one call use so many cores from now on; 0: all that this process may use. */
BERTILE_API bertile_status bertile_set_threads(bertile_model *model, int32_t threads);
BERTILE_API int32_t bertile_threads(const bertile_model *model);

/* What the bundle says of itself: names by index (NULL behind the last), the most tokens of one
 * sequence (0: no limit), and the text of manifest.json. They live as long as the model. */
BERTILE_API size_t bertile_input_count(const bertile_model *model);
BERTILE_API const char *bertile_input_name(const bertile_model *model, size_t index);
BERTILE_API size_t bertile_output_count(const bertile_model *model);
BERTILE_API const char *bertile_output_name(const bertile_model *model, size_t index);
BERTILE_API int64_t bertile_max_length(const bertile_model *model);
BERTILE_API const char *bertile_manifest(const bertile_model *model);

/* Run the model on `count` named arrays of integers of one shape (batch, length). A missing
 * attention_mask is all ones, missing token_type_ids are all zeros and missing position_ids 0, 1, 2,
 * …; a model without these takes them so. Behind the last token of a sequence outputs are zero. The
 * result is the caller's, to be freed. */
BERTILE_API bertile_status bertile_run(bertile_model *model, const bertile_tensor *inputs,
                                       size_t count, bertile_result **result);

/* Outputs by index in the order of the model, and by name; NULL where there is none. */
BERTILE_API const bertile_tensor *bertile_output(const bertile_result *result, size_t index);
BERTILE_API const bertile_tensor *bertile_find(const bertile_result *result, const char *name);
BERTILE_API void bertile_free(bertile_result *result);

#ifdef __cplusplus
}
#endif
#endif
