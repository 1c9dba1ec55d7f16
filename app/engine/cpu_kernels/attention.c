/* Attention of a decode step on a CPU, in fp32, of keys and values as the caches hold them, in fp32 or bf16.

A step has few queries and many keys, so it is as fast as keys and values come from memory. Here they come in the order
in which they lie, for up to QUERIES beams of a sequence at once, and what is made of them stays near the core. Batched
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
    QUERIES = 4,      /* at a time */
    MOST_KEYS = 4096, /* whose scores have room */
    TILE = 32,        /* keys whose values are near the core when they are read again */
    KEYS_AHEAD = 16,  /* from the key that is read to the one that memory is asked for */
};


/* What queries attend to: n keys and values, D numbers each. Key j stands `apart` numbers behind key j - 1, or, where
`places` is given, at places[j]. */
typedef struct {
    const void *keys, *values; /* in a format that is a constant where they are read */
    const int64_t *places;
    int64_t apart, n, D;
} attended;

INLINE int64_t place(attended to, int64_t j) { return to.places ? to.places[j] : j * to.apart; }

/* What will be read soon, where it can be known. */
INLINE void fetch(int format, attended to, const void *from, int64_t j, int64_t count) {
    if (!to.places) fetch_lines(at(format, from, j * to.apart), count * to.apart * size_of(format));
}

/* Values of the keys from `first` to `end`, times their scores, added to `out`: `parts` vectors from number d on. */
INLINE void add_values(int rows, int parts, int format, attended to, int64_t first, int64_t end, int64_t d,
                       const lanes *scores, float *out, int64_t out_apart) {
    const float *score = (const float *)scores;
    const int group = LANES / rows;
    lanes sums[LANES];
    for (int k = 0; k < rows; k++)
        for (int i = 0; i < parts; i++) sums[k * parts + i] = load(out + k * out_apart + d + i * LANES);
    for (int64_t j = first; j < end; j++) {
        const int64_t value = place(to, j) + d;
        const float *of_key = score + j / group * LANES + j % group;
        for (int i = 0; i < parts; i++) {
            const lanes x = load_from(format, to.values, value + i * LANES);
            for (int k = 0; k < rows; k++)
                sums[k * parts + i] = fused(spread(of_key[k * group]), x, sums[k * parts + i]);
        }
    }
    for (int k = 0; k < rows; k++)
        for (int i = 0; i < parts; i++) store(out + k * out_apart + d + i * LANES, sums[k * parts + i]);
}

/* QUERIES, 2 or 1 queries, `query_apart` numbers from one to the next, with LANES / rows keys at a time: LANES sums,
which is what registers hold. So lane k * group + i of a vector of scores is of query k and of key i of its group. */
INLINE void attend_rows(int rows, int format, attended to, const float *query, int64_t query_apart, float *out,
                        int64_t out_apart) {
    lanes scores[MOST_KEYS * QUERIES / LANES];
    const int group = LANES / rows;
    const int64_t groups = (to.n + group - 1) / group;
    lanes most = spread(-INFINITY);
    for (int64_t g = 0; g < groups; g++) {
        int64_t keys[LANES];
        for (int i = 0; i < group; i++) { /* the last key stands in for those behind it */
            int64_t j = g * group + i;
            keys[i] = place(to, j < to.n ? j : to.n - 1);
        }
        fetch(format, to, to.keys, g * group + KEYS_AHEAD, group);
        lanes sums[LANES] = {0};
        for (int64_t d = 0; d < to.D; d += LANES) {
            lanes q[QUERIES];
            for (int k = 0; k < rows; k++) q[k] = load(query + k * query_apart + d);
            for (int i = 0; i < group; i++) {
                const lanes x = load_from(format, to.keys, keys[i] + d);
                for (int k = 0; k < rows; k++) sums[k * group + i] = fused(q[k], x, sums[k * group + i]);
            }
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
        fetch(format, to, to.values, end, TILE);
        int64_t d = 0;
#define VALUES(parts)                                                                                                  \
    for (; rows * parts <= LANES && d + parts * LANES <= to.D; d += parts * LANES)                                     \
        add_values(rows, parts, format, to, first, end, d, scores, out, out_apart);
        VALUES(8) VALUES(4) VALUES(2) VALUES(1)
#undef VALUES
    }
    for (int k = 0; k < rows; k++)
        for (int64_t d = 0; d < to.D; d += LANES)
            store(out + k * out_apart + d, load(out + k * out_apart + d) * spread(sum[k]));
}

/* Of any number of queries. */
INLINE void attend(int64_t rows, int format, attended to, const float *query, int64_t query_apart, float *out,
                   int64_t out_apart) {
    int64_t k = 0;
    for (; k + QUERIES <= rows; k += QUERIES)
        attend_rows(QUERIES, format, to, query + k * query_apart, query_apart, out + k * out_apart, out_apart);
    for (; k + 2 <= rows; k += 2)
        attend_rows(2, format, to, query + k * query_apart, query_apart, out + k * out_apart, out_apart);
    for (; k < rows; k++)
        attend_rows(1, format, to, query + k * query_apart, query_apart, out + k * out_apart, out_apart);
}

/* A step's queries over their sequences' sources.

query [S*K, H*D], scaled already; keys, values [C, H, N, D] in `format`; lengths [S]; out [S*K, H*D]. */
void cross_attention(const float *query, const void *keys, const void *values, const int64_t *lengths, float *out,
                     int64_t S, int64_t K, int64_t H, int64_t D, int64_t N, int format, int threads) {
    const int64_t width = H * D;
#pragma omp parallel for schedule(dynamic) num_threads(threads) /* texts differ in length */
    for (int64_t unit = 0; unit < S * H; unit++) {
        const int64_t s = unit / H, h = unit % H, row = s * K * width + h * D, source = unit * N * D;
        attended to = {at(format, keys, source), at(format, values, source), NULL, D, lengths[s], D};
        if (format == FP32) attend(K, FP32, to, query + row, width, out + row, width);
        else attend(K, BF16, to, query + row, width, out + row, width);
    }
}

/* One head of one sequence, whose row is `qkv`: see `self_attention`. */
INLINE void attend_own(int format, const float *qkv, void *keys, void *values, int64_t *ancestors, int64_t newest,
                       float *out, int64_t K, int64_t D, int64_t A, int64_t width, int first_head) {
    for (int64_t k = 0; k < K; k++)
        for (int64_t d = 0; d < D; d += LANES) {
            const float *row = qkv + k * 3 * width + d;
            store_to(format, keys, (newest * K + k) * D + d, load(row + width));
            store_to(format, values, (newest * K + k) * D + d, load(row + 2 * width));
        }
    for (int64_t k = 0; k < K; k++) {
        int64_t *wrote = ancestors + k * A, places[MOST_KEYS];
        for (int64_t j = 0; j < newest; j++) places[j] = (j * K + wrote[j]) * D;
        places[newest] = (newest * K + k) * D;
        if (first_head) wrote[newest] = k; /* what other heads do not read in this step */
        attended to = {keys, values, places, 0, newest + 1, D};
        attend_rows(1, format, to, qkv + k * 3 * width, 0, out + k * width, 0);
    }
}

/* A step's queries over their beams' own histories. This step's keys and values are written first, and so is who wrote
them.

qkv [S*K, 3, H, D], queries scaled already; keys, values [C, H, T, K, D] in `format`; ancestors [C, K, A]: the beam that
wrote each position of a beam's history; positions [S]: this step's; out [S*K, H*D]. */
void self_attention(const float *qkv, void *keys, void *values, int64_t *ancestors, const int64_t *positions,
                    float *out, int64_t S, int64_t K, int64_t H, int64_t D, int64_t T, int64_t A, int format,
                    int threads) {
    const int64_t width = H * D;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t unit = 0; unit < S * H; unit++) {
        const int64_t s = unit / H, h = unit % H, bytes = T * K * D * size_of(format);
        char *own_keys = (char *)keys + unit * bytes, *own_values = (char *)values + unit * bytes;
        const float *rows = qkv + s * K * 3 * width + h * D;
        float *to = out + s * K * width + h * D;
        int64_t *wrote = ancestors + s * K * A;
        if (format == FP32) attend_own(FP32, rows, own_keys, own_values, wrote, positions[s], to, K, D, A, width, !h);
        else attend_own(BF16, rows, own_keys, own_values, wrote, positions[s], to, K, D, A, width, !h);
    }
}

/* What `compiled.py` must know as well; the first changes whenever a function's arguments do. */
const int64_t precis_constants[] = {5, LANES, WIDE, MOST_KEYS, COLUMNS};

#endif
