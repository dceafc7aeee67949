/* bertile-run: run a bundle on ids or on a file of arrays, print what comes out and how long. */
#include "arrays.h"
#include "measure.h"
#include "show.h"

#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static const char usage[] =
    "usage: bertile-run [BUNDLE] [--ids \"101 7592 102\" | --input FILE.npz|FILE.npy]\n"
    "                   [--output FILE.npz|FILE.npy] [--repeat N] [--threads N]\n"
    "                   [--runtime DIR] [--skip-hashes]\n"
    "       bertile-run --measure FILE|DIR [--output RESULT] [--runtime DIR]\n"
    "\n"
    "BUNDLE is a directory that bertile compile has written (default: the one of this command).\n"
    "  --ids      token ids of one text, with spaces or commas between\n"
    "  --input    arrays of integers (batch, length): a .npy of ids, or a .npz with input names\n"
    "  --output   write the outputs: a .npz of all, or a .npy of the first one\n"
    "  --repeat   time so many runs more and print their median and minimum\n"
    "  --threads  cores to use (default: all)\n"
    "  --runtime  the directory of libtvm_ffi.so and libtvm_runtime.so\n"
    "  --measure  run the candidates that bertile tune --pack wrote, for bertile tune --ingest\n"
    "  --skip-hashes   do not compare the files with the hashes in the manifest\n";

typedef struct arguments {
    const char *bundle, *ids, *input, *output, *repeat, *threads, *runtime, *measure;
    int skip_hashes, help;
} arguments;

typedef struct inputs { /* what the model is run on, and the memory that it lies in */
    bertile_tensor tensors[BT_INPUTS];
    size_t count;
    bt_array *arrays;
    size_t array_count;
    int64_t *ids, shape[2];
} inputs;

static double seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

/* -- the command line */

static bertile_status parse(int count, char **words, arguments *found) {
    const struct {
        const char *name, **place;
    } options[] = {{"--ids", &found->ids},         {"--input", &found->input},
                   {"--output", &found->output},   {"--repeat", &found->repeat},
                   {"--threads", &found->threads}, {"--runtime", &found->runtime},
                   {"--measure", &found->measure}};
    for (int i = 1; i < count; i++) {
        size_t option = 0;
        while (option < sizeof options / sizeof *options && strcmp(options[option].name, words[i]))
            option++;
        if (option < sizeof options / sizeof *options) {
            if (++i == count)
                return bt_fail(BERTILE_INPUT, "option '%s' lacks its value", words[i - 1]);
            *options[option].place = words[i];
        } else if (!strcmp(words[i], "--skip-hashes")) {
            found->skip_hashes = 1;
        } else if (!strcmp(words[i], "--help") || !strcmp(words[i], "-h")) {
            found->help = 1;
        } else if (words[i][0] == '-') {
            return bt_fail(BERTILE_INPUT, "option '%s' is unknown; see: bertile-run --help",
                           words[i]);
        } else if (found->bundle) {
            return bt_fail(BERTILE_INPUT, "unexpected argument '%s'", words[i]);
        } else {
            found->bundle = words[i];
        }
    }
    if (found->ids && found->input)
        return bt_fail(BERTILE_INPUT, "--ids and --input were both given; give one of them");
    return BERTILE_OK;
}

static bertile_status read_number(const char *option, const char *text, int32_t *number) {
    char *end = NULL;
    *number = 0;
    if (!text) return BERTILE_OK;
    long value = strtol(text, &end, 10);
    if (end == text || *end || value < 1 || value > 1000000)
        return bt_fail(BERTILE_INPUT, "%s is '%s'; give a whole number from 1", option, text);
    *number = (int32_t)value;
    return BERTILE_OK;
}

/* The directory that this command lies in, which is a bundle that has its runtime. */
static const char *own_directory(void) {
    static char path[PATH_MAX];
    ssize_t length = readlink("/proc/self/exe", path, sizeof path - 1);
    path[length < 0 ? 0 : length] = 0;
    char *slash = strrchr(path, '/');
    if (!slash) return ".";
    *slash = 0;
    return path;
}

/* The directory of the TVM libraries for what is no bundle: the one given, or beside this command. */
static const char *own_runtime(const arguments *chosen) {
    static char path[PATH_MAX + 20];
    static const char *const places[] = {"", "/runtime"};
    const char *folder = own_directory();
    for (size_t i = 0; i < 2 && !chosen->runtime; i++) {
        snprintf(path, sizeof path, "%s%s/libtvm_ffi.so", folder, places[i]);
        if (!access(path, R_OK)) {
            *strrchr(path, '/') = 0;
            return path;
        }
    }
    return chosen->runtime;
}

/* -- inputs */

static void use_ids(inputs *made, int64_t *ids, int64_t rows, int64_t length) {
    made->ids = ids;
    made->shape[0] = rows;
    made->shape[1] = length;
    made->count = 1;
    made->tensors[0] = (bertile_tensor){"input_ids", BERTILE_INT64, 2, made->shape, ids};
}

static bertile_status parse_ids(const char *text, inputs *made) {
    int64_t *ids = malloc((strlen(text) + 1) * sizeof *ids), count = 0;
    if (!ids) return bt_no_memory();
    for (const char *at = text + strspn(text, " ,"); *at;) {
        char *end;
        errno = 0;
        ids[count] = strtoll(at, &end, 10);
        if (end == at || errno || (*end && !strchr(" ,", *end))) {
            free(ids);
            return bt_fail(BERTILE_INPUT, "'%s' is not a list of ids; write them as 101 7592 102",
                           text);
        }
        count++;
        at = end + strspn(end, " ,");
    }
    use_ids(made, ids, 1, count);
    return BERTILE_OK;
}

static bertile_status read_inputs(const char *path, inputs *made) {
    bertile_status status = bt_read_arrays(path, &made->arrays, &made->array_count);
    if (status) return status;
    if (made->array_count > BT_INPUTS)
        return bt_fail(BERTILE_INPUT, "%s holds more arrays than a model has inputs", path);
    for (size_t i = 0; i < made->array_count; i++) {
        const bt_array *array = &made->arrays[i];
        made->tensors[i] = (bertile_tensor){array->name ? array->name : "input_ids", array->dtype,
                                            array->rank, array->shape, array->data};
    }
    made->count = made->array_count;
    return BERTILE_OK;
}

/* Two short rows of small ids, as loader.py takes them. */
static bertile_status make_example(const bertile_model *model, const json *manifest,
                                   inputs *made) {
    const json *length = json_get_kind(json_get(manifest, "static"), "length", JSON_INTEGER);
    int64_t limit = bertile_max_length(model), below = 100;
    int64_t tokens = length ? length->integer : limit && limit < 8 ? limit : 8;
    for (const json *spec = json_get(manifest, "inputs")->first; spec; spec = spec->next) {
        const json *most = json_get_kind(spec, "below", JSON_INTEGER);
        if (most && !strcmp(json_get(spec, "name")->text, "input_ids")) below = most->integer;
    }
    int64_t *ids = malloc((size_t)tokens * 2 * sizeof *ids);
    if (!ids) return bt_no_memory();
    for (int64_t i = 0; i < 2 * tokens; i++) ids[i] = (1 + i / tokens + i % tokens) % below;
    use_ids(made, ids, 2, tokens);
    return BERTILE_OK;
}

/* -- running */

static int compare(const void *left, const void *right) {
    double a = *(const double *)left, b = *(const double *)right;
    return (a > b) - (a < b);
}

static bertile_status time_runs(bertile_model *model, const inputs *given, int32_t repeat) {
    double *times = malloc((size_t)repeat * sizeof *times);
    bertile_status status = times ? BERTILE_OK : bt_no_memory();
    for (int32_t i = 0; i < repeat && !status; i++) {
        bertile_result *result = NULL;
        double began = seconds();
        status = bertile_run(model, given->tensors, given->count, &result);
        times[i] = seconds() - began;
        bertile_free(result);
    }
    if (!status) {
        qsort(times, (size_t)repeat, sizeof *times, compare);
        double median = (times[repeat / 2] + times[(repeat - 1) / 2]) / 2;
        printf("time     median %.3f ms, minimum %.3f ms of %d runs\n", median * 1e3,
               times[0] * 1e3, repeat);
    }
    free(times);
    return status;
}

static bertile_status run(bertile_model *model, const inputs *given, const char *output,
                          int32_t repeat) {
    bertile_result *result = NULL;
    bertile_status status = bertile_run(model, given->tensors, given->count, &result);
    const bertile_tensor *tensors[64];
    if (status) return status;
    for (size_t i = 0; i < given->count; i++) show_tensor("input   ", &given->tensors[i], 0);
    status = show_outputs(result);
    for (size_t i = 0; i < result->count && i < 64; i++) tensors[i] = bertile_output(result, i);
    if (!status && output) status = bt_write_arrays(output, tensors, result->count);
    bertile_free(result);
    return !status && repeat ? time_runs(model, given, repeat) : status;
}

static bertile_status run_bundle(const arguments *chosen) {
    bertile_options options = {.size = sizeof options, .skip_hashes = chosen->skip_hashes,
                               .runtime = chosen->runtime};
    bertile_model *model = NULL;
    inputs given = {.count = 0};
    int32_t repeat = 0;
    char why[100];
    double began = seconds();
    bertile_status status = read_number("--threads", chosen->threads, &options.threads);
    if (!status) status = read_number("--repeat", chosen->repeat, &repeat);
    if (!status)
        status = bertile_open(chosen->bundle ? chosen->bundle : own_directory(), &options, &model);
    if (status) return status;
    const char *text = bertile_manifest(model);
    json *manifest = json_parse(text, strlen(text), why);
    status = manifest ? BERTILE_OK : bt_no_memory(); /* what was opened can be parsed */
    if (!status) show_model(model, manifest, seconds() - began);
    if (!status)
        status = chosen->ids     ? parse_ids(chosen->ids, &given)
                 : chosen->input ? read_inputs(chosen->input, &given)
                                 : make_example(model, manifest, &given);
    if (!status) status = run(model, &given, chosen->output, repeat);
    json_free(manifest);
    free(given.ids);
    bt_free_arrays(given.arrays, given.array_count);
    bertile_close(model);
    return status;
}

int main(int count, char **words) {
    arguments chosen = {0};
    bertile_status status = parse(count, words, &chosen);
    if (chosen.help) {
        fputs(usage, stdout);
        return 0;
    }
    if (!status)
        status = chosen.measure ? bt_measure(chosen.measure, chosen.output, own_runtime(&chosen))
                                : run_bundle(&chosen);
    if (status) fprintf(stderr, "bertile-run: %s\n", bertile_error());
    return (int)status;
}
