/* check_json FILE: every prefix of a JSON text, and 20,000 copies with changed bytes, are read
 * without a fault; prints how many of them are JSON. check_json - TEXT…: yes or no for each. */
#include "json.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int reads(const char *text, size_t size) {
    char why[100] = "";
    char *copy = malloc(size ? size : 1); /* of exactly its size, so that reading on is seen */
    memcpy(copy, text, size);
    json *value = json_parse(copy, size, why);
    free(copy);
    if (!value && !*why) abort();
    json_free(value);
    return value != NULL;
}

int main(int count, char **words) {
    if (count > 2) {
        for (int i = 2; i < count; i++) puts(reads(words[i], strlen(words[i])) ? "yes" : "no");
        return 0;
    }
    static char text[1 << 16], changed[1 << 16];
    FILE *file = fopen(words[1], "rb");
    size_t size = file ? fread(text, 1, sizeof text, file) : 0;
    int whole = reads(text, size), cut = 0, damaged = 0;
    if (file) fclose(file);
    while (size && (text[size - 1] == '\n' || text[size - 1] == ' ')) size--;
    for (size_t i = 0; i < size; i++) cut += reads(text, i);
    srand(1);
    for (int i = 0; i < 20000; i++) {
        memcpy(changed, text, size);
        for (int times = 1 + rand() % 3; times; times--)
            changed[(size_t)rand() % size] = rand() % 2 ? "\"{}[],:\\u0e-."[rand() % 13] : (char)rand();
        damaged += reads(changed, size);
    }
    printf("%d %d %d\n", whole, cut, damaged);
    return 0;
}
