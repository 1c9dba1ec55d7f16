/* Matrix products in fp32 with fixed weights, made for the few rows of a decode step: x [rows, in] to x W^T + b.

A product of few rows is as fast as its weights come from memory, one of many as fast as a core multiplies. Weights lie
in panels of WIDE outputs, input by input, so that they are read in order, once for every BLOCK rows; those that fp16
holds exactly may be kept in it, half the bytes, and are widened as they come. Up to ROWS rows share each number that is
read.

A row's sums are added up in the same order whatever rows stand beside it: DEEP inputs at a time, one after the other,
and then those sums. So a text's results do not depend on what else is in the batch, to the last bit. Does not know
Python or torch: see `products.py`. */
#if defined(__x86_64__)
#include "tiles.h"

#include <stddef.h>

/* What follows a product. */
typedef struct {
    const float *residual; /* [rows, outputs] or NULL */
    float scale;           /* of the first `scaled` outputs, their biases included */
    int64_t scaled;
    int gelu;
} epilogue;

/* Of the finished sums out [rows, WIDE], whose first output is the product's `first`. */
static void finish(epilogue then, int64_t rows, float *out, int64_t outputs, int64_t first) {
    for (int64_t r = 0; r < rows; r++)
        for (int v = 0; v < 2; v++) {
            const int64_t at = first + v * LANES;
            float *to = out + r * outputs + v * LANES;
            lanes x = load(to);
            for (int i = 0; i < LANES && at + i < then.scaled; i++) x[i] *= then.scale;
            if (then.gelu) x = gelu_of(x);
            if (then.residual) x += load(then.residual + r * outputs + at);
            store(to, x);
        }
}

/* out [rows, outputs] from x [rows, in]; outputs is a multiple of WIDE.

weights [outputs / WIDE, in, WIDE], fp16 where `half`, else fp32; bias [outputs]; residual [rows, outputs] or NULL. The
first `scaled` outputs are multiplied by `scale`; then comes GELU where `gelu` is not 0, and then the residual is
added. */
void multiply(const float *x, const void *weights, const float *bias, const float *residual, float *out, int64_t rows,
              int64_t in, int64_t outputs, int half, float scale, int64_t scaled, int gelu, int threads) {
    const int64_t panels = outputs / WIDE, units = panels * ((rows + BLOCK - 1) / BLOCK);
    const int64_t at_once = units >= 32 * threads ? 4 : 1; /* panels that lie together, where all have enough to do */
#pragma omp parallel for schedule(dynamic, at_once) num_threads(threads)
    for (int64_t unit = 0; unit < units; unit++) {
        const int64_t panel = unit % panels, row = unit / panels * BLOCK;
        const int64_t count = rows - row < BLOCK ? rows - row : BLOCK;
        float *to = out + row * outputs + panel * WIDE;
        for (int64_t i = 0; i < in; i += DEEP) {
            const int64_t deep = in - i < DEEP ? in - i : DEEP, at = (panel * in + i) * WIDE;
            const float *from = x + row * in + i, *first = i ? NULL : bias + panel * WIDE;
            if (!half) {
                const float *part = (const float *)weights + at;
                add_tiles(0, count, from, in, part, deep, first, to, outputs, part + deep * WIDE);
            } else if (count <= ROWS) {
                add_tiles(1, count, from, in, (const uint16_t *)weights + at, deep, first, to, outputs, NULL);
            } else { /* widened once for all rows */
                const uint16_t *narrow = (const uint16_t *)weights + at;
                float wide[DEEP * WIDE];
                for (int64_t j = 0; j < deep * WIDE; j += LANES) {
                    if (j % (4 * LANES) == 0) __builtin_prefetch((const char *)(narrow + j) + 4 * AHEAD);
                    store(wide + j, widened(narrow + j));
                }
                add_tiles(0, count, from, in, wide, deep, first, to, outputs, NULL);
            }
        }
        if (scaled > panel * WIDE || gelu || residual) {
            epilogue then = {residual ? residual + row * outputs : NULL, scale, scaled, gelu};
            finish(then, count, to, outputs, panel * WIDE);
        }
    }
}

#endif
