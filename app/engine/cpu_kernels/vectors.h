/* Eight numbers of fp32 at once, in the compiler's own terms: AVX2 on x86, two registers elsewhere. */
#ifndef PRECIS_VECTORS_H
#define PRECIS_VECTORS_H

#include <stdint.h>

/* A processor without these is refused by `__init__.py`. */
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c")
#include <immintrin.h>
#endif

enum {
    LANES = 8, /* numbers of a vector */
    LINE = 16, /* numbers that come from memory together */
};

typedef float lanes __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef float anywhere __attribute__((vector_size(4 * LANES), aligned(4)));

/* What is a constant where such a function is called is one inside it. */
#define INLINE static inline __attribute__((always_inline))

INLINE lanes load(const float *from) { return *(const anywhere *)from; }
INLINE void store(float *to, lanes x) { *(anywhere *)to = x; }
INLINE lanes all(float x) { return (lanes){x, x, x, x, x, x, x, x}; }
INLINE lanes choose(ints which, lanes yes, lanes no) { return (lanes)((which & (ints)yes) | (~which & (ints)no)); }

/* Eight numbers of fp16, each as it is. */
INLINE lanes widened(const uint16_t *from) {
#if defined(__x86_64__)
    return (lanes)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from));
#else
    lanes x;
    for (int i = 0; i < LANES; i++) x[i] = ((const __fp16 *)from)[i];
    return x;
#endif
}

#endif
