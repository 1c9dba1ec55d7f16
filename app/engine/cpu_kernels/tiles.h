/* The heart of a product in fp32: some rows times one panel of WIDE outputs, a tile of sums in registers at a time.

A row's sums are added up in the same order whatever rows stand beside it. Does not know where panels come from. */
#ifndef PRECIS_TILES_H
#define PRECIS_TILES_H

#include "vectors.h"

#include <stddef.h>

/* Rows as they are read: row r's input i stands at from[r * row_apart + i * input_apart]. */
typedef struct {
    const float *from;
    int64_t row_apart, input_apart;
} rows_of;

/* What memory is asked for meanwhile, as far as the second cache: `bytes`, a constant, for each input whose number has
none of the bits of `skipped`; nothing where `from` is NULL. */
typedef struct {
    const char *from;
    int64_t bytes, skipped;
} fetched;

/* Adds the product of x [rows, deep] and a panel's part [deep, WIDE] to out [rows, WIDE], or, where it is given, to
bias [WIDE]. `rows` and `format` are constants where this is used. Where `ahead`, what follows the part in memory is
asked for as the part is read. */
INLINE void add_tile(int rows, int format, rows_of x, const void *part, int ahead, int64_t deep, const float *bias,
                     float *out, int64_t out_apart, fetched next) {
    const int64_t bytes = WIDE * size_of(format);
    lanes sums[ROWS][2] = {0};
#pragma GCC unroll 4
    for (int64_t i = 0; i < deep; i++) {
        if (ahead && i % (bytes < LINE ? LINE / bytes : 1) == 0) fetch_ahead(at(format, part, i * WIDE), bytes);
        if (next.from && !(i & next.skipped)) fetch_lines(next.from, next.bytes), next.from += next.bytes;
        const lanes weight[2] = {load_from(format, part, i * WIDE), load_from(format, part, i * WIDE + LANES)};
        for (int r = 0; r < rows; r++)
            for (int v = 0; v < 2; v++)
                sums[r][v] = fused(spread(x.from[r * x.row_apart + i * x.input_apart]), weight[v], sums[r][v]);
    }
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < 2; v++) {
            float *to = out + r * out_apart + v * LANES;
            store(to, (bias ? load(bias + v * LANES) : load(to)) + sums[r][v]);
        }
}

/* Rows are divided among as few tiles as there can be, of nearly one size. */
INLINE int64_t tiles_of(int64_t rows, int most) { return (rows + most - 1) / most; }
INLINE int64_t tile_start(int64_t rows, int64_t tiles, int64_t tile) { return rows * tile / tiles; }

/* Calls `tile(n)`, whose rows are then a constant. */
#define OF_ROWS(n, most, tile)                                                                                         \
    switch (n) {                                                                                                       \
    case 1: tile(1); break;                                                                                            \
    case 2: if (2 <= most) tile(2); break;                                                                             \
    case 3: if (3 <= most) tile(3); break;                                                                             \
    case 4: if (4 <= most) tile(4); break;                                                                             \
    case 5: if (5 <= most) tile(5); break;                                                                             \
    case 6: if (6 <= most) tile(6); break;                                                                             \
    case 7: if (7 <= most) tile(7); break;                                                                             \
    case 8: if (8 <= most) tile(8); break;                                                                             \
    case 9: if (9 <= most) tile(9); break;                                                                             \
    case 10: if (10 <= most) tile(10); break;                                                                          \
    case 11: if (11 <= most) tile(11); break;                                                                          \
    default: if (12 <= most) tile(12);                                                                                 \
    }

#endif
