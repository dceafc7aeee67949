#include "internal.h"

#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char again[] = "compile the bundle again";

/* The reason why a manifest is damaged, or NULL. */
static const char *check_kinds(const json *tree) {
    static const struct {
        const char *key;
        json_kind kind;
        const char *wrong;
    } kinds[] = {
        {"entry", JSON_STRING, "'entry' is no string"},
        {"model", JSON_OBJECT, "'model' is no object"},
        {"target", JSON_OBJECT, "'target' is no object"},
        {"lanes", JSON_INTEGER, "'lanes' is no whole number"},
        {"inputs", JSON_ARRAY, "'inputs' is no list"},
        {"outputs", JSON_ARRAY, "'outputs' is no list"},
        {"static", JSON_OBJECT, "'static' is no object"},
        {"params", JSON_ARRAY, "'params' is no list"},
        {"files", JSON_OBJECT, "'files' is no object"},
    };
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++)
        if (!json_get_kind(tree, kinds[i].key, kinds[i].kind)) return kinds[i].wrong;
    return NULL;
}

static const char *const fills[] = {"none", "zeros", "ones", "places"};

const char *bt_fill_name(bt_fill fill) {
    return fills[fill];
}

bt_fill bt_fill_named(const char *text) {
    for (int fill = BT_FILL_ZEROS; fill <= BT_FILL_PLACES; fill++)
        if (!strcmp(fills[fill], text)) return (bt_fill)fill;
    return BT_FILL_NONE;
}

static const char *read_input(const json *spec, bt_input *input) {
    static const char wrong[] = "an input is not described as it should be";
    const json *name = json_get_kind(spec, "name", JSON_STRING);
    const json *dtype = json_get_kind(spec, "dtype", JSON_STRING);
    const json *below = json_get(spec, "below"), *fill = json_get(spec, "default");
    if (!name || !dtype || !below || !fill) return wrong;
    input->name = name->text;
    input->bits = !strcmp(dtype->text, "int64") ? 64 : !strcmp(dtype->text, "int32") ? 32 : 0;
    if (!input->bits || (below->kind != JSON_INTEGER && below->kind != JSON_NULL)) return wrong;
    int64_t most = input->bits == 64 ? INT64_MAX : INT32_MAX;
    input->below = below->kind == JSON_NULL ? 0 : below->integer;
    if (below->kind == JSON_INTEGER && (below->integer < 1 || below->integer > most)) return wrong;
    if (!strcmp(name->text, "attention_mask") && input->below != 2) return wrong;
    input->limit = input->below ? input->below - 1 : most;
    input->fill = BT_FILL_NONE;
    if (fill->kind == JSON_NULL) return NULL;
    if (fill->kind != JSON_STRING) return wrong;
    input->fill = bt_fill_named(fill->text);
    return input->fill == BT_FILL_NONE ? wrong : NULL;
}

static bertile_dtype read_dtype(const char *text) {
    static const char *const names[] = {"int8",   "int16",  "int32",   "int64",   "uint8",  "uint16",
                                        "uint32", "uint64", "float16", "float32", "float64"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (!strcmp(names[i], text)) return (bertile_dtype)(i + 1);
    return (bertile_dtype)0;
}

static const char *read_output(const json *spec, bt_output *output) {
    static const char wrong[] = "an output is not described as it should be";
    const json *name = json_get_kind(spec, "name", JSON_STRING);
    const json *axes = json_get_kind(spec, "axes", JSON_ARRAY);
    const json *dtype = json_get_kind(spec, "dtype", JSON_STRING);
    if (!name || !axes || !dtype || axes->count > BT_RANK) return wrong;
    output->name = name->text;
    output->type = dtype->text;
    if (!(output->dtype = read_dtype(dtype->text))) return wrong;
    output->rank = (int)axes->count;
    int index = 0;
    for (const json *axis = axes->first; axis; axis = axis->next, index++) {
        const char *text = axis->kind == JSON_STRING ? axis->text : "";
        output->axes[index] = !strcmp(text, "batch")    ? BT_AXIS_BATCH
                              : !strcmp(text, "length") ? BT_AXIS_LENGTH
                                                        : BT_AXIS_FIXED;
        output->sizes[index] = axis->integer;
        if (output->axes[index] == BT_AXIS_FIXED &&
            (axis->kind != JSON_INTEGER || axis->integer < 1 || axis->integer > INT32_MAX))
            return wrong;
    }
    return NULL;
}

/* Whether a list of names, or (by a key) of objects that have one, names something twice. */
static int has_twice(const json *list, const char *key) {
    for (const json *item = list->first; item; item = item->next)
        for (const json *other = item->next; other; other = other->next)
            if (!strcmp((key ? json_get(item, key) : item)->text,
                        (key ? json_get(other, key) : other)->text))
                return 1;
    return 0;
}

static const char *read_specs(const json *tree, bt_manifest *manifest) {
    const json *inputs = json_get(tree, "inputs"), *outputs = json_get(tree, "outputs");
    const char *wrong = NULL;
    if (!inputs->count || !outputs->count) return "'inputs' or 'outputs' is empty";
    if (inputs->count > BT_INPUTS) return "'inputs' is too long";
    if (outputs->count > BT_INPUTS) return "'outputs' is too long";
    manifest->inputs = calloc(inputs->count, sizeof *manifest->inputs);
    manifest->outputs = calloc(outputs->count, sizeof *manifest->outputs);
    if (!manifest->inputs || !manifest->outputs) return "out of memory";
    for (const json *spec = inputs->first; spec && !wrong; spec = spec->next)
        wrong = read_input(spec, &manifest->inputs[manifest->input_count++]);
    for (const json *spec = outputs->first; spec && !wrong; spec = spec->next)
        wrong = read_output(spec, &manifest->outputs[manifest->output_count++]);
    if (!wrong && has_twice(inputs, "name")) return "'inputs' names something twice";
    if (!wrong && has_twice(outputs, "name")) return "'outputs' names something twice";
    return wrong;
}

static const char *read_limit(const json *object, const char *key, int needed, int64_t *limit) {
    const json *found = json_get(object, key);
    *limit = 0;
    if (!found && needed) return "'max_length' is missing";
    if (!found || found->kind == JSON_NULL) return NULL;
    if (found->kind != JSON_INTEGER || found->integer <= 0 || found->integer > INT32_MAX)
        return "'max_length' or 'static' is no positive number";
    *limit = found->integer;
    return NULL;
}

/* A static shape of bounded size; and only rows that are one pass may meet in an output. */
static const char *check_shapes(const bt_manifest *manifest) {
    int64_t batch = manifest->static_batch, length = manifest->static_length; /* of 31 bits */
    if ((batch ? batch : 1) * (length ? length : 1) > BT_MOST_TOKENS)
        return "'static' has too many tokens";
    for (size_t i = 0; i < manifest->output_count && !manifest->together; i++) {
        int rows = 0;
        for (int axis = 0; axis < manifest->outputs[i].rank; axis++)
            rows += manifest->outputs[i].axes[axis] == BT_AXIS_BATCH;
        if (rows > 1) return "an output is not described as it should be";
    }
    return NULL;
}

static const char *read_flag(const json *object, const char *key, int *flag) {
    const json *found = json_get(object, key);
    *flag = 0;
    if (!found) return NULL;
    if (found->kind != JSON_BOOL) return "'together' or 'padded' of 'static' is no truth value";
    *flag = (int)found->integer;
    return NULL;
}

static const char *check_target(const json *target) {
    static const char wrong[] = "'target' is not described as it should be";
    const json *features = json_get_kind(target, "features", JSON_ARRAY);
    if (!json_get_kind(target, "arch", JSON_STRING) || !features) return wrong;
    for (const json *word = features->first; word; word = word->next)
        if (word->kind != JSON_STRING) return wrong;
    return NULL;
}

static const char *check_files(const json *files, const json *target) {
    const int gpu = !strcmp(json_get(target, "arch")->text, "cuda"); /* refused later, by name */
    if (!gpu && !json_get(files, "lib.so")) return "'lib.so' is missing";
    if (!json_get(files, "params.safetensors")) return "'params.safetensors' is missing";
    for (const json *file = files->first; file; file = file->next)
        if (!json_get_kind(file, "bytes", JSON_INTEGER) ||
            !json_get_kind(file, "sha256", JSON_STRING))
            return "'files' lacks sizes or hashes";
    return NULL;
}

static const char *read_tree(const json *tree, bt_manifest *manifest) {
    const char *wrong = check_kinds(tree);
    if (wrong) return wrong;
    const json *model = json_get(tree, "model"), *fixed = json_get(tree, "static");
    manifest->entry = json_get(tree, "entry")->text;
    manifest->lanes = json_get(tree, "lanes")->integer;
    manifest->target = json_get(tree, "target");
    manifest->files = json_get(tree, "files");
    manifest->params = json_get(tree, "params");
    manifest->param_count = manifest->params->count;
    if (manifest->lanes != BT_BLOCK_TOKENS) return "'lanes' is not 16";
    for (const json *name = manifest->params->first; name; name = name->next)
        if (name->kind != JSON_STRING) return "'params' is no list of names";
    if (manifest->param_count > BT_MOST_PARAMS) return "'params' is too long";
    if (has_twice(manifest->params, NULL)) return "'params' names something twice";
    if (!wrong) wrong = read_specs(tree, manifest);
    if (!wrong) wrong = read_limit(model, "max_length", 1, &manifest->max_length);
    if (!wrong) wrong = read_limit(fixed, "batch", 0, &manifest->static_batch);
    if (!wrong) wrong = read_limit(fixed, "length", 0, &manifest->static_length);
    if (!wrong) wrong = read_flag(fixed, "together", &manifest->together);
    if (!wrong) wrong = read_flag(fixed, "padded", &manifest->padded);
    if (!wrong) wrong = check_shapes(manifest);
    if (!wrong) wrong = check_target(manifest->target);
    return wrong ? wrong : check_files(manifest->files, manifest->target);
}

/* Whether the hash is that of the file, with zeros where the hash itself stands last. */
static bertile_status check_seal(const char *path, const char *text, size_t size,
                                 const json *seal) {
    enum { DIGITS = 64 };
    char digest[DIGITS + 1] = "", *copy = malloc(size + 1);
    size_t at = size;
    if (!copy) return bt_no_memory();
    memcpy(copy, text, size);
    if (seal->kind == JSON_STRING && strlen(seal->text) == DIGITS && size >= DIGITS)
        for (at = size - DIGITS; at && memcmp(text + at, seal->text, DIGITS);) at--;
    if (at < size) {
        memset(copy + at, '0', DIGITS);
        bt_sha256(copy, size, digest);
    }
    free(copy);
    if (at < size && !strcmp(digest, seal->text)) return BERTILE_OK;
    return bt_fail(BERTILE_FAILED,
                   "%s has changed since it was compiled; copy or compile the bundle again", path);
}

/* The text of a file with a zero behind it, or NULL with errno set. */
static char *read_file(const char *path, size_t *size) {
    bt_mapping mapping;
    if (bt_map(path, &mapping)) return NULL;
    char *text = malloc(mapping.size + 1);
    if (text) {
        if (mapping.size) memcpy(text, mapping.data, mapping.size);
        text[mapping.size] = 0;
    }
    *size = mapping.size;
    bt_unmap(&mapping);
    return text;
}

bertile_status bt_read_manifest(const char *root, bt_manifest *manifest) {
    char path[PATH_MAX], why[100];
    size_t size = 0;
    if ((size_t)snprintf(path, sizeof path, "%s/manifest.json", root) >= sizeof path - 8)
        return bt_fail(BERTILE_FAILED, "the path of the bundle is too long");
    manifest->text = read_file(path, &size);
    if (!manifest->text && (errno == ENOENT || errno == ENOTDIR))
        return bt_fail(BERTILE_FAILED, "%s is not a bundle: it has no manifest.json", root);
    if (!manifest->text)
        return bt_fail(BERTILE_FAILED, "cannot read %s: %s", path, strerror(errno));
    manifest->tree = json_parse(manifest->text, size, why);
    if (!manifest->tree)
        return bt_fail(BERTILE_FAILED, "%s is damaged: %s; %s", path, why, again);
    const json *schema = json_get_kind(manifest->tree, "schema", JSON_INTEGER);
    if (!schema || schema->integer < 1)
        return bt_fail(BERTILE_FAILED,
                       "%s is not the manifest of a bundle: it has no schema version", path);
    if (schema->integer > BT_SCHEMA)
        return bt_fail(BERTILE_FAILED,
                       "%s has schema %lld, this loader reads up to %d; take the loader of a newer "
                       "Bertile",
                       root, (long long)schema->integer, BT_SCHEMA);
    const json *seal = json_get(manifest->tree, "sha256"); /* none: of an older Bertile */
    bertile_status status = seal ? check_seal(path, manifest->text, size, seal) : BERTILE_OK;
    if (status) return status;
    const char *wrong = read_tree(manifest->tree, manifest);
    if (wrong) return bt_fail(BERTILE_FAILED, "%s is damaged: %s; %s", path, wrong, again);
    return BERTILE_OK;
}

void bt_free_manifest(bt_manifest *manifest) {
    free(manifest->text);
    json_free(manifest->tree);
    free(manifest->inputs);
    free(manifest->outputs);
    *manifest = (bt_manifest){0};
}
