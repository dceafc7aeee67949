/* What glibc has and musl has not, of what TVM's libraries and libstdc++ call that are built for
 * glibc; on a system of musl's own, libstdc++ wants none but the first. */
#define _GNU_SOURCE
#include <locale.h>
#include <stdint.h>
#include <sys/auxv.h>
#include <sys/random.h>
#include <time.h>

unsigned long __getauxval(unsigned long type) { return getauxval(type); }

char __libc_single_threaded;

size_t __strftime_l(char *text, size_t size, const char *format, const struct tm *time,
                    locale_t locale) {
    return strftime_l(text, size, format, time, locale);
}

uint32_t arc4random(void) {
    uint32_t value = 0;
    (void)!getrandom(&value, sizeof value, 0);
    return value;
}

/* not found: the unwinder asks dl_iterate_phdr instead */
int _dl_find_object(void *place, void *found) {
    (void)place, (void)found;
    return -1;
}

/* destructors of thread-local objects: the programs that use this end with their threads */
int __cxa_thread_atexit_impl(void (*destroy)(void *), void *object, void *library) {
    (void)destroy, (void)object, (void)library;
    return 0;
}
