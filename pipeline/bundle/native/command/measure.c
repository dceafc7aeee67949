/* bertile-run --measure: every candidate of an archive in a process of its own. */
#include "measure.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { SECONDS = 120 }; /* of one candidate, after which it is ended */

static void escape(const char *text, char *out, size_t size) {
    size_t used = 0;
    for (; *text && used + 8 < size; text++) {
        unsigned char c = (unsigned char)*text;
        if (c < 0x20)
            used += (size_t)snprintf(out + used, size - used, "\\u%04x", c);
        else {
            if (c == '"' || c == '\\') out[used++] = '\\';
            out[used++] = (char)c;
        }
    }
    out[used] = 0;
}

/* The first line of /proc/cpuinfo with that key, or of a file of its own where key is NULL. */
static int first_line(const char *path, const char *key, char *found, size_t size) {
    char line[512];
    FILE *file = fopen(path, "re");
    *found = 0;
    while (file && !*found && fgets(line, sizeof line, file)) {
        const char *value = key ? strchr(line, ':') : line;
        if (!value || (key && strncmp(line, key, strlen(key)))) continue;
        value += key ? 1 + strspn(value + 1, " \t") : 0;
        snprintf(found, size, "%.*s", (int)strcspn(value, "\n"), value);
    }
    if (file) fclose(file);
    return *found != 0;
}

static void processor(char *name, size_t size) {
    char found[256];
    if (!first_line("/proc/cpuinfo", "model name", found, sizeof found) &&
        !first_line("/sys/firmware/devicetree/base/model", NULL, found, sizeof found) &&
        !first_line("/proc/cpuinfo", "CPU part", found, sizeof found))
        snprintf(found, sizeof found, "unknown");
    escape(found, name, size);
}

static bertile_status write_header(int output, const bt_mapping *text) {
    char cpu[600], when[40];
    time_t now = time(NULL);
    struct tm parts;
    processor(cpu, sizeof cpu);
    strftime(when, sizeof when, "%Y-%m-%dT%H:%M:%S+00:00", gmtime_r(&now, &parts));
    int failed = dprintf(output,
                         "{\"schema\": %d, \"machine\": {\"cpu\": \"%s\", \"cores\": %ld}, "
                         "\"time\": \"%s\", \"pack\": %.*s}\n",
                         BT_PACK_SCHEMA, cpu, sysconf(_SC_NPROCESSORS_ONLN), when,
                         (int)text->size, (const char *)text->data) < 0;
    return failed ? bt_fail(BERTILE_FAILED, "cannot write the result: %s", strerror(errno))
                  : BERTILE_OK;
}

static void write_failure(int output, int64_t id, const char *why) {
    char text[600];
    escape(why, text, sizeof text);
    /* a candidate that was killed may have left half a line */
    dprintf(output, "\n{\"candidate\": %lld, \"error\": \"%s\"}\n", (long long)id, text);
}

/* In a process of its own, so that a crash or a hang costs one candidate. */
static bertile_status run_apart(const char *root, const json *manifest, const json *candidate,
                                const char *runtime, bt_seen *seen, int output) {
    const json *number = json_get_kind(candidate, "id", JSON_INTEGER);
    int64_t id = number ? number->integer : -1;
    int state = 0;
    pid_t child = fork();
    if (child < 0) return bt_fail(BERTILE_FAILED, "cannot start a process: %s", strerror(errno));
    if (!child) {
        alarm(SECONDS);
        bertile_status status = bt_try(root, manifest, candidate, runtime, seen, output);
        if (status == BERTILE_PLATFORM) fprintf(stderr, "bertile-run: %s\n", bertile_error());
        if (status && status != BERTILE_PLATFORM) write_failure(output, id, bertile_error());
        _exit(status == BERTILE_PLATFORM ? BERTILE_PLATFORM : 0);
    }
    while (waitpid(child, &state, 0) < 0 && errno == EINTR)
        ;
    if (WIFEXITED(state) && WEXITSTATUS(state) == BERTILE_PLATFORM)
        return bt_fail(BERTILE_PLATFORM, "no candidate can be run here");
    if (WIFSIGNALED(state)) {
        char why[100];
        int which = WTERMSIG(state);
        snprintf(why, sizeof why, which == SIGALRM ? "no result within %d s" : "ended by signal %d",
                 which == SIGALRM ? SECONDS : which);
        write_failure(output, id, why);
    }
    return BERTILE_OK;
}

static bertile_status measure_all(const char *root, const char *runtime, int output) {
    char path[PATH_MAX + 20], why[100];
    bt_mapping text;
    snprintf(path, sizeof path, "%s/manifest.json", root);
    if (bt_map(path, &text))
        return bt_fail(BERTILE_INPUT, "cannot read %s: %s", path, strerror(errno));
    json *manifest = json_parse((const char *)text.data, text.size, why);
    const json *target = json_get_kind(manifest, "target", JSON_OBJECT);
    const json *candidates = json_get_kind(manifest, "candidates", JSON_ARRAY);
    const json *schema = json_get_kind(manifest, "schema", JSON_INTEGER);
    bt_seen *seen = mmap(NULL, sizeof *seen, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS,
                         -1, 0);
    bertile_status status = seen == MAP_FAILED ? bt_no_memory() : BERTILE_OK;
    if (!status && (!target || !candidates || !schema || !json_get_kind(target, "arch", JSON_STRING)
                    || !json_get_kind(target, "features", JSON_ARRAY)))
        status = bt_fail(BERTILE_INPUT, "%s is no archive of candidates%s%s", root,
                         manifest ? "" : ": ", manifest ? "" : why);
    if (!status && schema->integer > BT_PACK_SCHEMA)
        status = bt_fail(BERTILE_INPUT, "the archive is of a newer bertile; take its bertile-run");
    if (!status) status = bt_check_platform(target);
    if (!status) status = write_header(output, &text);
    size_t done = 0;
    for (const json *one = status ? NULL : candidates->first; one && !status; one = one->next) {
        status = run_apart(root, manifest, one, runtime, seen, output);
        fprintf(stderr, "\rmeasured %zu of %zu", ++done, candidates->count);
    }
    if (done) fputc('\n', stderr);
    if (seen != MAP_FAILED) munmap(seen, sizeof *seen);
    json_free(manifest);
    bt_unmap(&text);
    return status;
}

bertile_status bt_measure(const char *place, const char *output, const char *runtime) {
    char made[PATH_MAX] = "";
    struct stat about;
    if (stat(place, &about))
        return bt_fail(BERTILE_INPUT, "cannot read %s: %s", place, strerror(errno));
    bertile_status status = BERTILE_OK;
    if (!S_ISDIR(about.st_mode)) status = bt_unpack(place, made, sizeof made);
    if (status) return status;
    int file = output ? open(output, O_WRONLY | O_CREAT | O_TRUNC | O_APPEND, 0644)
                      : dup(STDOUT_FILENO);
    if (file < 0)
        status = bt_fail(BERTILE_FAILED, "cannot write %s: %s", output ? output : "the result",
                         strerror(errno));
    if (!status) status = measure_all(*made ? made : place, runtime, file);
    if (file >= 0 && close(file) && !status)
        status = bt_fail(BERTILE_FAILED, "cannot write the result: %s", strerror(errno));
    if (*made) bt_remove(made);
    return status;
}
