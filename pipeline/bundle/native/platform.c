#include "internal.h"

#include <errno.h>
#include <limits.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/syscall.h>
#include <sys/utsname.h>
#include <unistd.h>

#if defined(__aarch64__)
/* The names of /proc/cpuinfo by their bits in the kernel's two words; an emulator answers for its
 * own CPU there, where /proc/cpuinfo may be that of the machine around it. */
static const char *const first_word[] = {
    "fp", "asimd", "evtstrm", "aes", "pmull", "sha1", "sha2", "crc32", "atomics", "fphp",
    "asimdhp", "cpuid", "asimdrdm", "jscvt", "fcma", "lrcpc", "dcpop", "sha3", "sm3", "sm4",
    "asimddp", "sha512", "sve", "asimdfhm", "dit", "uscat", "ilrcpc", "flagm", "ssbs", "sb",
    "paca", "pacg",
};
static const char *const second_word[] = {
    "dcpodp", "sve2", "sveaes", "svepmull", "svebitperm", "svesha3", "svesm4", "flagm2", "frint",
    "svei8mm", "svef32mm", "svef64mm", "svebf16", "i8mm", "bf16", "dgh", "rng", "bti", "mte",
};

static int has_name(const char *const *names, size_t count, unsigned long bits, const char *name) {
    for (size_t i = 0; i < count; i++)
        if (bits >> i & 1 && !strcmp(names[i], name)) return 1;
    return 0;
}

static int has_feature(const char *name) {
    size_t first = sizeof first_word / sizeof *first_word;
    size_t second = sizeof second_word / sizeof *second_word;
    return has_name(first_word, first, getauxval(AT_HWCAP), name) ||
           has_name(second_word, second, getauxval(AT_HWCAP2), name);
}
#else
/* The words of the first line "flags" (x86) or "Features" (ARM) of /proc/cpuinfo, or NULL. */
static char *read_flags(void) {
    FILE *file = fopen("/proc/cpuinfo", "re");
    char *line = NULL, *found = NULL;
    size_t room = 0;
    while (file && !found && getline(&line, &room, file) > 0) {
        size_t key = strcspn(line, " \t:");
        if ((key == 5 && !strncmp(line, "flags", key)) ||
            (key == 8 && !strncmp(line, "Features", key)))
            found = strdup(strchr(line, ':') ? strchr(line, ':') + 1 : "");
    }
    free(line);
    if (file) fclose(file);
    return found;
}

static int has_feature(const char *name) {
    char *flags = read_flags();
    size_t length = strlen(name);
    int found = 0;
    for (char *at = flags; at && *at && !found; at += strcspn(at, " \t\n")) {
        at += strspn(at, " \t\n");
        found = strcspn(at, " \t\n") == length && !strncmp(at, name, length);
    }
    free(flags);
    return found;
}
#endif

/* Linux gives the tiles of AMX to processes that ask. */
static int may_use_tiles(void) {
#if defined(__x86_64__)
    const long request = 0x1023, tile_data = 18; /* asm/prctl.h: ARCH_REQ_XCOMP_PERM */
    return !syscall(SYS_arch_prctl, request, tile_data);
#else
    return 0;
#endif
}

/* What this process is: a 32-bit one is no aarch64, whatever its kernel is. */
static const char *architecture(void) {
#if defined(__aarch64__)
    return "aarch64";
#elif defined(__x86_64__)
    return "x86_64";
#else
    static struct utsname names;
    return uname(&names) ? "unknown" : names.machine;
#endif
}

bertile_status bt_check_platform(const json *target) {
    char missing[400] = "";
    const char *arch = json_get(target, "arch")->text, *here = architecture();
    if (!strcmp(arch, "cuda"))
        return bt_fail(BERTILE_PLATFORM, "the bundle is for a GPU, which only the Python loader "
                                         "uses; run it with loader.py");
    if (strcmp(arch, here))
        return bt_fail(BERTILE_PLATFORM,
                       "the bundle is for %s, this machine is %s; compile the model for this "
                       "machine",
                       arch, here);
    for (const json *word = json_get(target, "features")->first; word; word = word->next)
        if (!has_feature(word->text)) {
            size_t used = strlen(missing);
            snprintf(missing + used, sizeof missing - used, "%s%s", used ? ", " : "", word->text);
        }
    for (const json *word = json_get(target, "features")->first; word; word = word->next)
        if (!*missing && !strcmp(word->text, "amx_tile") && !may_use_tiles())
            return bt_fail(BERTILE_PLATFORM,
                           "Linux does not let this process use the CPU's tiles (AMX): %s; compile "
                           "the model with --target x86-avx512-bf16",
                           strerror(errno));
    if (!*missing) return BERTILE_OK;
    const json *name = json_get_kind(target, "name", JSON_STRING);
    return bt_fail(BERTILE_PLATFORM,
                   "this CPU lacks %s, which the bundle needs (target %s); compile the model with "
                   "a --target that fits this CPU",
                   missing, name ? name->text : "unknown");
}

/* The cores that the quota of the cgroup is worth, or `cores` where it has none. */
static int32_t quota(int32_t cores) {
    long long used = 0, period = 0;
    FILE *file = fopen("/sys/fs/cgroup/cpu.max", "re");
    int read = file ? fscanf(file, "%lld %lld", &used, &period) : 0;
    if (file) fclose(file);
    if (read != 2 || used <= 0 || period <= 0) return cores;
    long long worth = (used + period - 1) / period;
    return worth < cores ? (int32_t)worth : cores;
}

static int32_t available_cores(void) {
    cpu_set_t set;
    long online = sysconf(_SC_NPROCESSORS_ONLN);
    int32_t cores = sched_getaffinity(0, sizeof set, &set) ? (int32_t)online : CPU_COUNT(&set);
    return quota(cores < 1 ? 1 : cores);
}

bertile_status bt_thread_count(int32_t wish, int32_t *threads) {
    int32_t available = available_cores();
    const char *set = getenv("TVM_NUM_THREADS");
    if (wish < 0) return bt_fail(BERTILE_INPUT, "threads is %d; give a whole number from 1", wish);
    if (wish > available)
        return bt_fail(BERTILE_INPUT, "threads is %d, but this process may use %d cores", wish,
                       available);
    *threads = wish ? wish : available;
    if (wish || !set) return BERTILE_OK;
    if (!*set || set[strspn(set, "0123456789")] || strlen(set) > 6)
        return bt_fail(BERTILE_INPUT,
                       "TVM_NUM_THREADS is '%s'; set it to a number, or not at all", set);
    int32_t limit = atoi(set) > 1 ? atoi(set) : 1;
    if (limit < available) *threads = limit;
    return BERTILE_OK;
}
