/* The heart of a product in fp32: some rows times one panel of WIDE outputs, a tile of sums in registers at a time.

A row's sums are added up in the same order whatever rows stand beside it. Does not know where panels come from. */
#ifndef PRECIS_TILES_H
#define PRECIS_TILES_H

#include "vectors.h"

#include <stddef.h>

enum {
    ROWS = 6,   /* whose sums, two vectors each, registers hold beside two of weights and one number */
    DEEP = 256, /* inputs of a panel that the first cache holds in fp32, beside those of ROWS rows */
};

/* Adds the product of x [rows, deep] and a panel's part [deep, WIDE], in fp16 where `half`, to out [rows, WIDE], or,
where it is given, to bias [WIDE]; `rows` and `half` are constants where this is used. Meanwhile as many lines as there
are inputs come from `next`, if it is given, as far as the second cache. */
INLINE void add_tile(int rows, int half, const float *x, int64_t in, const void *part, int64_t deep, const float *bias,
                     float *out, int64_t outputs, const float *next) {
    lanes sums[ROWS][2] = {0};
#pragma GCC unroll 4
    for (int64_t i = 0; i < deep; i++) {
        lanes weight[2];
        if (next) __builtin_prefetch(next + i * WIDE, 0, 2);
        if (half) {
            const uint16_t *at = (const uint16_t *)part + i * WIDE;
            if (i % 2 == 0) __builtin_prefetch((const char *)at + AHEAD);
            weight[0] = widened(at), weight[1] = widened(at + LANES);
        } else {
            const float *at = (const float *)part + i * WIDE;
            if (rows < ROWS) __builtin_prefetch((const char *)at + AHEAD);
            weight[0] = load(at), weight[1] = load(at + LANES);
        }
        for (int r = 0; r < rows; r++)
            for (int v = 0; v < 2; v++) sums[r][v] = fused(spread(x[r * in + i]), weight[v], sums[r][v]);
    }
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < 2; v++) {
            float *to = out + r * outputs + v * LANES;
            store(to, (bias ? load(bias + v * LANES) : load(to)) + sums[r][v]);
        }
}

/* The same of any number of rows. While many are multiplied, memory would have nothing to do: what is read `next` comes
from it. */
INLINE void add_tiles(int half, int64_t rows, const float *x, int64_t in, const void *part, int64_t deep,
                      const float *bias, float *out, int64_t outputs, const float *next) {
    if (next && rows >= 2 * ROWS) {
        add_tile(ROWS, half, x, in, part, deep, bias, out, outputs, next);
        rows -= ROWS, x += ROWS * in, out += ROWS * outputs;
    }
    while (rows) {
        const int now = rows == 7 || rows == 8 ? 4 : rows < ROWS ? rows : ROWS; /* 4 + 4, not 6 + 2 */
        switch (now) {
        case 1: add_tile(1, half, x, in, part, deep, bias, out, outputs, NULL); break;
        case 2: add_tile(2, half, x, in, part, deep, bias, out, outputs, NULL); break;
        case 3: add_tile(3, half, x, in, part, deep, bias, out, outputs, NULL); break;
        case 4: add_tile(4, half, x, in, part, deep, bias, out, outputs, NULL); break;
        case 5: add_tile(5, half, x, in, part, deep, bias, out, outputs, NULL); break;
        default: add_tile(ROWS, half, x, in, part, deep, bias, out, outputs, NULL);
        }
        rows -= now, x += now * in, out += now * outputs;
    }
}

#endif
