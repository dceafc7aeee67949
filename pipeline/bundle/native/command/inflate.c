/* Deflate (RFC 1951), unpacked into memory of the size that is known beforehand. */
#include "arrays.h"

#include <string.h>

enum { LONGEST = 15, SYMBOLS = 288 };

typedef struct stream {
    const unsigned char *in, *end;
    uint32_t bits;
    int held, bad;
    unsigned char *out, *begin, *limit;
} stream;

typedef struct code { /* a canonical Huffman code: symbols in the order of their code words */
    uint16_t counts[LONGEST + 1], symbols[SYMBOLS];
} code;

static unsigned take(stream *s, int count) {
    while (s->held < count) {
        if (s->in == s->end) {
            s->bad = 1;
            return 0;
        }
        s->bits |= (uint32_t)*s->in++ << s->held;
        s->held += 8;
    }
    unsigned value = s->bits & ((1u << count) - 1);
    s->bits >>= count;
    s->held -= count;
    return value;
}

static void make_code(code *made, const unsigned char *lengths, int count) {
    uint16_t starts[LONGEST + 2] = {0};
    memset(made, 0, sizeof *made);
    for (int i = 0; i < count; i++) made->counts[lengths[i]]++;
    made->counts[0] = 0;
    for (int i = 1; i <= LONGEST; i++) starts[i + 1] = (uint16_t)(starts[i] + made->counts[i]);
    for (int i = 0; i < count; i++)
        if (lengths[i]) made->symbols[starts[lengths[i]]++] = (uint16_t)i;
}

static int next_symbol(stream *s, const code *known) {
    int word = 0, first = 0, index = 0;
    for (int length = 1; length <= LONGEST && !s->bad; length++) {
        word |= (int)take(s, 1);
        int count = known->counts[length];
        if (word - first < count) {
            int place = index + word - first;
            if (place < SYMBOLS && place >= 0) return known->symbols[place];
            break;
        }
        index += count;
        first = (first + count) << 1;
        word <<= 1;
    }
    s->bad = 1;
    return 0;
}

static void copy_stored(stream *s) {
    s->bits = 0;
    s->held = 0;
    if (s->end - s->in < 4) {
        s->bad = 1;
        return;
    }
    size_t size = (size_t)(s->in[0] | s->in[1] << 8), check = (size_t)(s->in[2] | s->in[3] << 8);
    s->in += 4;
    s->bad = size != (~check & 0xffff) || size > (size_t)(s->end - s->in) ||
             size > (size_t)(s->limit - s->out);
    if (s->bad) return;
    memcpy(s->out, s->in, size);
    s->out += size;
    s->in += size;
}

static void copy_back(stream *s, int symbol, const code *distances) {
    static const unsigned char extra[29] = {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2,
                                            2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 0};
    static const uint16_t lengths[29] = {3,  4,  5,  6,  7,  8,  9,  10, 11,  13,
                                         15, 17, 19, 23, 27, 31, 35, 43, 51,  59,
                                         67, 83, 99, 115, 131, 163, 195, 227, 258};
    if (symbol > 285) {
        s->bad = 1;
        return;
    }
    size_t length = lengths[symbol - 257] + take(s, extra[symbol - 257]);
    int kind = next_symbol(s, distances), more = kind < 4 ? 0 : kind / 2 - 1;
    if (kind > 29) s->bad = 1;
    if (s->bad) return;
    size_t distance = (kind < 4 ? (size_t)kind : (size_t)(2 + kind % 2) << more) + 1;
    distance += take(s, more);
    if (distance > (size_t)(s->out - s->begin) || length > (size_t)(s->limit - s->out)) s->bad = 1;
    for (; length && !s->bad; length--, s->out++) *s->out = s->out[-(ptrdiff_t)distance];
}

static void copy_coded(stream *s, const code *literals, const code *distances) {
    while (!s->bad) {
        int symbol = next_symbol(s, literals);
        if (s->bad || symbol == 256) return;
        if (symbol > 256)
            copy_back(s, symbol, distances);
        else if (s->out == s->limit)
            s->bad = 1;
        else
            *s->out++ = (unsigned char)symbol;
    }
}

static void fixed_codes(code *literals, code *distances) {
    unsigned char lengths[SYMBOLS];
    for (int i = 0; i < SYMBOLS; i++) lengths[i] = i < 144 ? 8 : i < 256 ? 9 : i < 280 ? 7 : 8;
    make_code(literals, lengths, SYMBOLS);
    memset(lengths, 5, 30);
    make_code(distances, lengths, 30);
}

static void read_codes(stream *s, code *literals, code *distances) {
    static const unsigned char order[19] = {16, 17, 18, 0, 8,  7, 9,  6, 10, 5,
                                            11, 4,  12, 3, 13, 2, 14, 1, 15};
    unsigned char lengths[320] = {0};
    int first = (int)take(s, 5) + 257, second = (int)take(s, 5) + 1, count = (int)take(s, 4) + 4;
    for (int i = 0; i < count; i++) lengths[order[i]] = (unsigned char)take(s, 3);
    make_code(literals, lengths, 19);
    memset(lengths, 0, sizeof lengths);
    for (int i = 0; i < first + second && !s->bad;) {
        int symbol = next_symbol(s, literals), value = 0, times = 1;
        if (symbol < 16) value = symbol;
        if (symbol == 16 && i) value = lengths[i - 1];
        if (symbol == 16) times = 3 + (int)take(s, 2);
        if (symbol == 17) times = 3 + (int)take(s, 3);
        if (symbol == 18) times = 11 + (int)take(s, 7);
        if (i + times > first + second) s->bad = 1;
        for (; times && !s->bad; times--) lengths[i++] = (unsigned char)value;
    }
    if (s->bad || first > 286 || second > 30) {
        s->bad = 1;
        return;
    }
    make_code(literals, lengths, first);
    make_code(distances, lengths + first, second);
}

int bt_inflate(const unsigned char *in, size_t size, unsigned char *out, size_t out_size) {
    stream s = {.in = in, .end = in + size, .out = out, .begin = out, .limit = out + out_size};
    code literals, distances;
    unsigned last = 0;
    while (!last && !s.bad) {
        last = take(&s, 1);
        unsigned kind = take(&s, 2);
        if (s.bad || kind == 3) return -1;
        if (kind == 0) {
            copy_stored(&s);
            continue;
        }
        if (kind == 1)
            fixed_codes(&literals, &distances);
        else
            read_codes(&s, &literals, &distances);
        copy_coded(&s, &literals, &distances);
    }
    return s.bad || s.out != s.limit ? -1 : 0;
}
