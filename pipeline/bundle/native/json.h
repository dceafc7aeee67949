/* A strict reader of JSON (RFC 8259): the whole text is one value, in UTF-8, or it is refused. */
#ifndef BERTILE_JSON_H
#define BERTILE_JSON_H

#include <stddef.h>
#include <stdint.h>

typedef enum json_kind {
    JSON_NULL,
    JSON_BOOL,
    JSON_INTEGER,
    JSON_REAL,
    JSON_STRING,
    JSON_ARRAY,
    JSON_OBJECT
} json_kind;

typedef struct json {
    json_kind kind;
    int64_t integer;   /* of JSON_INTEGER, and 0 or 1 of JSON_BOOL */
    double real;       /* of JSON_REAL: fractions, exponents, and what 64 bits cannot hold */
    char *text;        /* of JSON_STRING */
    char *key;         /* of a member of an object */
    size_t count;      /* items of an array, members of an object */
    struct json *first, *next;
} json;

/* Return the value of `size` bytes, or NULL with the reason in `why` (at least 100 bytes). */
json *json_parse(const char *text, size_t size, char *why);
void json_free(json *value);

/* The member of an object, or NULL; the last of several with one key. NULL of what is no object. */
const json *json_get(const json *object, const char *key);
/* The same, or NULL where it is of another kind. */
const json *json_get_kind(const json *object, const char *key, json_kind kind);

#endif
