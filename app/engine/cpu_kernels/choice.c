/* A decode step's choice of tokens in fp32 on a CPU: log-probabilities, banned n-grams, candidates, and beams.

Each function is one of torch's compositions in `app/engine` as a single pass: where a step has few rows, some sixty
small operations take longer to start than to compute, and where it has many, scores of a whole vocabulary go through
the memory for each. What is computed of one row or sequence does not depend on the others. Among equals the first is
better. Does not know Python or torch: addresses and sizes come from `choice.py`, which has checked them; that tokens,
beams and lengths are in range, its caller promises.

Shapes: S sequences, K beams, V columns of scores, a multiple of COLUMNS. */
#if defined(__x86_64__)
#include "vectors.h"

#include <math.h>
#include <string.h>

enum {
    POSITIONS = 16, /* of all beams' sequences that are read before any is written */
    FEW = 4,        /* sequences that take less time than waking a thread */
};

static const float LOWEST = -1.0e9f;   /* `beam_search.LOWEST` */
static const float NOTHING = -3.0e38f; /* below every score that a search can reach */

/* The greatest of x [COLUMNS]; one that is no number counts as the least. */
INLINE lanes greatest_lanes(const float *x) {
    lanes most[2] = {greater(load(x), spread(-INFINITY)), greater(load(x + LANES), spread(-INFINITY))};
    for (int j = 2 * LANES; j < COLUMNS; j += 2 * LANES)
        for (int v = 0; v < 2; v++) most[v] = greater(load(x + j + v * LANES), most[v]);
    return greater(most[0], most[1]);
}

/* scores [rows, V] become their log-probabilities. One that is no number makes its row so. */
void log_softmax(float *scores, int64_t rows, int64_t V, int threads) {
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t row = 0; row < rows; row++) {
        float *x = scores + row * V;
        lanes most = spread(-INFINITY);
        for (int64_t j = 0; j < V; j += COLUMNS) most = greater(greatest_lanes(x + j), most);
        const lanes greatest = spread(greatest_of(most));
        reals total = {0}; /* of thirty thousand small numbers: a sum in fp32 would be off by more than each */
        for (int64_t j = 0; j < V; j += COLUMNS) {
            lanes sums[2] = {0};
            for (int i = 0; i < COLUMNS; i += 2 * LANES)
                for (int v = 0; v < 2; v++) sums[v] += exp_of(load(x + j + i + v * LANES) - greatest);
            total += __builtin_convertvector(sums[0] + sums[1], reals);
        }
        double sum = 0.0;
        for (int i = 0; i < LANES; i++) sum += total[i];
        const lanes log_sum = spread(logf((float)sum));
        for (int64_t j = 0; j < V; j += LANES) store(x + j, load(x + j) - greatest - log_sum);
    }
}

/* What would repeat an n-gram becomes -inf in scores [S, K, V].

said [S, K, width], `sequence_apart` and `beam_apart` numbers from one to the next; lengths [S], at most width; sizes
[S]: n, 0 leaves a sequence alone. */
void ban_ngrams(float *scores, const int64_t *said, const int64_t *lengths, const int64_t *sizes, int64_t S, int64_t K,
                int64_t V, int64_t sequence_apart, int64_t beam_apart) {
    for (int64_t row = 0; row < S * K; row++) {
        const int64_t s = row / K, length = lengths[s], n = sizes[s];
        const int64_t *text = said + s * sequence_apart + row % K * beam_apart, before = n - 1; /* tokens that repeat */
        for (int64_t t = before; n > 0 && t < length; t++)
            if (memcmp(text + t - before, text + length - before, before * sizeof *text) == 0)
                scores[row * V + text[t]] = -INFINITY;
    }
}

typedef struct {
    float score;
    int64_t at;
} candidate;

/* Puts one where it belongs among the best, of which there are `held` of at most `most`; returns how many then. */
INLINE int64_t offer(candidate *best, int64_t held, int64_t most, float score, int64_t at) {
    score = score > NOTHING ? score : NOTHING; /* one that is no number can be chosen, too, once */
    if (held == most && !(score > best[most - 1].score)) return held;
    int64_t place = held < most ? held : most - 1;
    for (; place > 0 && score > best[place - 1].score; place--) best[place] = best[place - 1];
    best[place] = (candidate){score, at};
    return held < most ? held + 1 : held;
}

/* The best of each sequence's continuations: see `app/engine/top_candidates.py`.

scores [S, K, V], at least `chosen` blocks a sequence, and those that are compared, `ranked`, which may be the same;
beam_scores [S, K]; room for maxima [S, K, V / COLUMNS]; found scores and token_logprobs, rows and tokens, each
[S, chosen]. Columns from `vocabulary` on are no tokens. */
void top_candidates(const float *scores, const float *ranked, const float *beam_scores, float *maxima,
                    float *found_scores, float *token_logprobs, int64_t *rows, int64_t *tokens, int64_t S, int64_t K,
                    int64_t V, int64_t chosen, int64_t vocabulary, int threads) {
    const int64_t blocks = K * V / COLUMNS;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t block = 0; block < S * blocks; block++)
        maxima[block] = greatest_of(greatest_lanes(ranked + block * COLUMNS));
#pragma omp parallel for schedule(static) num_threads(threads) if (S > FEW)
    for (int64_t s = 0; s < S; s++) {
        const float *own = scores + s * K * V, *compared = ranked + s * K * V, *added = beam_scores + s * K;
        candidate block[chosen], best[chosen];
        int64_t held = 0;
        for (int64_t b = 0; b < blocks; b++)
            held = offer(block, held, chosen, maxima[s * blocks + b] + added[b * COLUMNS / V], b);
        for (int64_t i = 1; i < chosen; i++) /* in the order in which they lie */
            for (int64_t j = i; j > 0 && block[j].at < block[j - 1].at; j--) {
                candidate other = block[j];
                block[j] = block[j - 1], block[j - 1] = other;
            }
        held = 0;
        for (int64_t i = 0; i < chosen; i++) {
            const int64_t first = block[i].at * COLUMNS;
            const float of_beam = added[first / V];
            for (int64_t at = first; at < first + COLUMNS; at++)
                held = offer(best, held, chosen, compared[at] + of_beam, at);
        }
        for (int64_t i = 0; i < chosen; i++) {
            const int64_t at = best[i].at, to = s * chosen + i, token = at % V;
            token_logprobs[to] = own[at];
            found_scores[to] = own[at] + added[at / V];
            rows[to] = at / V;
            tokens[to] = token < vocabulary ? token : vocabulary - 1;
        }
    }
}

/* `app.engine.beam_search.BeamState` and what its sequences asked for, of the first S slots; `apart` numbers from one
beam's tokens to the next one's, `divisors_apart` from one sequence's divisors to the next one's. */
typedef struct {
    int64_t *live_seqs;             /* [S, K, T] */
    float *live_log_probs;          /* [S, K] */
    float *live_token_logprobs;     /* [S, K, T] */
    int64_t *finished_seqs;         /* [S, K, T] */
    float *finished_scores;         /* [S, K] */
    int64_t *finished_lengths;      /* [S, K] */
    float *finished_token_logprobs; /* [S, K, T] */
    uint8_t *is_finished;           /* [S, K] */
    uint8_t *can_improve;           /* [S] */
    int64_t *lengths;               /* [S] */
    const int64_t *is_running;      /* [S] */
    const int64_t *max_new_tokens;  /* [S] */
    const int64_t *early_stopping;  /* [S] */
    const float *length_divisors;   /* [S, ...] */
    int64_t S, K, T, apart, divisors_apart, eos, when_full, look_ahead;
} search;

/* A sequence's 2K candidates, best first: [S, 2K]. */
typedef struct {
    const float *scores, *token_logprobs;
    const int64_t *rows, *tokens;
} candidates;

/* Some positions of one sequence. */
typedef struct {
    int64_t tokens[POSITIONS];
    float logprobs[POSITIONS];
} part;

INLINE part read_part(const int64_t *tokens, const float *logprobs, int64_t count) {
    part it;
    memcpy(it.tokens, tokens, count * sizeof *tokens);
    memcpy(it.logprobs, logprobs, count * sizeof *logprobs);
    return it;
}

INLINE void write_part(const part *it, int64_t *tokens, float *logprobs, int64_t count) {
    memcpy(tokens, it->tokens, count * sizeof *tokens);
    memcpy(logprobs, it->logprobs, count * sizeof *logprobs);
}

/* The same of a beam that goes on with candidate c, whose token stands at `newest`, in this part or another. */
INLINE part continued(const part *beams, candidates by, int64_t c, int64_t newest) {
    part it = beams[by.rows[c]];
    if (0 <= newest && newest < POSITIONS) it.tokens[newest] = by.tokens[c], it.logprobs[newest] = by.token_logprobs[c];
    return it;
}

/* Tokens and their log-probabilities of one sequence, whose candidates start at `mine`: what `best` of the K finished
and the candidates behind them hold, and what `live` of the candidates do. */
static void carry_over(search in, candidates by, int64_t s, int64_t mine, const candidate *best,
                       const candidate *live) {
    const int64_t K = in.K, newest = in.lengths[s];
    for (int64_t first = 0; first < in.T; first += POSITIONS) {
        const int64_t count = in.T - first < POSITIONS ? in.T - first : POSITIONS;
        part beams[K], finished[K];
        for (int64_t k = 0; k < K; k++) {
            const int64_t at = (s * K + k) * in.apart + first;
            beams[k] = read_part(in.live_seqs + at, in.live_token_logprobs + at, count);
            finished[k] = read_part(in.finished_seqs + at, in.finished_token_logprobs + at, count);
        }
        for (int64_t k = 0; k < K; k++) {
            const int64_t at = (s * K + k) * in.apart + first, ended = best[k].at - K;
            const part end = ended < 0 ? finished[best[k].at] : continued(beams, by, mine + ended, newest - first);
            const part on = continued(beams, by, mine + live[k].at, newest - first);
            write_part(&end, in.finished_seqs + at, in.finished_token_logprobs + at, count);
            write_part(&on, in.live_seqs + at, in.live_token_logprobs + at, count);
        }
    }
}

/* Which candidates finish and which live on: `app.engine.beam_search.keep`, but that what is no number ranks last.

parents [S, K]: the beam that each live beam goes on from; done [S]. */
void keep(const search *given, const candidates *among, int64_t *parents, uint8_t *done, int threads) {
    const search in = *given;
    const int64_t K = in.K;
#pragma omp parallel for schedule(static) num_threads(threads) if (in.S > FEW)
    for (int64_t s = 0; s < in.S; s++) {
        const int64_t length = in.lengths[s], limit = in.max_new_tokens[s], early = in.early_stopping[s];
        const float *scores = among->scores + s * 2 * K, *divisors = in.length_divisors + s * in.divisors_apart;
        const int64_t *tokens = among->tokens + s * 2 * K, *rows = among->rows + s * 2 * K;
        const int at_limit = length >= limit;
        float *finished_scores = in.finished_scores + s * K, *live_log_probs = in.live_log_probs + s * K;
        int64_t *finished_lengths = in.finished_lengths + s * K;
        uint8_t *is_finished = in.is_finished + s * K;

        int all_finished = 1;
        for (int64_t k = 0; k < K; k++) all_finished &= is_finished[k];
        const int closed = (all_finished && early == in.when_full) || !in.can_improve[s];

        /* The K finished hypotheses and the 2K candidates, of which the first K may enter; and those that go on. */
        float ranked[3 * K], going_on[2 * K];
        candidate best[K], live[K];
        int64_t held = 0, held_live = 0;
        for (int64_t j = 0; j < 3 * K; j++) {
            const int64_t c = j - K;
            if (c < 0) {
                ranked[j] = finished_scores[j];
            } else {
                const int says_end = tokens[c] == in.eos, enters = c < K && (says_end || at_limit);
                ranked[j] = scores[c] / divisors[length] + (closed ? LOWEST : 0.0f) + (enters ? 0.0f : LOWEST);
                going_on[c] = scores[c] + (says_end ? LOWEST : 0.0f);
                held_live = offer(live, held_live, K, going_on[c], c);
            }
            held = offer(best, held, K, ranked[j], j);
        }
        carry_over(in, *among, s, s * 2 * K, best, live);

        int64_t new_lengths[K];
        uint8_t finished[K];
        int full = early == in.when_full;
        float worst = INFINITY;
        for (int64_t k = 0; k < K; k++) {
            const int64_t j = best[k].at, c = j - K;
            new_lengths[k] = c < 0 ? finished_lengths[j] : length + 1;
            finished[k] = c < 0 ? is_finished[j] : c < K && (tokens[c] == in.eos || at_limit);
            full = full && finished[k];
            worst = ranked[j] < worst ? ranked[j] : worst;
            live_log_probs[k] = going_on[live[k].at];
            parents[s * K + k] = rows[live[k].at];
        }
        memcpy(finished_lengths, new_lengths, sizeof new_lengths);
        memcpy(is_finished, finished, sizeof finished);
        for (int64_t k = 0; k < K; k++) finished_scores[k] = ranked[best[k].at];
        in.lengths[s] = length + in.is_running[s];

        /* Could the best live beam still win? */
        const float hope = live_log_probs[0] / divisors[early == in.look_ahead ? limit : length];
        int improves = 0;
        for (int64_t k = 0; k < K; k++) improves |= hope > (finished[k] ? worst : LOWEST);
        in.can_improve[s] = in.can_improve[s] && improves;
        done[s] = !in.can_improve[s] || full || at_limit;
    }
}

#endif
