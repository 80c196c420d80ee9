/* Attention of one head: its keys and values are float32 or float16. */

#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "native.h"

/* Numbers of a head that are kept in registers. */
#define BLOCK 32

/* Number i of keys or values; is_half is a constant where it counts. */
static inline __attribute__((always_inline)) float number(const void *x, int64_t i, int is_half) {
#ifdef __FLT16_MAX__
    if (is_half) return (float)((const _Float16 *)x)[i];
#endif
    (void)is_half;
    return ((const float *)x)[i];
}

#ifdef HAS_AVX2
static inline __attribute__((always_inline)) __m256 eight(const void *x, int64_t i, int is_half) {
    return is_half ? _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)((const int16_t *)x + i)))
                   : _mm256_loadu_ps((const float *)x + i);
}
#endif

/* Ask for the line that number i lies in, some time before it is needed. */
static inline void fetch(const void *x, int64_t i, int is_half) {
    __builtin_prefetch((const char *)x + i * (is_half ? 2 : 4), 0, 2);
}

/* scores (S) = k (S, C) times q. */
static inline __attribute__((always_inline)) void compare(
    const float *q, const void *k, float *scores, int S, int C, int64_t ahead, int is_half) {
    int s = 0;
#ifdef HAS_AVX2
    /* Eight sums at a time, as adding up one register takes as long as adding up eight. */
    for (; s + 8 <= S && C % 8 == 0; s += 8) {
        for (int i = s * C; i < (s + 8) * C; i += 32) fetch(k, i + ahead, is_half);
        __m256 p[8];
#pragma GCC unroll 8
        for (int j = 0; j < 8; j++) p[j] = _mm256_setzero_ps();
        for (int c = 0; c < C; c += 8) {
            const __m256 own = _mm256_loadu_ps(q + c);
#pragma GCC unroll 8
            for (int j = 0; j < 8; j++)
                p[j] = _mm256_fmadd_ps(own, eight(k, (int64_t)(s + j) * C + c, is_half), p[j]);
        }
        const __m256 low = _mm256_hadd_ps(_mm256_hadd_ps(p[0], p[1]), _mm256_hadd_ps(p[2], p[3]));
        const __m256 high = _mm256_hadd_ps(_mm256_hadd_ps(p[4], p[5]), _mm256_hadd_ps(p[6], p[7]));
        _mm256_storeu_ps(scores + s, _mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20),
                                                   _mm256_permute2f128_ps(low, high, 0x31)));
    }
#endif
    for (; s < S; s++) {
        float dot = 0;
#pragma omp simd reduction(+ : dot)
        for (int c = 0; c < C; c++) dot += q[c] * number(k, (int64_t)s * C + c, is_half);
        scores[s] = dot;
    }
}

/* out (C) = shares (S) times v (S, C), over `total`. */
static inline __attribute__((always_inline)) void mix(
    const float *shares, float total, const void *v, float *out, int S, int C, int64_t ahead,
    int is_half) {
    int c = 0;
#ifdef HAS_AVX2
    for (; c + BLOCK <= C; c += BLOCK) {
        __m256 sums[BLOCK / 8];
        for (int j = 0; j < BLOCK / 8; j++) sums[j] = _mm256_setzero_ps();
        for (int s = 0; s < S; s++) {
            const __m256 share = _mm256_set1_ps(shares[s]);
            const int64_t at = (int64_t)s * C + c;
            fetch(v, at + ahead, is_half);
#pragma GCC unroll 4
            for (int j = 0; j < BLOCK / 8; j++)
                sums[j] = _mm256_fmadd_ps(share, eight(v, at + 8 * j, is_half), sums[j]);
        }
        for (int j = 0; j < BLOCK / 8; j++)
            _mm256_storeu_ps(out + c + 8 * j, _mm256_div_ps(sums[j], _mm256_set1_ps(total)));
    }
#endif
    memset(out + c, 0, (C - c) * sizeof(float));
    for (int s = 0; s < S; s++)
        for (int j = c; j < C; j++) out[j] += shares[s] * number(v, (int64_t)s * C + j, is_half);
    for (; c < C; c++) out[c] /= total;
}

/* One head's mixture of the values seen: k, v (S, C); scores is room for S numbers; those of the next
   head are `ahead` numbers on. */
static inline __attribute__((always_inline)) void attend(
    const float *q, const void *k, const void *v, float *out, float *scores, int S, int C,
    int64_t ahead, int is_half) {
    float largest = -INFINITY, total = 0;
    const float scale = 1 / sqrtf(C);
    compare(q, k, scores, S, C, ahead, is_half);
#pragma omp simd reduction(max : largest)
    for (int s = 0; s < S; s++) largest = fmaxf(largest, scores[s]);
#pragma omp simd reduction(+ : total)
    for (int s = 0; s < S; s++) total += scores[s] = power_of_e((scores[s] - largest) * scale);
    mix(scores, total, v, out, S, C, ahead, is_half);
}

/* Put x (C) among keys or values. */
static void keep(const float *x, void *y, int64_t i, int C, int is_half) {
#ifdef __FLT16_MAX__
    if (is_half) {
        int c = 0;
#ifdef HAS_AVX2
        for (; c + 8 <= C; c += 8)
            _mm_storeu_si128((__m128i *)((int16_t *)y + i + c),
                             _mm256_cvtps_ph(_mm256_loadu_ps(x + c), _MM_FROUND_TO_NEAREST_INT));
#endif
        for (; c < C; c++) ((_Float16 *)y)[i + c] = (_Float16)x[c];
        return;
    }
#endif
    (void)is_half;
    memcpy((float *)y + i, x, C * sizeof(float));
}
