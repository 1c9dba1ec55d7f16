/* Matrix products in fp32 with fixed weights, made for the few rows of a decode step: x [rows, in] to x W^T + b.

A product of few rows is as fast as its weights come from memory, one of many as fast as a core multiplies. Weights lie
in panels of WIDE outputs, input by input, so that they are read in order, once for every BLOCK rows; they may be
kept in fp16, where that holds them exactly, or in bf16, half the bytes, and are widened as they come. Up to ROWS rows
share each number that is read.

A row's sums are added up in the same order whatever rows stand beside it: DEEP inputs at a time, one after the other,
and then those sums. So a text's results do not depend on what else is in the batch, to the last bit. Does not know
Python or torch: see `products.py`. */
#if defined(__x86_64__)
#include "tiles.h"

#include <stddef.h>

enum { MOST_SHARING = 8 }; /* of which DEEP is a multiple */

/* What follows a product, and where it goes: from row `row` and output `output` on. */
typedef struct {
    const float *residual; /* [rows, outputs] or NULL */
    float scale;           /* of the first `scaled` outputs, their biases included */
    int64_t scaled;
    int gelu;
    int far; /* whether lines that will be written come from memory */
    float *out; /* [rows, outputs] */
    int64_t outputs, row, output;
} epilogue;

/* Asks for the lines that will be written, of some rows from the epilogue's first on. */
INLINE void fetch_outputs(epilogue then, int64_t first, int64_t rows) {
    for (int64_t r = first; r < first + rows; r++)
        for (int64_t v = 0; v < WIDE; v += LINE / 4) {
            const int64_t to = (then.row + r) * then.outputs + then.output + v;
            __builtin_prefetch(then.out + to, 1);
            if (then.residual) __builtin_prefetch(then.residual + to);
        }
}

/* What comes of the same rows' sums [rows, WIDE]. */
INLINE void finish(epilogue then, int64_t first, int64_t rows, const float *sums) {
    for (int64_t r = 0; r < rows; r++)
        for (int64_t v = 0; v < WIDE; v += LANES) {
            const int64_t output = then.output + v, to = (then.row + first + r) * then.outputs + output;
            lanes x = load(sums + r * WIDE + v);
            if (output + LANES <= then.scaled) x *= spread(then.scale);
            else
                for (int i = 0; i < LANES && output + i < then.scaled; i++) x[i] *= then.scale;
            if (then.gelu) x = gelu_of(x);
            if (then.residual) x += load(then.residual + to);
            store(then.out + to, x);
        }
}

/* One panel and the rows x [rows, in]. Its parts come from memory while the parts before them are multiplied; what is
in 16 bits is widened once, if there are several tiles. */
INLINE void multiply_panel(int format, const float *x, int64_t rows, int64_t in, const void *panel, const float *bias,
                           epilogue then) {
    const int64_t tiles = tiles_of(rows, ROWS), bytes = WIDE * size_of(format);
    int64_t sharing = 1; /* tiles that ask for a share of the next part each: a power of two */
    while (sharing * 2 <= tiles && sharing < MOST_SHARING) sharing *= 2;
    float sums[BLOCK * WIDE], wide[DEEP * WIDE];
    for (int64_t i = 0; i < in; i += DEEP) {
        const int64_t deep = in - i < DEEP ? in - i : DEEP;
        const void *part = at(format, panel, i * WIDE);
        const char *next = at(format, part, deep * WIDE);
        const float *added = i ? NULL : bias;
        if (format != FP32 && tiles > 1)
            for (int64_t j = 0; j < deep * WIDE; j += LANES) store(wide + j, load_from(format, part, j));
        for (int64_t tile = 0; tile < tiles; tile++) {
            const int64_t first = tile_start(rows, tiles, tile), now = tile_start(rows, tiles, tile + 1) - first;
            const rows_of own = {x + first * in + i, in, 1};
            float *to = sums + first * WIDE;
            if (i + DEEP >= in && then.far) fetch_outputs(then, first, now);
            if (tiles == 1) {
#define TILE(n) add_tile(n, format, own, part, 1, deep, added, to, WIDE, (fetched){0})
                OF_ROWS(now, ROWS, TILE)
#undef TILE
            } else {
                const char *share = tile < sharing ? next + tile * (DEEP / sharing) * bytes : NULL;
                const float *of = format == FP32 ? part : wide;
#define TILE(n) add_tile(n, FP32, own, of, 0, deep, added, to, WIDE, (fetched){share, bytes, sharing - 1})
                OF_ROWS(now, ROWS, TILE)
#undef TILE
            }
            if (i + DEEP >= in) finish(then, first, now, to);
        }
    }
}

/* out [rows, outputs] from x [rows, in]; outputs is a multiple of WIDE.

weights [outputs / WIDE, in, WIDE] in `format`; bias [outputs]; residual [rows, outputs] or NULL. The first `scaled`
outputs are multiplied by `scale`; then comes GELU where `gelu` is not 0, and then the residual is added. */
void multiply(const float *x, const void *weights, const float *bias, const float *residual, float *out, int64_t rows,
              int64_t in, int64_t outputs, int format, float scale, int64_t scaled, int gelu, int threads) {
    const int64_t panels = outputs / WIDE, units = panels * ((rows + BLOCK - 1) / BLOCK);
    const int64_t at_once = units >= 32 * threads ? 4 : 1; /* panels that lie together, where all have enough to do */
#pragma omp parallel for schedule(dynamic, at_once) num_threads(threads)
    for (int64_t unit = 0; unit < units; unit++) {
        const int64_t panel = unit % panels, row = unit / panels * BLOCK, output = panel * WIDE;
        const int64_t count = rows - row < BLOCK ? rows - row : BLOCK;
        const float *from = x + row * in, *added = bias + output;
        const void *of = at(format, weights, output * in);
        const epilogue then = {residual, scale, scaled, gelu, rows > BLOCK, out, outputs, row, output};
        switch (format) {
        case FP32: multiply_panel(FP32, from, count, in, of, added, then); break;
        case FP16: multiply_panel(FP16, from, count, in, of, added, then); break;
        default: multiply_panel(BF16, from, count, in, of, added, then);
        }
    }
}

#endif
