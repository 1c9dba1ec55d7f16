/* Eight numbers of fp32 at once, for x86 with AVX2: what differs between the two builds. See `vectors.h`. */
#ifndef PRECIS_AVX2_H
#define PRECIS_AVX2_H

#pragma GCC target("avx2,fma,f16c")
#include <immintrin.h>

enum {
    LANES = 8,     /* numbers of a vector */
    ROWS = 6,      /* whose sums, two vectors each, 16 registers hold beside two of weights and one number */
    INT8_ROWS = 5, /* the same beside two of weights, products and inputs */
    DEEP = 256,    /* inputs of a panel that the first cache holds in fp32, beside those of ROWS rows */
    NEAR = 512,    /* bytes, from what is read to what is asked to come to the first cache */
    FAR = 0,       /* and to the second: not asked for (of processors without AVX-512, measured on Zen 3) */
};

typedef float lanes __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint64_t pairs __attribute__((vector_size(4 * LANES))); /* of neighbouring words, the first one below */
typedef int16_t shorts __attribute__((vector_size(2 * LANES)));       /* as many as numbers of a vector */
typedef int16_t double_shorts __attribute__((vector_size(4 * LANES))); /* as many as a vector holds */

INLINE lanes spread(float x) { return (lanes)_mm256_set1_ps(x); }

/* x * y + z, rounded once. By name: a compiler fuses one and not the other, and sums must not depend on which. */
INLINE lanes fused(lanes x, lanes y, lanes z) { return (lanes)_mm256_fmadd_ps((__m256)x, (__m256)y, (__m256)z); }
/* The greater of both; y where one is no number. */
INLINE lanes greater(lanes x, lanes y) { return (lanes)_mm256_max_ps((__m256)x, (__m256)y); }

/* Numbers of fp16, each as it is. */
INLINE lanes widened_fp16(const uint16_t *from) {
    return (lanes)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from));
}
/* Numbers of bf16, each as it is: the upper half of one in fp32. */
INLINE lanes widened_bf16(const uint16_t *from) {
    return (lanes)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)from)), 16);
}
/* The lower halves of integers. */
INLINE shorts lower_halves(ints x) {
    const __m256i low = _mm256_and_si256((__m256i)x, _mm256_set1_epi32(0xffff));
    return (shorts)_mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
}
INLINE ints rounded(lanes x) { return (ints)_mm256_cvtps_epi32((__m256)x); }
INLINE double_shorts widened_bytes(const int8_t *from) {
    return (double_shorts)_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)from));
}
/* sums + x * y, of each two neighbours. */
INLINE ints add_pairs(ints sums, int32_t two, double_shorts y) {
    return sums + (ints)_mm256_madd_epi16(_mm256_set1_epi32(two), (__m256i)y);
}

/* Whole products of each pair's first word. */
INLINE pairs products_of_even(words x, uint32_t y) { return (pairs)_mm256_mul_epu32((__m256i)x, _mm256_set1_epi32(y)); }
/* Whether any of them is not 0. */
INLINE int any_of(ints x) { return !_mm256_testz_si256((__m256i)x, (__m256i)x); }

INLINE float greatest_of(lanes x) {
    x = greater(x, __builtin_shuffle(x, (ints){4, 5, 6, 7, 0, 1, 2, 3}));
    x = greater(x, __builtin_shuffle(x, (ints){2, 3, 0, 1, 6, 7, 4, 5}));
    return x[0] > x[1] ? x[0] : x[1];
}
INLINE float sum_of(lanes x) { return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7])); }

/* As many sums at once: lane i is the sum of x[i]. */
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

/* Lane j of x[i] becomes lane i of x[j]. */
INLINE void transpose(lanes x[LANES]) {
    lanes two[LANES], four[LANES];
    for (int i = 0; i < LANES; i += 2) {
        two[i] = __builtin_shuffle(x[i], x[i + 1], (ints){0, 8, 1, 9, 4, 12, 5, 13});
        two[i + 1] = __builtin_shuffle(x[i], x[i + 1], (ints){2, 10, 3, 11, 6, 14, 7, 15});
    }
    for (int i = 0; i < LANES; i += 4)
        for (int half = 0; half < 2; half++) {
            lanes first = two[i + half], second = two[i + 2 + half];
            four[i + 2 * half] = __builtin_shuffle(first, second, (ints){0, 1, 8, 9, 4, 5, 12, 13});
            four[i + 2 * half + 1] = __builtin_shuffle(first, second, (ints){2, 3, 10, 11, 6, 7, 14, 15});
        }
    for (int i = 0; i < LANES / 2; i++) {
        x[i] = __builtin_shuffle(four[i], four[i + 4], (ints){0, 1, 2, 3, 8, 9, 10, 11});
        x[i + 4] = __builtin_shuffle(four[i], four[i + 4], (ints){4, 5, 6, 7, 12, 13, 14, 15});
    }
}

#endif
