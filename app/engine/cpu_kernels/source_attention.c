/* Attention of whole sources in fp32 on a CPU: each token over all tokens of its source.

Two products with a softmax between them, by the tile of every product: panels are made of keys and of values here, once
for all tokens, and the scores of QUERIES tokens at a time stay near the core. A library's attention multiplies tiles of
32 tokens by 512, at half of this rate for the few hundred short tokens of a text.

One unit of work is one head of one source, computed in the same order whatever else is in the batch. A number that is
none makes its results none. Does not know Python or torch: see `attention.py`. */
#if defined(__x86_64__)
#include "tiles.h"

#include <math.h>
#include <omp.h>
#include <stddef.h>
#include <string.h>

enum {
    QUERIES = 24, /* whose scores of a text's few hundred keys the first cache holds */
    KEYS_AHEAD = LANES, /* from the key that is copied to the one that memory is asked for */
};

static const float zeros[WIDE];

INLINE int64_t filled(int64_t n) { return (n + WIDE - 1) / WIDE * WIDE; }

/* Scores of a query, to the next one's: never a power of two, whose lines would want the same places in the cache. */
INLINE int64_t scores_apart(int64_t n) { return filled(n) + WIDE; }

/* What a unit of work needs, in the order in which it lies. */
typedef struct {
    float *keys;   /* panels [filled(n) / WIDE, D, WIDE]: outputs are keys */
    float *values; /* panels [filled(D) / WIDE, n, WIDE]: outputs are numbers of values */
    float *query;  /* [QUERIES, D] */
    float *scores; /* [QUERIES, scores_apart(n)] */
    float *sums;   /* [QUERIES, filled(D)] */
} room;

/* Numbers of room that a thread needs for sources of up to n tokens, in whole lines. */
int64_t source_attention_room(int64_t n, int64_t D) {
    const int64_t numbers = filled(n) * D + filled(D) * n + QUERIES * (D + scores_apart(n) + filled(D));
    return (numbers + LINE - 1) / LINE * LINE;
}

static room room_at(float *from, int64_t n, int64_t D) {
    room at = {.keys = from};
    at.values = at.keys + filled(n) * D;
    at.query = at.values + filled(D) * n;
    at.scores = at.query + QUERIES * D;
    at.sums = at.scores + QUERIES * scores_apart(n);
    return at;
}

/* Panels of the n keys and values of D numbers each, `apart` from one to the next; zeros fill up. */
static void pack(room to, const float *keys, const float *values, int64_t n, int64_t D, int64_t apart) {
    for (int64_t j = 0; j < filled(n); j += LANES) {
        for (int64_t next = j + KEYS_AHEAD; next < j + KEYS_AHEAD + LANES && next < n; next++)
            for (int64_t d = 0; d < D; d += LINE / (int64_t)sizeof(float)) {
                __builtin_prefetch(keys + next * apart + d);
                __builtin_prefetch(values + next * apart + d);
            }
        float *panel = to.keys + j / WIDE * WIDE * D + j % WIDE;
        for (int64_t d = 0; d < D; d += LANES) {
            lanes x[LANES];
            for (int i = 0; i < LANES; i++) x[i] = j + i < n ? load(keys + (j + i) * apart + d) : spread(0.0f);
            transpose(x);
            for (int i = 0; i < LANES; i++) store(panel + (d + i) * WIDE, x[i]);
        }
        for (int64_t key = j; key < j + LANES && key < n; key++)
            for (int64_t d = 0; d < filled(D); d += LANES)
                store(to.values + (d / WIDE * n + key) * WIDE + d % WIDE,
                      d < D ? load(values + key * apart + d) : spread(0.0f));
    }
}

/* The n scores, which are filled up, become their exponentials, the greatest 1; returns their sum. */
static float exponentials(float *scores, int64_t n) {
    for (int64_t j = n; j < filled(n); j++) scores[j] = -INFINITY; /* next to nothing, in the sum alone */
    lanes most[2] = {spread(-INFINITY), spread(-INFINITY)}, sums[2] = {0};
    for (int64_t j = 0; j < n; j += WIDE)
        for (int v = 0; v < 2; v++) most[v] = greater(load(scores + j + v * LANES), most[v]);
    const lanes greatest = spread(greatest_of(greater(most[0], most[1])));
    for (int64_t j = 0; j < n; j += WIDE)
        for (int v = 0; v < 2; v++) {
            lanes x = exp_of(load(scores + j + v * LANES) - greatest);
            store(scores + j + v * LANES, x);
            sums[v] += x;
        }
    return sum_of(sums[0] + sums[1]);
}

/* All tiles of x [rows, deep], `apart` from one row to the next, times one part of a panel: see `add_tile`. */
static void add_tiles(int64_t rows, const float *x, int64_t apart, const float *part, int64_t deep, const float *bias,
                      float *out, int64_t out_apart) {
    const int64_t tiles = tiles_of(rows, ROWS);
    for (int64_t tile = 0; tile < tiles; tile++) {
        const int64_t first = tile_start(rows, tiles, tile), now = tile_start(rows, tiles, tile + 1) - first;
        const rows_of own = {x + first * apart, apart, 1};
        float *to = out + first * out_apart;
#define TILE(n) add_tile(n, FP32, own, part, 0, deep, bias, to, out_apart, (fetched){0})
        OF_ROWS(now, ROWS, TILE)
#undef TILE
    }
}

/* qkv [P, 3, H, D], queries scaled already: the tokens of S sources one behind the other, of which source s has
lengths[s], at most `longest`; out [P, H*D]; space [threads, source_attention_room(longest, D)]. D is a multiple of
LANES. */
void source_attention(const float *qkv, const int64_t *lengths, float *out, float *space, int64_t S, int64_t H,
                      int64_t D, int64_t longest, int threads) {
    const int64_t width = H * D, apart = 3 * width;
#pragma omp parallel for schedule(dynamic) num_threads(threads) /* texts differ in length */
    for (int64_t unit = 0; unit < S * H; unit++) {
        const int64_t s = unit / H, h = unit % H, n = lengths[s];
        int64_t before = 0;
        for (int64_t other = 0; other < s; other++) before += lengths[other];
        const float *query = qkv + before * apart + h * D;
        float *to = out + before * width + h * D;
        const room at = room_at(space + omp_get_thread_num() * source_attention_room(longest, D), n, D);
        pack(at, query + width, query + 2 * width, n, D, apart);
        for (int64_t first = 0; first < n; first += QUERIES) {
            const int64_t rows = n - first < QUERIES ? n - first : QUERIES;
            for (int64_t r = 0; r < rows; r++)
                memcpy(at.query + r * D, query + (first + r) * apart, D * sizeof(float));
            for (int64_t j = 0; j < n; j += WIDE)
                add_tiles(rows, at.query, D, at.keys + j * D, D, zeros, at.scores + j, scores_apart(n));
            float shares[QUERIES];
            for (int64_t r = 0; r < rows; r++) shares[r] = 1.0f / exponentials(at.scores + r * scores_apart(n), n);
            for (int64_t d = 0; d < D; d += WIDE)
                for (int64_t j = 0; j < n; j += DEEP)
                    add_tiles(rows, at.scores + j, scores_apart(n), at.values + (d / WIDE * n + j) * WIDE,
                              n - j < DEEP ? n - j : DEEP, j ? NULL : zeros, at.sums + d, filled(D));
            for (int64_t r = 0; r < rows; r++)
                for (int64_t d = 0; d < D; d += LANES)
                    store(to + (first + r) * width + d, load(at.sums + r * filled(D) + d) * spread(shares[r]));
        }
    }
}

#endif
