/* Eight numbers of fp32 at once, for x86 with AVX2. Elsewhere nothing is compiled: `compiled.py` asks before it loads.
*/
#ifndef PRECIS_VECTORS_H
#define PRECIS_VECTORS_H

#include <stdint.h>

#pragma GCC target("avx2,fma,f16c")
#include <immintrin.h>

enum {
    LANES = 8,        /* numbers of a vector */
    LINE = 64,        /* bytes that come from memory together */
    WIDE = 2 * LANES, /* outputs of a panel of weights */
    BLOCK = 128,      /* rows of a product whose inputs the second cache holds */
    COLUMNS = 64,     /* of a block of scores: `top_candidates.BLOCK` */
    AHEAD = 8 * LINE, /* bytes, from where weights are read to where memory is asked for the next */
};

typedef float lanes __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef float unaligned __attribute__((vector_size(4 * LANES), aligned(4)));

/* What is a constant where such a function is called is one inside it. */
#define INLINE static inline __attribute__((always_inline))

INLINE lanes load(const float *from) { return *(const unaligned *)from; }
INLINE void store(float *to, lanes x) { *(unaligned *)to = x; }
INLINE lanes spread(float x) { return (lanes){x, x, x, x, x, x, x, x}; }

/* x * y + z, rounded once. By name: a compiler fuses one and not the other, and sums must not depend on which. */
INLINE lanes fused(lanes x, lanes y, lanes z) { return (lanes)_mm256_fmadd_ps((__m256)x, (__m256)y, (__m256)z); }
/* The greater of both; y where one is no number. */
INLINE lanes greater(lanes x, lanes y) { return (lanes)_mm256_max_ps((__m256)x, (__m256)y); }
INLINE lanes choose(ints which, lanes yes, lanes no) { return (lanes)((which & (ints)yes) | (~which & (ints)no)); }

/* Eight numbers of fp16, each as it is. */
INLINE lanes widened(const uint16_t *from) {
    return (lanes)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from));
}

/* e^x of x <= 0; of less than -87 as of -87. Reduction and polynomial are those of Cephes' `expf` (netlib.org/cephes).
*/
INLINE lanes exp_of(lanes x) {
    x = greater(spread(-87.0f), x);
    lanes shifted = x * spread(1.44269504088896341f) + spread(12582912.0f); /* 1.5 * 2^23: rounded to an integer */
    lanes n = shifted - spread(12582912.0f);
    lanes r = x - n * spread(0.693359375f);
    r = r - n * spread(-2.12194440e-4f);
    lanes p = spread(1.9875691500e-4f);
    p = p * r + spread(1.3981999507e-3f);
    p = p * r + spread(8.3334519073e-3f);
    p = p * r + spread(4.1665795894e-2f);
    p = p * r + spread(1.6666665459e-1f);
    p = p * r + spread(5.0000001201e-1f);
    p = p * (r * r) + r + spread(1.0f);
    return p * (lanes)(((ints)shifted + 127) << 23); /* 2^n: n is how `shifted` ends */
}

/* The error function: the quotient of polynomials that Eigen and XLA have for it in fp32. */
INLINE lanes erf_of(lanes x) {
    lanes most = spread(4.0f);
    x = choose(x > most, most, choose(x < -most, -most, x));
    lanes y = x * x;
    lanes p = spread(-2.72614225801306e-10f);
    p = p * y + spread(2.77068142495902e-08f);
    p = p * y + spread(-2.10102402082508e-06f);
    p = p * y + spread(-5.69250639462346e-05f);
    p = p * y + spread(-7.34990630326855e-04f);
    p = p * y + spread(-2.95459980854025e-03f);
    p = p * y + spread(-1.60960333262415e-02f);
    lanes q = spread(-1.45660718464996e-05f);
    q = q * y + spread(-2.13374055278905e-04f);
    q = q * y + spread(-1.68282697438203e-03f);
    q = q * y + spread(-7.37332916720468e-03f);
    q = q * y + spread(-1.42647390514189e-02f);
    return x * p / q;
}

INLINE lanes gelu_of(lanes x) { return x * spread(0.5f) * (spread(1.0f) + erf_of(x * spread(0.70710678118654752f))); }

#endif
