/* Several numbers of fp32 at once, and the functions of them that all kernels share.

Compiled twice, for processors with AVX2 and for those with AVX-512; `avx2.h` and `avx512.h` have what differs.
Elsewhere nothing is compiled: `compiled.py` asks before it loads. */
#ifndef PRECIS_VECTORS_H
#define PRECIS_VECTORS_H

#include <stdint.h>

/* What is a constant where such a function is called is one inside it. */
#define INLINE static inline __attribute__((always_inline))

#ifdef PRECIS_AVX512
#include "avx512.h"
#else
#include "avx2.h"
#endif

enum {
    LINE = 64,        /* bytes that come from memory together */
    WIDE = 2 * LANES, /* outputs of a panel of weights */
    BLOCK = 128,      /* rows of a product whose inputs the second cache holds */
    COLUMNS = 64,     /* of a block of scores: `top_candidates.BLOCK` */
};

/* How numbers that do not change, or only grow in number, are kept: `compiled.FORMATS`. */
enum { FP32, FP16, BF16 };

typedef double reals __attribute__((vector_size(8 * LANES)));
typedef float unaligned __attribute__((vector_size(4 * LANES), aligned(4)));

INLINE lanes load(const float *from) { return *(const unaligned *)from; }
INLINE void store(float *to, lanes x) { *(unaligned *)to = x; }
INLINE lanes choose(ints which, lanes yes, lanes no) { return (lanes)((which & (ints)yes) | (~which & (ints)no)); }

/* Bytes of a number. */
INLINE int64_t size_of(int format) { return format == FP32 ? 4 : 2; }
INLINE const void *at(int format, const void *from, int64_t i) { return (const char *)from + i * size_of(format); }

/* Numbers from number i on. */
INLINE lanes load_from(int format, const void *from, int64_t i) {
    return format == FP32   ? load((const float *)from + i)
           : format == FP16 ? widened_fp16((const uint16_t *)from + i)
                            : widened_bf16((const uint16_t *)from + i);
}

/* From number i on, in fp32 or rounded to bf16, to the even one where two are equally near. */
INLINE void store_to(int format, void *to, int64_t i, lanes x) {
    if (format == FP32) {
        store((float *)to + i, x);
        return;
    }
    const ints none = x != x;
    const words bits = (words)x, upper = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const shorts halves = lower_halves(((ints)upper & ~none) | (none & 0x7fc0));
    __builtin_memcpy((uint16_t *)to + i, &halves, sizeof halves);
}

/* Asks for the lines of so many bytes, as far as the second cache. */
INLINE void fetch_lines(const void *from, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += LINE) __builtin_prefetch((const char *)from + i, 0, 2);
}
/* Asks for what is read some time after these bytes, where all is read in order. */
INLINE void fetch_ahead(const void *from, int64_t bytes) {
    if (FAR) fetch_lines((const char *)from + FAR, bytes);
    for (int64_t i = 0; i < bytes; i += LINE) __builtin_prefetch((const char *)from + NEAR + i);
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

/* The natural logarithm of x > 0 that is no subnormal number, near 1 as exact as elsewhere: that of Cephes' `logf`. */
INLINE lanes log_of(lanes x) {
    const ints bits = (ints)x;
    lanes m = (lanes)((bits & 0x7fffff) | 0x3f000000); /* x = m * 2^n, m from 1/2 to 1 */
    const ints below = m < spread(0.70710678118654752f);
    const lanes n = __builtin_convertvector((bits >> 23) - 126 + below, lanes);
    m = m - spread(1.0f) + choose(below, m, spread(0.0f));
    lanes p = spread(7.0376836292e-2f);
    p = p * m + spread(-1.1514610310e-1f);
    p = p * m + spread(1.1676998740e-1f);
    p = p * m + spread(-1.2420140846e-1f);
    p = p * m + spread(1.4249322787e-1f);
    p = p * m + spread(-1.6668057665e-1f);
    p = p * m + spread(2.0000714765e-1f);
    p = p * m + spread(-2.4999993993e-1f);
    p = p * m + spread(3.3333331174e-1f);
    p = p * m * (m * m) + n * spread(-2.12194440e-4f) - spread(0.5f) * (m * m);
    return m + p + n * spread(0.693359375f);
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
