#include "json.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { DEEPEST = 200 };

typedef struct reader {
    const char *at, *end, *begin;
    char *why;
    int depth;
} reader;

static json *read_value(reader *r);

static void *refuse(reader *r, const char *what) {
    if (!*r->why)
        snprintf(r->why, 100, "%s at byte %zu", what, (size_t)(r->at - r->begin));
    return NULL;
}

static void skip_space(reader *r) {
    while (r->at < r->end && strchr(" \t\r\n", *r->at) && *r->at) r->at++;
}

static int next_is(reader *r, char wanted) {
    skip_space(r);
    if (r->at == r->end || *r->at != wanted) return 0;
    r->at++;
    return 1;
}

static json *make(reader *r, json_kind kind) {
    json *value = calloc(1, sizeof *value);
    if (!value) return refuse(r, "out of memory");
    value->kind = kind;
    return value;
}

/* The bytes of a valid UTF-8 sequence at `s`: no overlong form, no surrogate; 0 for any other. */
static int utf8_length(const unsigned char *s, size_t room) {
    int length = s[0] < 0x80 ? 1 : s[0] < 0xc2 ? 0 : s[0] < 0xe0 ? 2 : s[0] < 0xf0 ? 3 : 4;
    if (!length || s[0] > 0xf4 || (size_t)length > room) return 0;
    for (int i = 1; i < length; i++)
        if ((s[i] & 0xc0) != 0x80) return 0;
    if ((s[0] == 0xe0 && s[1] < 0xa0) || (s[0] == 0xed && s[1] > 0x9f)) return 0;
    if ((s[0] == 0xf0 && s[1] < 0x90) || (s[0] == 0xf4 && s[1] > 0x8f)) return 0;
    return length;
}

static int read_hex(reader *r, unsigned *code) {
    if (r->end - r->at < 4) return 0;
    *code = 0;
    for (int i = 0; i < 4; i++, r->at++) {
        char c = *r->at;
        int digit = c >= '0' && c <= '9' ? c - '0' : (c | 32) >= 'a' && (c | 32) <= 'f' ? (c | 32) - 87 : -1;
        if (digit < 0) return 0;
        *code = *code * 16 + (unsigned)digit;
    }
    return 1;
}

/* A character behind \u, two of them for what lies beyond 16 bits; written as UTF-8. */
static char *read_unicode(reader *r, char *out) {
    unsigned code, low;
    if (!read_hex(r, &code)) return refuse(r, "a wrong \\u");
    if (code >= 0xd800 && code < 0xdc00 && r->end - r->at >= 6 && !memcmp(r->at, "\\u", 2)) {
        r->at += 2;
        if (!read_hex(r, &low) || low < 0xdc00 || low > 0xdfff) return refuse(r, "a wrong \\u");
        code = 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00);
    }
    if (!code || (code >= 0xd800 && code < 0xe000)) return refuse(r, "a wrong \\u");
    if (code < 0x80) {
        *out++ = (char)code;
    } else if (code < 0x800) {
        *out++ = (char)(0xc0 | code >> 6);
    } else if (code < 0x10000) {
        *out++ = (char)(0xe0 | code >> 12);
        *out++ = (char)(0x80 | (code >> 6 & 63));
    } else {
        *out++ = (char)(0xf0 | code >> 18);
        *out++ = (char)(0x80 | (code >> 12 & 63));
        *out++ = (char)(0x80 | (code >> 6 & 63));
    }
    if (code >= 0x80) *out++ = (char)(0x80 | (code & 63));
    return out;
}

static char *read_escape(reader *r, char *out) {
    static const char names[] = "\"\\/bfnrt", values[] = "\"\\/\b\f\n\r\t";
    char c = r->at < r->end ? *r->at++ : 0;
    const char *found = c ? strchr(names, c) : NULL;
    if (c == 'u') return read_unicode(r, out);
    if (!found) return refuse(r, "a wrong escape");
    *out = values[found - names];
    return out + 1;
}

/* What follows an opening quote, up to its closing one. */
static char *read_text(reader *r) {
    const char *close = r->at;
    while (close < r->end && *close != '"') close += *close == '\\' ? 2 : 1;
    if (close >= r->end) return refuse(r, "a string without an end");
    char *text = malloc((size_t)(close - r->at) + 1), *out = text;
    if (!text) return refuse(r, "out of memory");
    while (out && r->at < close) {
        int length = utf8_length((const unsigned char *)r->at, (size_t)(close - r->at));
        if (!length || (unsigned char)*r->at < 0x20) {
            out = refuse(r, "a wrong character in a string");
        } else if (*r->at == '\\') {
            r->at++;
            out = read_escape(r, out);
        } else {
            memcpy(out, r->at, (size_t)length);
            out += length;
            r->at += length;
        }
    }
    if (!out) {
        free(text);
        return NULL;
    }
    r->at++;
    *out = 0;
    return text;
}

static json *read_string(reader *r) {
    json *value = make(r, JSON_STRING);
    if (value && !(value->text = read_text(r))) {
        free(value);
        return NULL;
    }
    return value;
}

static const char *digits(const char *at, const char *end) {
    while (at < end && *at >= '0' && *at <= '9') at++;
    return at;
}

static json *read_number(reader *r) {
    char copy[64];
    const char *start = r->at, *at = start + (*start == '-'), *whole = digits(at, r->end);
    int real = 0, bad = whole == at || (*at == '0' && whole - at > 1);
    at = whole;
    if (!bad && at < r->end && *at == '.') {
        const char *fraction = digits(at + 1, r->end);
        real = 1, bad = fraction == at + 1, at = fraction;
    }
    if (!bad && at < r->end && (*at | 32) == 'e') {
        at += 1 + (at + 1 < r->end && (at[1] == '+' || at[1] == '-'));
        const char *power = digits(at, r->end);
        real = 1, bad = power == at, at = power;
    }
    if (bad || (size_t)(at - start) >= sizeof copy) return refuse(r, "a wrong number");
    memcpy(copy, start, (size_t)(at - start));
    copy[at - start] = 0;
    r->at = at;
    json *value = make(r, JSON_INTEGER);
    if (!value) return NULL;
    errno = 0;
    value->integer = real ? 0 : strtoll(copy, NULL, 10);
    value->real = strtod(copy, NULL);
    if (real || errno == ERANGE) value->kind = JSON_REAL;
    return value;
}

static json *read_members(reader *r, json_kind kind, char close) {
    json *value = make(r, kind);
    if (!value || next_is(r, close)) return value;
    json **place = &value->first;
    do {
        char *key = NULL;
        skip_space(r);
        if (kind == JSON_OBJECT) {
            if (!next_is(r, '"')) refuse(r, "a member without a name");
            else if ((key = read_text(r)) && !next_is(r, ':')) refuse(r, "a name without a colon");
        }
        json *item = *r->why ? NULL : read_value(r);
        if (!item) {
            free(key);
            json_free(value);
            return NULL;
        }
        item->key = key;
        *place = item;
        place = &item->next;
        value->count++;
    } while (next_is(r, ','));
    if (next_is(r, close)) return value;
    json_free(value);
    return refuse(r, "a list without an end");
}

static json *read_word(reader *r) {
    static const struct {
        const char *word;
        json_kind kind;
        int64_t value;
    } words[] = {{"null", JSON_NULL, 0}, {"true", JSON_BOOL, 1}, {"false", JSON_BOOL, 0}};
    for (size_t i = 0; i < 3; i++) {
        size_t length = strlen(words[i].word);
        if ((size_t)(r->end - r->at) >= length && !memcmp(r->at, words[i].word, length)) {
            json *value = make(r, words[i].kind);
            if (value) value->integer = words[i].value;
            r->at += length;
            return value;
        }
    }
    return refuse(r, "no value");
}

static json *read_value(reader *r) {
    skip_space(r);
    if (r->at == r->end) return refuse(r, "no value");
    char c = *r->at;
    if (c == '-' || (c >= '0' && c <= '9')) return read_number(r);
    if (c != '"' && c != '[' && c != '{') return read_word(r);
    r->at++;
    if (c == '"') return read_string(r);
    if (++r->depth > DEEPEST) return refuse(r, "lists nested too deeply");
    json *value = read_members(r, c == '[' ? JSON_ARRAY : JSON_OBJECT, c == '[' ? ']' : '}');
    r->depth--;
    return value;
}

json *json_parse(const char *text, size_t size, char *why) {
    reader r = {text, text + size, text, why, 0};
    *why = 0;
    json *value = read_value(&r);
    skip_space(&r);
    if (value && r.at != r.end) {
        json_free(value);
        return refuse(&r, "something behind the value");
    }
    return value;
}

void json_free(json *value) {
    while (value) {
        json *next = value->next;
        json_free(value->first);
        free(value->text);
        free(value->key);
        free(value);
        value = next;
    }
}

const json *json_get(const json *object, const char *key) {
    const json *found = NULL;
    if (!object || object->kind != JSON_OBJECT) return NULL;
    for (const json *member = object->first; member; member = member->next)
        if (!strcmp(member->key, key)) found = member;
    return found;
}

const json *json_get_kind(const json *object, const char *key, json_kind kind) {
    const json *found = json_get(object, key);
    return found && found->kind == kind ? found : NULL;
}
