/* A decode step's draws in fp32 on a CPU: what top-p leaves, and tokens by the greatest of score and Gumbel noise.

torch's compositions are in `app/engine/sampling.py` and `philox.py`, whose random words these are, bit by bit. Noise of
a whole vocabulary is more work than a small network, and most of it is of tokens that top-k or top-p have ruled out:
here a block of columns without any other has none. Does not know Python or torch, as `choice.c`; nor who filters how:
it gets a floor a row.

Shapes: S sequences, K rows of each, V columns of scores, a multiple of COLUMNS. */
#if defined(__x86_64__)
#include "vectors.h"

#include <math.h>
#include <omp.h>

enum {
    ROUNDS = 10,
    WORDS = 4,             /* that a counter gives: of so many columns */
    DRAWN = WORDS * LANES, /* columns of a block, whose noise is made together; COLUMNS is a multiple of it */
};

/* Where a row's noise comes from: every number of it is a function of these and of its column. */
typedef struct {
    uint32_t seed[2], row, step;
} source;

/* The upper and the lower halves of the products of 32-bit words. */
INLINE void multiply_words(words x, uint32_t y, words *upper, words *lower) {
    const pairs even = products_of_even(x, y), odd = products_of_even((words)((pairs)x >> 32), y);
    *lower = (words)((even & 0xffffffff) | (odd << 32));
    *upper = (words)((even >> 32) | (odd & ~(pairs){0} << 32));
}

/* Philox4x32-10 of LANES counters that follow one another, the first of them `first` (Salmon et al. 2011). */
INLINE void philox(source from, uint32_t first, words found[WORDS]) {
    words c0, c1 = (words){0} + from.row, c2 = (words){0} + from.step, c3 = {0};
    for (int i = 0; i < LANES; i++) c0[i] = first + i;
    uint32_t k0 = from.seed[0], k1 = from.seed[1];
    for (int round = 0; round < ROUNDS; round++) {
        words upper0, lower0, upper2, lower2;
        multiply_words(c0, 0xD2511F53, &upper0, &lower0);
        multiply_words(c2, 0xCD9E8D57, &upper2, &lower2);
        c0 = upper2 ^ c1 ^ k0, c1 = lower2, c2 = upper0 ^ c3 ^ k1, c3 = lower0;
        k0 += 0x9E3779B9, k1 += 0xBB67AE85;
    }
    found[0] = c0, found[1] = c1, found[2] = c2, found[3] = c3;
}

/* Standard Gumbel noise of columns [first, first + DRAWN). */
INLINE void gumbel(source from, int64_t first, float noise[DRAWN]) {
    words found[WORDS];
    philox(from, first / WORDS, found);
    for (int w = 0; w < WORDS; w++) {
        const lanes uniform = (__builtin_convertvector((ints)(found[w] >> 9), lanes) + 0.5f) * spread(0x1p-23f);
        const lanes of_word = -log_of(-log_of(uniform));
        for (int i = 0; i < LANES; i++) noise[WORDS * i + w] = of_word[i];
    }
}

/* Scores of a block after temperature, -inf where they are below the floor; whether any of them can be drawn. */
INLINE int warped(const float *scores, float temperature, float floor, lanes found[WORDS]) {
    ints some = {0};
    for (int v = 0; v < WORDS; v++) {
        const lanes x = load(scores + v * LANES) / temperature;
        found[v] = choose(x < spread(floor), spread(-INFINITY), x);
        some |= found[v] != spread(-INFINITY);
    }
    return any_of(some);
}

/* What the numbers of x [V] above the limit add up to: none is negative. */
static double mass_above(const float *x, float limit, int64_t V) {
    reals total = {0};
    for (int64_t j = 0; j < V; j += COLUMNS) {
        lanes sums[2] = {0};
        for (int i = 0; i < COLUMNS; i += 2 * LANES)
            for (int v = 0; v < 2; v++) {
                const lanes y = load(x + j + i + v * LANES);
                sums[v] += choose(y > spread(limit), y, spread(0.0f));
            }
        total += __builtin_convertvector(sums[0] + sums[1], reals);
    }
    double sum = 0.0;
    for (int i = 0; i < LANES; i++) sum += total[i];
    return sum;
}

/* The least positive number of x [V], at most 1 each, above which less than `share` of all lies: what is greater or
equal is the least set with at least so much (Holtzman et al. 2019), and with it what equals its last. Halved is the
range of floats themselves, which are in the order of their bits: some thirty times, and no sort. */
static float nucleus(const float *x, double share, int64_t V) {
    union {
        uint32_t bits;
        float number;
    } low = {.number = 0.0f}, high = {.number = 1.0f}, middle;
    const double wanted = share * mass_above(x, 0.0f, V);
    while (low.bits < high.bits) {
        middle.bits = low.bits + (high.bits - low.bits) / 2;
        if (mass_above(x, middle.number, V) < wanted)
            high = middle;
        else
            low.bits = middle.bits + 1;
    }
    return high.number;
}

/* Raises floors [S, K], as they are after top-k, to what top-p leaves of scores [S, K, V] after temperature; at least
`kept` tokens stay, 1 or 2. shares [S], 1 leaves a sequence alone; room [threads, V]. */
void raise_floors(const float *scores, const float *temperatures, const float *shares, float *floors, float *room,
                  int64_t S, int64_t K, int64_t V, int64_t kept, int threads) {
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t row = 0; row < S * K; row++) {
        const int64_t s = row / K;
        if (shares[s] >= 1.0f) continue;
        const float *own = scores + row * V;
        float *x = room + omp_get_thread_num() * V;
        lanes most = spread(-INFINITY), found[WORDS];
        for (int64_t j = 0; j < V; j += LANES) most = greater(load(own + j), most);
        const float greatest = greatest_of(most) / temperatures[s];
        for (int64_t j = 0; j < V; j += DRAWN) {
            warped(own + j, temperatures[s], floors[row], found);
            for (int v = 0; v < WORDS; v++)
                store(x + j + v * LANES,
                      choose(found[v] == spread(-INFINITY), spread(0.0f), exp_of(found[v] - greatest)));
        }
        const float limit = nucleus(x, shares[s], V);
        /* The scores of it, of which the least is the floor; and the greatest but one, if that is to stay. */
        lanes least = spread(INFINITY);
        float best[2] = {-INFINITY, -INFINITY};
        for (int64_t j = 0; j < V; j += DRAWN) {
            warped(own + j, temperatures[s], floors[row], found);
            most = spread(-INFINITY);
            for (int v = 0; v < WORDS; v++) {
                const lanes inside = choose(load(x + j + v * LANES) >= spread(limit), found[v], spread(INFINITY));
                least = choose(inside < least, inside, least);
                most = greater(found[v], most);
            }
            if (kept < 2 || !(greatest_of(most) > best[1])) continue;
            for (int i = 0; i < DRAWN; i++) {
                const float y = found[i / LANES][i % LANES];
                if (y > best[0])
                    best[1] = best[0], best[0] = y;
                else if (y > best[1])
                    best[1] = y;
            }
        }
        const float of_share = -greatest_of(-least);
        const float floor = kept < 2 || of_share < best[1] ? of_share : best[1];
        if (of_share < INFINITY && floor > floors[row]) floors[row] = floor;
    }
}

/* scores [S, K, V] become what temperatures [S] and floors [S, K] leave of them, and ranked [S, K, V] those and noise:
the greatest of a row's is a draw from its softmax. seeds [S, 2], words of 32 bits; steps [S]. */
void perturb(float *scores, float *ranked, const float *temperatures, const float *floors, const int64_t *seeds,
             const int64_t *steps, int64_t S, int64_t K, int64_t V, int threads) {
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t row = 0; row < S * K; row++) {
        const int64_t s = row / K;
        const source from = {{seeds[2 * s], seeds[2 * s + 1]}, row % K, steps[s]};
        for (int64_t j = 0; j < V; j += DRAWN) {
            float *x = scores + row * V + j, *to = ranked + row * V + j, noise[DRAWN] = {0};
            lanes found[WORDS];
            if (warped(x, temperatures[s], floors[row], found)) gumbel(from, j, noise);
            for (int v = 0; v < WORDS; v++) {
                store(x + v * LANES, found[v]);
                store(to + v * LANES, found[v] + load(noise + v * LANES));
            }
        }
    }
}

/* A draw of each row of scores [S, K, V], and its log-probability after temperature and floor, each [S, K]; the rest as
for `perturb`. The log-probability of a row that has a score which is no number, or none above -inf, is no number. */
void draw(const float *scores, const float *temperatures, const float *floors, const int64_t *seeds,
          const int64_t *steps, int64_t *tokens, float *logprobs, int64_t S, int64_t K, int64_t V, int threads) {
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t row = 0; row < S * K; row++) {
        const int64_t s = row / K;
        const source from = {{seeds[2 * s], seeds[2 * s + 1]}, row % K, steps[s]};
        const float *own = scores + row * V, temperature = temperatures[s];
        lanes most = spread(-INFINITY);
        for (int64_t j = 0; j < V; j += LANES) most = greater(load(own + j), most);
        const float greatest = greatest_of(most) / temperature; /* of all: no floor is above it */
        float best = -INFINITY, score = -INFINITY;
        int64_t token = 0;
        reals total = {0}; /* as in `log_softmax` */
        for (int64_t j = 0; j < V; j += DRAWN) {
            lanes found[WORDS], sum = {0};
            if (!warped(own + j, temperature, floors[row], found)) continue;
            float ranked[DRAWN];
            gumbel(from, j, ranked);
            most = spread(-INFINITY);
            for (int v = 0; v < WORDS; v++) {
                sum += choose(found[v] == spread(-INFINITY), spread(0.0f), exp_of(found[v] - greatest));
                const lanes with_noise = found[v] + load(ranked + v * LANES);
                store(ranked + v * LANES, with_noise);
                most = greater(with_noise, most);
            }
            total += __builtin_convertvector(sum, reals);
            if (!(greatest_of(most) > best)) continue;
            for (int i = 0; i < DRAWN; i++)
                if (ranked[i] > best) best = ranked[i], token = j + i, score = found[i / LANES][i % LANES];
        }
        double sum = 0.0;
        for (int i = 0; i < LANES; i++) sum += total[i];
        tokens[row] = token;
        logprobs[row] = score - greatest - logf((float)sum);
    }
}

#endif
