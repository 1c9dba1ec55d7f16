/* Sixteen numbers of fp32 at once, for x86 with AVX-512 and its VNNI: what differs between the two builds. See
`vectors.h`. */
#ifndef PRECIS_AVX512_H
#define PRECIS_AVX512_H

#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,prefer-vector-width=512")
#include <immintrin.h>

enum {
    LANES = 16,     /* numbers of a vector */
    ROWS = 12,      /* whose sums, two vectors each, 32 registers hold beside two of weights and one number */
    INT8_ROWS = 12, /* the same */
    DEEP = 128,     /* inputs of a panel that the first cache holds in fp32, beside those of ROWS rows */
    NEAR = 2048,    /* bytes, from what is read to what is asked to come to the first cache */
    FAR = 8192,     /* and to the second: memory is far, and the first has room for few requests */
};

typedef float lanes __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint64_t pairs __attribute__((vector_size(4 * LANES))); /* of neighbouring words, the first one below */
typedef int16_t shorts __attribute__((vector_size(2 * LANES)));       /* as many as numbers of a vector */
typedef int16_t double_shorts __attribute__((vector_size(4 * LANES))); /* as many as a vector holds */

INLINE lanes spread(float x) { return (lanes)_mm512_set1_ps(x); }

/* x * y + z, rounded once. By name: a compiler fuses one and not the other, and sums must not depend on which. */
INLINE lanes fused(lanes x, lanes y, lanes z) { return (lanes)_mm512_fmadd_ps((__m512)x, (__m512)y, (__m512)z); }
/* The greater of both; y where one is no number. */
INLINE lanes greater(lanes x, lanes y) { return (lanes)_mm512_max_ps((__m512)x, (__m512)y); }

/* Numbers of fp16, each as it is. */
INLINE lanes widened_fp16(const uint16_t *from) {
    return (lanes)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from));
}
/* Numbers of bf16, each as it is: the upper half of one in fp32. */
INLINE lanes widened_bf16(const uint16_t *from) {
    return (lanes)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from)), 16);
}
/* The lower halves of integers. */
INLINE shorts lower_halves(ints x) { return (shorts)_mm512_cvtepi32_epi16((__m512i)x); }
INLINE ints rounded(lanes x) { return (ints)_mm512_cvtps_epi32((__m512)x); }
INLINE double_shorts widened_bytes(const int8_t *from) {
    return (double_shorts)_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)from));
}
/* sums + x * y, of each two neighbours. */
INLINE ints add_pairs(ints sums, int32_t two, double_shorts y) {
    return (ints)_mm512_dpwssd_epi32((__m512i)sums, _mm512_set1_epi32(two), (__m512i)y);
}

/* Whole products of each pair's first word. */
INLINE pairs products_of_even(words x, uint32_t y) { return (pairs)_mm512_mul_epu32((__m512i)x, _mm512_set1_epi32(y)); }
/* Whether any of them is not 0. */
INLINE int any_of(ints x) { return _mm512_test_epi32_mask((__m512i)x, (__m512i)x) != 0; }

INLINE float greatest_of(lanes x) { return _mm512_reduce_max_ps((__m512)x); }
INLINE float sum_of(lanes x) { return _mm512_reduce_add_ps((__m512)x); }

/* Neighbours are added: those of x in the lower half, those of y in the upper. */
INLINE lanes sums_of_neighbours(lanes x, lanes y) {
    const ints even = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
    return __builtin_shuffle(x, y, even) + __builtin_shuffle(x, y, even + 1);
}
/* As many sums at once: lane i is the sum of x[i]. */
INLINE lanes sums_of(const lanes x[LANES]) {
    lanes two[8], four[4];
    for (int i = 0; i < 8; i++) two[i] = sums_of_neighbours(x[2 * i], x[2 * i + 1]);
    for (int i = 0; i < 4; i++) four[i] = sums_of_neighbours(two[2 * i], two[2 * i + 1]);
    return sums_of_neighbours(sums_of_neighbours(four[0], four[1]), sums_of_neighbours(four[2], four[3]));
}

/* Lane j of x[i] becomes lane i of x[j]: halves change places, then their halves, and so on. */
INLINE void transpose(lanes x[LANES]) {
    static const ints own = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#pragma GCC unroll 4
    for (int apart = LANES / 2; apart; apart /= 2) {
        const ints upper = (own & apart) != 0; /* -1 there */
        const ints first = own + (upper & (LANES - apart)), second = own + (~upper & apart) + (upper & LANES);
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++)
            if (!(i & apart)) {
                const lanes one = x[i], other = x[i + apart];
                x[i] = __builtin_shuffle(one, other, first), x[i + apart] = __builtin_shuffle(one, other, second);
            }
    }
}

#endif
