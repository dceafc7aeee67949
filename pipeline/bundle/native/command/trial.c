/* One candidate kernel: loaded, run on its inputs and timed, with weights that no cache holds. */
#include "measure.h"

#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { MOST = 24, COPIES = 32, CALLS = 4096 };

typedef struct operand { /* an array that a kernel reads or writes */
    int code, bits;
    int32_t rank;
    int64_t shape[BT_RANK];
    size_t size, offset;
    bt_managed managed[COPIES];
    bt_any tensors[COPIES];
} operand;

typedef struct trial {
    const char *root;
    const json *manifest, *candidate;
    bt_seen *seen;
    FILE *out;
    bt_any function;
    bt_mapping weight_file;
    operand weights[MOST];
    size_t weight_count;
    int copies;
} trial;

static double seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

static int compare(const void *left, const void *right) {
    double a = *(const double *)left, b = *(const double *)right;
    return (a > b) - (a < b);
}

static bertile_status damaged(const char *what) {
    return bt_fail(BERTILE_INPUT, "the manifest of the archive is damaged: %s", what);
}

static int64_t integer(const json *object, const char *key, int64_t otherwise) {
    const json *found = json_get_kind(object, key, JSON_INTEGER);
    return found ? found->integer : otherwise;
}

/* -- arrays */

static bertile_status read_operand(const json *spec, operand *made) {
    static const struct {
        const char *name;
        int code;
    } kinds[] = {{"uint", 1}, {"int", 0}, {"float", 2}};
    const json *dtype = json_get_kind(spec, "dtype", JSON_STRING);
    const json *shape = json_get_kind(spec, "shape", JSON_ARRAY);
    *made = (operand){.offset = (size_t)integer(spec, "offset", 0)};
    if (!dtype || !shape || shape->count > BT_RANK) return damaged("an array");
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds && !made->bits; i++)
        if (!strncmp(dtype->text, kinds[i].name, strlen(kinds[i].name))) {
            made->code = kinds[i].code;
            made->bits = atoi(dtype->text + strlen(kinds[i].name));
        }
    if (made->bits < 8 || made->bits > 64) return damaged(dtype->text);
    made->size = (size_t)made->bits / 8;
    for (const json *axis = shape->first; axis; axis = axis->next) {
        if (axis->kind != JSON_INTEGER || axis->integer < 0) return damaged("a shape");
        made->shape[made->rank++] = axis->integer;
        made->size *= (size_t)axis->integer;
    }
    return BERTILE_OK;
}

static bertile_status read_operands(const json *list, operand *made, size_t *count) {
    *count = 0;
    if (!list || list->kind != JSON_ARRAY || list->count > MOST) return damaged("a list of arrays");
    for (const json *spec = list->first; spec; spec = spec->next) {
        bertile_status status = read_operand(spec, &made[(*count)++]);
        if (status) return status;
    }
    return BERTILE_OK;
}

static bertile_status map_file(const trial *one, const json *name, bt_mapping *mapping) {
    char path[PATH_MAX];
    *mapping = (bt_mapping){NULL, 0};
    if (!name || name->kind != JSON_STRING || strchr(name->text, '/')) return damaged("a file");
    snprintf(path, sizeof path, "%s/%s", one->root, name->text);
    return bt_map(path, mapping)
               ? bt_fail(BERTILE_INPUT, "cannot read %s: %s", path, strerror(errno))
               : BERTILE_OK;
}

/* Make tensor `copy` of an operand, of its bytes in a file or (NULL) of zeros. */
static bertile_status fill(operand *made, int copy, const bt_mapping *from) {
    unsigned char *memory = bt_aligned(made->size);
    if (!memory) return bt_no_memory();
    if (from && (made->offset > from->size || made->size > from->size - made->offset)) {
        free(memory);
        return damaged("an array is longer than its file");
    }
    if (from)
        memcpy(memory, from->data + made->offset, made->size);
    else
        memset(memory, 0, made->size);
    return bt_tensor(&made->managed[copy], memory, made->rank, made->shape, made->code, made->bits,
                     &made->tensors[copy]);
}

static void drop(operand *made, size_t count, int copies) {
    for (size_t i = 0; i < count; i++)
        for (int copy = 0; copy < copies; copy++) {
            void *memory = made[i].managed[copy].tensor.data;
            bt_release(&made[i].tensors[copy]);
            free(memory);
        }
}

/* -- what a line says */

static bertile_status write_output(trial *one, const unsigned char *data, size_t size,
                                   const char *digest) {
    static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    for (size_t i = 0; i < one->seen->count; i++)
        if (!strcmp(one->seen->digests[i], digest)) return BERTILE_OK;
    if (one->seen->count == sizeof one->seen->digests / sizeof *one->seen->digests)
        return bt_fail(BERTILE_FAILED, "too many outputs differ from each other");
    memcpy(one->seen->digests[one->seen->count++], digest, 65);
    fprintf(one->out, "{\"output\": \"%s\", \"base64\": \"", digest);
    for (size_t at = 0; at < size; at += 3) {
        unsigned long word = (unsigned long)data[at] << 16;
        if (at + 1 < size) word |= (unsigned long)data[at + 1] << 8;
        if (at + 2 < size) word |= data[at + 2];
        fputc(digits[word >> 18], one->out);
        fputc(digits[word >> 12 & 63], one->out);
        fputc(at + 1 < size ? digits[word >> 6 & 63] : '=', one->out);
        fputc(at + 2 < size ? digits[word & 63] : '=', one->out);
    }
    fputs("\"}\n", one->out);
    return BERTILE_OK;
}

static bertile_status show_output(trial *one, operand *results, size_t count, char digest[65]) {
    size_t size = 0, at = 0;
    for (size_t i = 0; i < count; i++) size += results[i].size;
    unsigned char *all = bt_aligned(size);
    if (!all) return bt_no_memory();
    for (size_t i = 0; i < count; at += results[i++].size)
        memcpy(all + at, results[i].managed[0].tensor.data, results[i].size);
    bt_sha256(all, size, digest);
    bertile_status status = write_output(one, all, size, digest);
    free(all);
    return status;
}

/* -- timing */

static bertile_status call(trial *one, operand *inputs, size_t input_count, operand *results,
                           size_t result_count, int copy) {
    bt_any arguments[3 * MOST], none = {0};
    int32_t count = 0;
    for (size_t i = 0; i < input_count; i++) arguments[count++] = inputs[i].tensors[0];
    for (size_t i = 0; i < one->weight_count; i++) arguments[count++] = one->weights[i].tensors[copy];
    for (size_t i = 0; i < result_count; i++) arguments[count++] = results[i].tensors[0];
    bertile_status status = bt_call(one->function.value.pointer, arguments, count, &none);
    bt_release(&none);
    return status;
}

/* The median of calls for so long, each with the next copy of the weights, in microseconds. */
static bertile_status repeat(trial *one, operand *inputs, size_t input_count, operand *results,
                             size_t result_count, double least, double *median) {
    static double times[CALLS];
    double total = 0;
    int count = 0;
    while (count < CALLS && (!count || total < least)) {
        double began = seconds();
        bertile_status status =
            call(one, inputs, input_count, results, result_count, count % one->copies);
        if (status) return status;
        times[count] = seconds() - began;
        total += times[count++];
    }
    qsort(times, (size_t)count, sizeof *times, compare);
    *median = (times[count / 2] + times[(count - 1) / 2]) / 2 * 1e6;
    return BERTILE_OK;
}

static bertile_status run_set(trial *one, const json *set, char *line, size_t size) {
    static operand inputs[MOST], results[MOST];
    size_t input_count = 0, result_count = 0, used = strlen(line);
    bt_mapping mapping;
    char digest[65] = "";
    bertile_status status = map_file(one, json_get(set, "file"), &mapping);
    if (!status) status = read_operands(json_get(set, "inputs"), inputs, &input_count);
    if (!status) status = read_operands(json_get(set, "results"), results, &result_count);
    for (size_t i = 0; i < input_count && !status; i++) status = fill(&inputs[i], 0, &mapping);
    for (size_t i = 0; i < result_count && !status; i++) status = fill(&results[i], 0, NULL);
    if (!status) status = call(one, inputs, input_count, results, result_count, 0);
    if (!status && integer(set, "check", 0))
        status = show_output(one, results, result_count, digest);
    int64_t repeats = integer(one->manifest, "repeats", 3);
    double least = (double)integer(one->manifest, "repeat_ms", 10) * 1e-3;
    used += (size_t)snprintf(line + used, size - used, "{\"tokens\": %lld, \"output\": \"%s\", "
                             "\"microseconds\": [", (long long)integer(set, "tokens", 0), digest);
    for (int64_t i = 0; i < repeats && !status && used < size; i++) {
        double median = 0;
        status = repeat(one, inputs, input_count, results, result_count, least, &median);
        used += (size_t)snprintf(line + used, size - used, "%s%.2f", i ? ", " : "", median);
    }
    if (used < size) snprintf(line + used, size - used, "]}");
    drop(inputs, input_count, 1);
    drop(results, result_count, 1);
    bt_unmap(&mapping);
    return status;
}

/* -- a candidate */

static bertile_status load(trial *one) {
    char path[PATH_MAX];
    const json *name = json_get_kind(one->candidate, "library", JSON_STRING);
    size_t total = 0;
    bt_any module = {0};
    if (!name || strchr(name->text, '/')) return damaged("a library");
    snprintf(path, sizeof path, "%s/%s", one->root, name->text);
    bt_any text = bt_text(path);
    bertile_status status = bt_call(bt_functions[BT_MODULE_LOAD], &text, 1, &module);
    bt_any arguments[] = {module, bt_text("kernel"), {.kind = BT_BOOL}};
    if (!status)
        status = bt_call(bt_functions[BT_MODULE_FUNCTION], arguments, 3, &one->function);
    if (!status && one->function.kind == BT_NONE)
        status = bt_fail(BERTILE_INPUT, "%s holds no kernel", name->text);
    const json *weights = json_get(one->candidate, "weights");
    if (!status) status = map_file(one, json_get(weights, "file"), &one->weight_file);
    if (!status) status = read_operands(json_get(weights, "arrays"), one->weights,
                                        &one->weight_count);
    for (size_t i = 0; i < one->weight_count && !status; i++) total += one->weights[i].size;
    int64_t cold = integer(one->manifest, "cold_bytes", 64 << 20);
    one->copies = total ? (int)((uint64_t)cold / total + 1) : 1;
    if (one->copies > COPIES) one->copies = COPIES;
    for (int copy = 0; copy < one->copies; copy++)
        for (size_t i = 0; i < one->weight_count && !status; i++)
            status = fill(&one->weights[i], copy, &one->weight_file);
    return status; /* the module stays open: its code is what runs */
}

static bertile_status run(void *data) {
    static char line[8192];
    trial *one = data;
    const json *tasks = json_get_kind(one->manifest, "tasks", JSON_ARRAY);
    int64_t wanted = integer(one->candidate, "task", -1);
    const json *task = tasks ? tasks->first : NULL;
    for (int64_t i = 0; i < wanted && task; i++) task = task->next;
    const json *sets = json_get_kind(task, "sets", JSON_ARRAY);
    if (wanted < 0 || !sets) return damaged("a task");
    bertile_status status = load(one);
    snprintf(line, sizeof line, "{\"candidate\": %lld, \"sets\": [",
             (long long)integer(one->candidate, "id", -1));
    for (const json *set = sets->first; set && !status; set = set->next) {
        status = run_set(one, set, line, sizeof line);
        if (strlen(line) + 3 < sizeof line) strcat(line, set->next ? ", " : "]}");
    }
    if (!status) fprintf(one->out, "%s\n", line);
    return status;
}

bertile_status bt_try(const char *root, const json *manifest, const json *candidate,
                      const char *runtime, bt_seen *seen, int output) {
    static trial one;
    bt_worker worker = {.threads = (int32_t)integer(manifest, "threads", 1)};
    bertile_status status = bt_open_runtime(root, NULL, runtime);
    one = (trial){.root = root, .manifest = manifest, .candidate = candidate, .seen = seen,
                  .out = fdopen(dup(output), "a")};
    if (!status && !one.out) status = bt_no_memory();
    if (!status) status = bt_work_on(&worker, run, &one);
    if (one.out && fclose(one.out) && !status)
        status = bt_fail(BERTILE_FAILED, "cannot write the result: %s", strerror(errno));
    return status;
}
