/* Matrix products with fixed weights of 8 bits: x [rows, in] to x W^T + b.

As `products.c`, with a quarter of fp32's bytes to read and two multiplications for one. Weights are bytes, an output's
on one scale; inputs are rounded, a row's on one scale, to as many of 16 bits as sums of 32 bits take: 16 of 512
inputs, 13 of 3,072. So sums are exact, and a row does not depend on the rows beside it, to the last bit. Instructions
that multiply bytes by bytes would be faster for many rows; without VNNI they add two products in 16 bits, for which
weights have a bit too many. Does not know Python or torch: see `products.py`. */
#if defined(__x86_64__)
#include "tiles.h"

#include <math.h>
#include <stddef.h>

/* What a product is made of besides its inputs. */
typedef struct {
    const int8_t *weights;        /* [outputs / WIDE, in / 2, WIDE, 2] */
    const float *weight_scales;   /* [outputs] */
    const float *bias, *residual; /* [outputs]; [rows, outputs] or NULL */
    int64_t in, outputs;          /* inputs, an even number */
    int gelu;
} product;

/* A row [in] to integers of at most `most`; returns their scale, which is no number where the row has one. */
INLINE float round_row(const float *x, int64_t in, float most, int16_t *out) {
    const lanes positive = (lanes)((ints){0} + 0x7fffffff), finite = spread(3.402823466e+38f);
    lanes largest = spread(0.0f), last = spread(0.0f);
    ints fine = (ints){0} - 1;
    const int64_t whole = in / LANES * LANES;
    for (int64_t i = whole; i < in; i++) last[i - whole] = x[i];
    for (int64_t i = 0; i <= whole; i += LANES) {
        const lanes size = (lanes)((ints)(i < whole ? load(x + i) : last) & (ints)positive);
        largest = choose(size > largest, size, largest);
        fine &= size <= finite;
    }
    float greatest = 0.0f;
    int all_fine = 1;
    for (int i = 0; i < LANES; i++) {
        greatest = largest[i] > greatest ? largest[i] : greatest;
        all_fine &= fine[i] != 0;
    }
    const lanes by = spread(all_fine && greatest > 1e-30f ? most / greatest : 0.0f); /* less is nothing */
    for (int64_t i = 0; i < in; i += LANES) {
        const shorts narrow = lower_halves(rounded((i < whole ? load(x + i) : last) * by));
        __builtin_memcpy(out + i, &narrow, i < whole ? sizeof narrow : (in - i) * sizeof *out);
    }
    return all_fine ? greatest / most : NAN;
}

/* One panel's outputs for `rows` rows, the first of which is the product's `row`; `rows` is a constant where this is
used. */
INLINE void one_tile(int rows, product of, int64_t panel, const int16_t *x, const float *row_scales, int64_t row,
                     float *out) {
    const int8_t *weights = of.weights + panel * of.in * WIDE;
    ints sums[INT8_ROWS][2] = {0};
#pragma GCC unroll 4
    for (int64_t i = 0; i < of.in; i += 2) {
        const int8_t *part = weights + i * WIDE;
        fetch_ahead(part, 2 * WIDE);
        const double_shorts weight[2] = {widened_bytes(part), widened_bytes(part + WIDE)};
        for (int r = 0; r < rows; r++) {
            int32_t two;
            __builtin_memcpy(&two, x + r * of.in + i, sizeof two);
            for (int v = 0; v < 2; v++) sums[r][v] = add_pairs(sums[r][v], two, weight[v]);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < 2; v++) {
            const int64_t output = panel * WIDE + v * LANES, place = (row + r) * of.outputs + output;
            const lanes scale = load(of.weight_scales + output) * spread(row_scales[row + r]);
            lanes y = fused(__builtin_convertvector(sums[r][v], lanes), scale, load(of.bias + output));
            if (of.gelu) y = gelu_of(y);
            if (of.residual) y += load(of.residual + place);
            store(out + place, y);
        }
}

/* out [rows, outputs] from x [rows, in]; outputs is a multiple of WIDE, in of 2.

weights [outputs / WIDE, in / 2, WIDE, 2]; weight_scales and bias [outputs]; residual [rows, outputs] or NULL, added
after GELU. Inputs become integers of at most `most`: most * 128 * in is less than 2^31. room [rows, in] and
row_scales [rows] are room. */
void multiply_int8(const float *x, const int8_t *weights, const float *weight_scales, const float *bias,
                   const float *residual, float *out, int16_t *room, float *row_scales, int64_t rows, int64_t in,
                   int64_t outputs, float most, int gelu, int threads) {
    const int64_t panels = outputs / WIDE, units = panels * ((rows + BLOCK - 1) / BLOCK);
    const int64_t at_once = units >= 32 * threads ? 4 : 1; /* panels that lie together, where all have enough to do */
    const product of = {weights, weight_scales, bias, residual, in, outputs, gelu};
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; r++) row_scales[r] = round_row(x + r * in, in, most, room + r * in);
#pragma omp for schedule(dynamic, at_once)
        for (int64_t unit = 0; unit < units; unit++) {
            const int64_t panel = unit % panels, first = unit / panels * BLOCK;
            const int64_t end = first + BLOCK < rows ? first + BLOCK : rows;
            const int64_t tiles = tiles_of(end - first, INT8_ROWS);
            for (int64_t tile = 0; tile < tiles; tile++) {
                const int64_t row = first + tile_start(end - first, tiles, tile);
                const int64_t now = first + tile_start(end - first, tiles, tile + 1) - row;
                const int16_t *from = room + row * in;
#define TILE(n) one_tile(n, of, panel, from, row_scales, row, out)
                OF_ROWS(now, INT8_ROWS, TILE)
#undef TILE
            }
        }
    }
}

#endif
