#include "internal.h"

#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { KEPT_SHAPES = 16 };

struct bertile_model {
    bt_manifest manifest;
    bt_params params;
    bt_any module, machine, entry;
    bt_any *arguments; /* the inputs, the table of blocks, the weights */
    bt_worker worker;
    pthread_mutex_t lock; /* of a call, and of what changes in it */
    int64_t shapes[KEPT_SHAPES][3];
    int shape_count;
};

/* -- opening and closing */

static bertile_status get_function(const bt_any *module, const char *name, bt_any *function) {
    bt_any arguments[] = {*module, bt_text(name), {.kind = BT_BOOL}};
    return bt_call(bt_functions[BT_MODULE_FUNCTION], arguments, 3, function);
}

/* Check that the library takes as many arrays as the manifest names, and is as it says. */
static bertile_status check_machine(const bertile_model *model) {
    const bt_manifest *manifest = &model->manifest;
    bt_any find = {0}, takes = {0}, ask = {0}, text = {0}, name = bt_text(manifest->entry);
    int64_t given = (int64_t)(manifest->input_count + 1 + manifest->param_count);
    bertile_status status = get_function(&model->machine, "get_function_arity", &find);
    if (!status) status = bt_call(find.value.pointer, &name, 1, &takes);
    if (!status && takes.value.integer != given)
        status = bt_fail(BERTILE_FAILED,
                         "'%s' takes %lld arrays, the manifest names %lld; compile the bundle again",
                         manifest->entry, (long long)takes.value.integer, (long long)given);
    if (!status) status = get_function(&model->machine, "interface", &ask);
    if (!status && ask.kind != BT_NONE) { /* a library of an older Bertile has none */
        status = bt_call(ask.value.pointer, NULL, 0, &text);
        if (!status && !bt_string(&text))
            status = bt_fail(BERTILE_FAILED, "a text was expected, and none came");
        if (!status) status = bt_check_interface(bt_string(&text), manifest, &model->params);
    }
    bt_release(&text);
    bt_release(&ask);
    bt_release(&find);
    return status;
}

static bertile_status start_machine(bertile_model *model, const char *path) {
    bt_any name = bt_text(path), start = {0}, prepare = {0}, none = {0};
    bt_any device[] = {bt_integer(1), bt_integer(0), bt_integer(2)}; /* CPU, first, pooled */
    bertile_status status = bt_call(bt_functions[BT_MODULE_LOAD], &name, 1, &model->module);
    if (!status) status = get_function(&model->module, "vm_load_executable", &start);
    if (!status && start.kind == BT_NONE)
        status = bt_fail(BERTILE_FAILED, "it holds no compiled model");
    if (!status) status = bt_call(start.value.pointer, NULL, 0, &model->machine);
    if (!status) status = get_function(&model->machine, "vm_initialization", &prepare);
    if (!status) status = bt_call(prepare.value.pointer, device, 3, &none);
    if (!status) status = get_function(&model->machine, model->manifest.entry, &model->entry);
    if (!status && model->entry.kind == BT_NONE)
        status = bt_fail(BERTILE_FAILED, "it has no function '%s'", model->manifest.entry);
    if (!status) status = check_machine(model);
    bt_release(&none);
    bt_release(&prepare);
    bt_release(&start);
    return status ? bt_fail(status, "cannot load %s: %s", path, bertile_error()) : BERTILE_OK;
}

/* Read and check what needs no TVM. */
static bertile_status check_parts(const char *root, const bertile_options *options,
                                  bertile_model *model) {
    bt_manifest *manifest = &model->manifest;
    bertile_status status = bt_read_manifest(root, manifest);
    if (!status) status = bt_check_platform(manifest->target);
    if (!status) status = bt_thread_count(options->threads, &model->worker.threads);
    return status ? status : bt_check_files(root, manifest->files, !options->skip_hashes);
}

static bertile_status start_parts(const char *root, const bertile_options *options,
                                  bertile_model *model) {
    char path[PATH_MAX];
    bt_manifest *manifest = &model->manifest;
    bertile_status status = bt_open_runtime(root, manifest->files, options->runtime);
    snprintf(path, sizeof path, "%s/params.safetensors", root);
    if (!status) status = bt_read_params(path, manifest->params, &model->params);
    if (!status) status = bt_check_ids(manifest, &model->params);
    snprintf(path, sizeof path, "%s/lib.so", root);
    if (!status) status = start_machine(model, path);
    if (status) return status;
    size_t before = manifest->input_count + 1;
    model->arguments = calloc(before + manifest->param_count, sizeof *model->arguments);
    if (!model->arguments) return bt_no_memory();
    if (manifest->param_count)
        memcpy(model->arguments + before, model->params.tensors,
               manifest->param_count * sizeof *model->arguments);
    return BERTILE_OK;
}

bertile_status bertile_open(const char *directory, const bertile_options *options,
                            bertile_model **model) {
    bertile_options chosen = {0};
    if (!directory || !model) return bt_fail(BERTILE_INPUT, "no directory, or no place, was given");
    *model = NULL;
    if (options && options->size > sizeof chosen) /* of a later version: known parts come first */
        memcpy(&chosen, options, sizeof chosen);
    else if (options)
        memcpy(&chosen, options, options->size);
    bertile_model *made = calloc(1, sizeof *made);
    if (!made) return bt_no_memory();
    pthread_mutex_init(&made->lock, NULL);
    bertile_status status = check_parts(directory, &chosen, made);
    if (!status) status = bt_enter();
    if (!status) {
        status = start_parts(directory, &chosen, made);
        bt_leave();
    }
    if (status)
        bertile_close(made);
    else
        *model = made;
    return status;
}

void bertile_close(bertile_model *model) {
    if (!model) return;
    int entered = !bt_enter(); /* where it fails, nothing was opened */
    bt_stop_worker(&model->worker);
    bt_release(&model->entry);
    bt_release(&model->machine);
    bt_release(&model->module);
    bt_free_params(&model->params);
    if (entered) bt_leave();
    bt_free_manifest(&model->manifest);
    pthread_mutex_destroy(&model->lock);
    free(model->arguments);
    free(model);
}

bertile_status bertile_set_threads(bertile_model *model, int32_t threads) {
    int32_t count;
    bertile_status status = bt_thread_count(threads, &count);
    if (!status) status = bt_enter();
    if (status) return status;
    pthread_mutex_lock(&model->lock);
    if (count != model->worker.threads) bt_stop_worker(&model->worker);
    model->worker.threads = count;
    pthread_mutex_unlock(&model->lock);
    bt_leave();
    return BERTILE_OK;
}

/* -- running */

typedef struct chunk { /* rows of a request that the compiled function takes at once */
    bertile_model *model;
    const bt_request *request;
    bertile_result *result;
    int64_t first, rows, step, width, blocks;
    char *memory; /* the inputs and the table of blocks, one behind the other */
    size_t table; /* where the table starts in it */
} chunk;

static size_t aligned(size_t size) { return (size + BT_ALIGNMENT - 1) / BT_ALIGNMENT * BT_ALIGNMENT; }

static size_t input_size(const chunk *part, size_t index) {
    size_t item = (size_t)part->model->manifest.inputs[index].bits / 8;
    return aligned((size_t)(part->step * part->width) * item);
}

static bertile_status fill_chunk(chunk *part) {
    const bt_manifest *manifest = &part->model->manifest;
    const bt_request *request = part->request;
    part->table = 0;
    for (size_t i = 0; i < manifest->input_count; i++) part->table += input_size(part, i);
    part->blocks =
        bt_blocks(request, part->first, part->rows, part->step, manifest->lanes, NULL);
    part->memory = bt_aligned(part->table + (size_t)part->blocks * 4 * sizeof(int32_t));
    if (!part->memory) return bt_no_memory();
    char *at = part->memory;
    for (size_t i = 0; i < manifest->input_count; at += input_size(part, i++))
        bt_fit(&manifest->inputs[i], request->given[i], request, part->first, part->rows,
               part->step, part->width, at);
    bt_blocks(request, part->first, part->rows, part->step, manifest->lanes,
              (int32_t *)(part->memory + part->table));
    return BERTILE_OK;
}

/* TVM's allocator keeps every freed buffer for the next request of exactly its size: without a
 * limit, a server that sees every batch and length would keep all activations of each. */
static bertile_status limit_pool(const chunk *part) {
    bertile_model *model = part->model;
    int64_t key[3] = {part->step, part->width, part->blocks};
    for (int i = 0; i < model->shape_count; i++)
        if (!memcmp(model->shapes[i], key, sizeof key)) return BERTILE_OK;
    if (model->shape_count == KEPT_SHAPES) {
        bt_any none;
        bertile_status status = bt_call(bt_functions[BT_CLEAR_MEMORY], NULL, 0, &none);
        if (status) return status;
        model->shape_count = 0;
    }
    memcpy(model->shapes[model->shape_count++], key, sizeof key);
    return BERTILE_OK;
}

static bertile_status place_outputs(const chunk *part, const bt_any *returned) {
    const bt_manifest *manifest = &part->model->manifest;
    bt_any count;
    bertile_status status = bt_call(bt_functions[BT_ARRAY_SIZE], returned, 1, &count);
    if (!status && count.value.integer != (int64_t)manifest->output_count)
        status = bt_fail(BERTILE_FAILED,
                         "the library gives %lld outputs, the manifest names %zu; compile the "
                         "bundle again",
                         (long long)count.value.integer, manifest->output_count);
    for (size_t i = 0; i < manifest->output_count && !status; i++) {
        bt_any arguments[] = {*returned, bt_integer((int64_t)i)}, tensor;
        status = bt_call(bt_functions[BT_ARRAY_GET], arguments, 2, &tensor);
        if (status) break;
        status = bt_place(part->result, &manifest->outputs[i], i, bt_fields(&tensor),
                          part->request, part->first, part->rows, part->step, part->width);
        bt_release(&tensor);
    }
    return status;
}

/* Call the compiled function; done in the model's own thread. */
static bertile_status run_chunk(void *data) {
    const chunk *part = data;
    bertile_model *model = part->model;
    size_t inputs = model->manifest.input_count, count = inputs + 1;
    bt_managed managed[BT_INPUTS + 1];
    int64_t shape[] = {part->step, part->width}, table[] = {part->blocks, 4};
    char *at = part->memory;
    bt_any returned = {0};
    bertile_status status = limit_pool(part);
    for (size_t i = 0; i < inputs && !status; at += input_size(part, i++))
        status = bt_tensor(&managed[i], at, 2, shape, 0, model->manifest.inputs[i].bits,
                           &model->arguments[i]);
    if (!status)
        status = bt_tensor(&managed[inputs], part->memory + part->table, 2, table, 0, 32,
                           &model->arguments[inputs]);
    if (!status)
        status = bt_call(model->entry.value.pointer, model->arguments,
                         (int32_t)(count + model->manifest.param_count), &returned);
    if (!status) status = place_outputs(part, &returned);
    bt_release(&returned);
    for (size_t i = 0; i < count; i++) bt_release(&model->arguments[i]);
    return status;
}

/* How many rows from `first` on go through the model at once: as many as the bundle was compiled
 * for, else what the caches of its threads hold. */
static int64_t rows_of_pass(const bertile_model *model, const bt_request *request, int64_t first) {
    int64_t fixed = model->manifest.static_batch, left = request->batch - first, rows = 0;
    int64_t room = (int64_t)BT_PASS_BLOCKS * model->worker.threads;
    int64_t block_tokens = model->manifest.lanes;
    if (model->manifest.together) return left;
    if (fixed) return left < fixed ? left : fixed;
    while (rows < left) {
        room -= bt_blocks(request, first + rows, 1, 1, block_tokens, NULL);
        if (rows && room < 0) break;
        rows++;
    }
    return rows;
}

static bertile_status run_request(bertile_model *model, const bt_request *request,
                                  bertile_result *result) {
    const bt_manifest *manifest = &model->manifest;
    int64_t width = manifest->static_length ? manifest->static_length : request->length;
    bertile_status status = BERTILE_OK;
    for (int64_t first = 0, rows; first < request->batch && !status; first += rows) {
        rows = rows_of_pass(model, request, first);
        chunk part = {.model = model, .request = request, .result = result, .first = first,
                      .rows = rows, .width = width,
                      .step = manifest->static_batch ? manifest->static_batch : rows};
        if (part.step > INT32_MAX / width)
            status = bt_fail(BERTILE_INPUT, "%lld rows of %lld tokens are too many; give fewer rows",
                             (long long)part.step, (long long)width);
        if (!status) status = fill_chunk(&part);
        if (!status) status = bt_work_on(&model->worker, run_chunk, &part);
        free(part.memory);
    }
    return status;
}

bertile_status bertile_run(bertile_model *model, const bertile_tensor *inputs, size_t count,
                           bertile_result **result) {
    bt_request request = {0};
    if (!model || !result || (count && !inputs))
        return bt_fail(BERTILE_INPUT, "no model, no inputs or no place for a result was given");
    *result = NULL;
    bertile_status status = bt_check_inputs(&model->manifest, inputs, count, &request);
    bertile_result *made = status ? NULL : bt_make_result(&model->manifest);
    if (!status && !made) status = bt_no_memory();
    if (!status) status = bt_enter();
    if (!status) {
        pthread_mutex_lock(&model->lock);
        status = run_request(model, &request, made);
        pthread_mutex_unlock(&model->lock);
        bt_leave();
    }
    if (!status) bt_clear_tails(made, &model->manifest, &request);
    if (status)
        bertile_free(made);
    else
        *result = made;
    free(request.ends);
    return status;
}

/* -- what a model says of itself */

int32_t bertile_threads(const bertile_model *model) { return model->worker.threads; }

size_t bertile_input_count(const bertile_model *model) { return model->manifest.input_count; }

const char *bertile_input_name(const bertile_model *model, size_t index) {
    return index < model->manifest.input_count ? model->manifest.inputs[index].name : NULL;
}

size_t bertile_output_count(const bertile_model *model) { return model->manifest.output_count; }

const char *bertile_output_name(const bertile_model *model, size_t index) {
    return index < model->manifest.output_count ? model->manifest.outputs[index].name : NULL;
}

int64_t bertile_max_length(const bertile_model *model) { return model->manifest.max_length; }

const char *bertile_manifest(const bertile_model *model) { return model->manifest.text; }
