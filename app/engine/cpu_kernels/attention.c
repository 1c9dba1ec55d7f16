/* Attention of a decode step in fp32 on a CPU, of keys and values as the caches hold them.

A step has few queries and many keys, so it is as fast as keys and values come from memory. Here they come in the order
in which they lie, for up to ROWS beams of a sequence at once, and what is made of them stays near the core. Batched
products of a library read them at half of that rate, and want queries, masks and results in layouts of their own.

One unit of work is one head of one sequence: computed in the same order whatever else is in the batch, by whichever
thread. A number that is none makes its results none. Does not know Python or torch: addresses and sizes come from
`attention.py`, which has checked them; that lengths are at most N and positions less than T, its caller promises.
OpenMP's threads are those that torch multiplies with: the two never wait for each other.

Shapes: S sequences, K beams, H heads, D head size, a multiple of LANES; C slots, T target and N source positions, at
most MOST_KEYS. */
#if defined(__x86_64__)
#include "vectors.h"

#include <math.h>
#include <string.h>

enum {
    ROWS = 4,         /* queries at a time */
    MOST_KEYS = 4096, /* whose scores have room */
    TILE = 32,        /* keys whose values are near the core when they are read again */
    KEYS_AHEAD = 16,  /* from the key that is read to the one that memory is asked for */
};


/* Eight sums at once: lane i is the sum of x[i]. */
INLINE lanes sums_of(const lanes x[LANES]) {
    lanes two[4], four[2];
    for (int i = 0; i < 4; i++)
        two[i] = __builtin_shuffle(x[2 * i], x[2 * i + 1], (ints){0, 8, 2, 10, 4, 12, 6, 14}) +
                 __builtin_shuffle(x[2 * i], x[2 * i + 1], (ints){1, 9, 3, 11, 5, 13, 7, 15});
    for (int i = 0; i < 2; i++)
        four[i] = __builtin_shuffle(two[2 * i], two[2 * i + 1], (ints){0, 1, 8, 9, 4, 5, 12, 13}) +
                  __builtin_shuffle(two[2 * i], two[2 * i + 1], (ints){2, 3, 10, 11, 6, 7, 14, 15});
    return __builtin_shuffle(four[0], four[1], (ints){0, 1, 2, 3, 8, 9, 10, 11}) +
           __builtin_shuffle(four[0], four[1], (ints){4, 5, 6, 7, 12, 13, 14, 15});
}

/* What queries attend to: n keys and values, D numbers each. Key j stands `apart` numbers behind key j - 1, or, where
`places` is given, at places[j]. */
typedef struct {
    const float *keys, *values;
    const int64_t *places;
    int64_t apart, n, D;
} attended;

INLINE int64_t place(attended to, int64_t j) { return to.places ? to.places[j] : j * to.apart; }

/* What will be read soon, where it can be known. */
INLINE void fetch(attended to, const float *from, int64_t j, int64_t count) {
    if (!to.places)
        for (int64_t at = j * to.apart; at < (j + count) * to.apart; at += LINE / (int64_t)sizeof(float))
            __builtin_prefetch(from + at);
}

/* Values of the keys from `first` to `end`, times their scores, added to `out`: `parts` vectors from number d on. */
INLINE void add_values(int rows, int parts, attended to, int64_t first, int64_t end, int64_t d, const lanes *scores,
                       float *out, int64_t out_apart) {
    const float *score = (const float *)scores;
    const int group = LANES / rows;
    lanes sums[LANES];
    for (int k = 0; k < rows; k++)
        for (int i = 0; i < parts; i++) sums[k * parts + i] = load(out + k * out_apart + d + i * LANES);
    for (int64_t j = first; j < end; j++) {
        const float *value = to.values + place(to, j) + d, *of_key = score + j / group * LANES + j % group;
        for (int i = 0; i < parts; i++)
            for (int k = 0; k < rows; k++) sums[k * parts + i] =
                    fused(spread(of_key[k * group]), load(value + i * LANES), sums[k * parts + i]);
    }
    for (int k = 0; k < rows; k++)
        for (int i = 0; i < parts; i++) store(out + k * out_apart + d + i * LANES, sums[k * parts + i]);
}

/* ROWS, 2 or 1 queries, `query_apart` numbers from one to the next, with LANES / rows keys at a time: eight sums side
by side, which is what registers hold. So lane k * group + i of a vector of scores is of query k and of key i of its
group. */
INLINE void attend_rows(int rows, attended to, const float *query, int64_t query_apart, float *out, int64_t out_apart) {
    lanes scores[MOST_KEYS * ROWS / LANES];
    const int group = LANES / rows;
    const int64_t groups = (to.n + group - 1) / group;
    lanes most = spread(-INFINITY);
    for (int64_t g = 0; g < groups; g++) {
        const float *keys[LANES];
        for (int i = 0; i < group; i++) { /* the last key stands in for those behind it */
            int64_t j = g * group + i;
            keys[i] = to.keys + place(to, j < to.n ? j : to.n - 1);
        }
        fetch(to, to.keys, g * group + KEYS_AHEAD, group);
        lanes sums[LANES] = {0};
        for (int64_t d = 0; d < to.D; d += LANES)
            for (int k = 0; k < rows; k++) {
                lanes q = load(query + k * query_apart + d);
                for (int i = 0; i < group; i++) sums[k * group + i] = fused(q, load(keys[i] + d), sums[k * group + i]);
            }
        scores[g] = sums_of(sums);
        if (g == groups - 1)
            for (int i = 0; i < LANES; i++) scores[g][i] = g * group + i % group < to.n ? scores[g][i] : -INFINITY;
        most = choose(scores[g] > most, scores[g], most);
    }
    lanes greatest = most, sum = spread(0.0f);
    for (int i = 0; i < LANES; i++)
        for (int other = i / group * group; other < (i / group + 1) * group; other++)
            greatest[i] = most[other] > greatest[i] ? most[other] : greatest[i];
    for (int64_t g = 0; g < groups; g++) {
        scores[g] = choose(scores[g] == spread(-INFINITY), spread(0.0f), exp_of(scores[g] - greatest));
        sum += scores[g];
    }
    for (int k = 0; k < rows; k++) {
        float total = 0.0f;
        for (int i = 0; i < group; i++) total += sum[k * group + i];
        memset(out + k * out_apart, 0, to.D * sizeof(float));
        sum[k] = 1.0f / total;
    }
    for (int64_t first = 0; first < to.n; first += TILE) {
        const int64_t end = first + TILE < to.n ? first + TILE : to.n;
        fetch(to, to.values, end, TILE);
        int64_t d = 0;
        for (; d + 8 / rows * LANES <= to.D; d += 8 / rows * LANES)
            add_values(rows, 8 / rows, to, first, end, d, scores, out, out_apart);
        for (; rows < 4 && d + 2 * LANES <= to.D; d += 2 * LANES)
            add_values(rows, 2, to, first, end, d, scores, out, out_apart);
        for (; d < to.D; d += LANES) add_values(rows, 1, to, first, end, d, scores, out, out_apart);
    }
    for (int k = 0; k < rows; k++)
        for (int64_t d = 0; d < to.D; d += LANES)
            store(out + k * out_apart + d, load(out + k * out_apart + d) * spread(sum[k]));
}

/* Of any number of queries. */
INLINE void attend(int64_t rows, attended to, const float *query, int64_t query_apart, float *out, int64_t out_apart) {
    int64_t k = 0;
    for (; k + ROWS <= rows; k += ROWS)
        attend_rows(ROWS, to, query + k * query_apart, query_apart, out + k * out_apart, out_apart);
    for (; k + 2 <= rows; k += 2)
        attend_rows(2, to, query + k * query_apart, query_apart, out + k * out_apart, out_apart);
    for (; k < rows; k++) attend_rows(1, to, query + k * query_apart, query_apart, out + k * out_apart, out_apart);
}

/* A step's queries over their sequences' sources.

query [S*K, H*D], scaled already; keys, values [C, H, N, D]; lengths [S]; out [S*K, H*D]. */
void cross_attention(const float *query, const float *keys, const float *values, const int64_t *lengths, float *out,
                     int64_t S, int64_t K, int64_t H, int64_t D, int64_t N, int threads) {
    const int64_t width = H * D;
#pragma omp parallel for schedule(dynamic) num_threads(threads) /* texts differ in length */
    for (int64_t unit = 0; unit < S * H; unit++) {
        const int64_t s = unit / H, h = unit % H, at = s * K * width + h * D, source = unit * N * D;
        attended to = {keys + source, values + source, NULL, D, lengths[s], D};
        attend(K, to, query + at, width, out + at, width);
    }
}

/* A step's queries over their beams' own histories. This step's keys and values are written first, and so is who wrote
them.

qkv [S*K, 3, H, D], queries scaled already; keys, values [C, H, T, K, D]; ancestors [C, K, A]: the beam that wrote each
position of a beam's history; positions [S]: this step's; out [S*K, H*D]. */
void self_attention(const float *qkv, float *keys, float *values, int64_t *ancestors, const int64_t *positions,
                    float *out, int64_t S, int64_t K, int64_t H, int64_t D, int64_t T, int64_t A, int threads) {
    const int64_t width = H * D;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t unit = 0; unit < S * H; unit++) {
        const int64_t s = unit / H, h = unit % H, newest = positions[s];
        float *own_keys = keys + unit * T * K * D, *own_values = values + unit * T * K * D;
        for (int64_t k = 0; k < K; k++) {
            const float *row = qkv + (s * K + k) * 3 * width + h * D;
            memcpy(own_keys + (newest * K + k) * D, row + width, D * sizeof(float));
            memcpy(own_values + (newest * K + k) * D, row + 2 * width, D * sizeof(float));
        }
        for (int64_t k = 0; k < K; k++) {
            int64_t *wrote = ancestors + (s * K + k) * A, places[MOST_KEYS];
            for (int64_t j = 0; j < newest; j++) places[j] = (j * K + wrote[j]) * D;
            places[newest] = (newest * K + k) * D;
            if (h == 0) wrote[newest] = k; /* what other heads do not read in this step */
            attended to = {own_keys, own_values, places, 0, newest + 1, D};
            attend_rows(1, to, qkv + (s * K + k) * 3 * width + h * D, 0, out + (s * K + k) * width + h * D, 0);
        }
    }
}

/* What `compiled.py` must know as well; the first changes whenever a function's arguments do. */
const int64_t precis_constants[] = {2, LANES, WIDE, MOST_KEYS, COLUMNS};

#endif
