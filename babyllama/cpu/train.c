/* Training steps in bfloat16, for processors with AVX512-BF16: attention, and what stands between
   the products of a layer; fused.py calls it, torch does the products.

   Attention keeps a tile of the scores in the cache and computes it again in the backward pass (Dao et
   al. 2022, arXiv:2205.14135). Everything in it is one small product: eight rows of pairs, each
   pair broadcast, times two registers. Sums and softmax are float32. Threads share whole heads or
   fixed chunks of rows, so numbers do not depend on their number. Axes as in model.py; N = B T. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef __AVX512BF16__
#include <immintrin.h>

#define INLINE static inline __attribute__((always_inline))
#define ROWS 8   /* rows of a small product */
#define TILE 32  /* its columns: queries of a tile of scores */
#define KEYS 64  /* keys of a tile of scores */
#define HIDDEN -1e30f
#define LOWEST -1e20f
#define LOG2_E 1.44269504f
#define CHUNKS 16 /* of rows that are summed up by themselves */

typedef uint16_t bf16;

#define NUMBER bf16
#define NAME(f) f##_bf16
#define V __m512
#define WIDE 16
#define all _mm512_set1_ps
#define load _mm512_loadu_ps
#define store _mm512_storeu_ps
#define larger _mm512_max_ps
#define sum_of _mm512_reduce_add_ps
#define most_of _mm512_reduce_max_ps

typedef struct {
    int32_t B, T, H, K, C;
    const bf16 *qkv;         /* (N, (H + 2K) C) */
    const float *cosine, *sine; /* (T, C), signed sines */
    const int32_t *segments; /* (B, T), or null */
    bf16 *out;               /* (N, H C) */
    float *powers;           /* (B, H, T): log2 of each softmax's sum */
    const bf16 *grad_out;    /* (N, H C) */
    bf16 *grad_qkv;
} Attention;

INLINE __m512 widen(const bf16 *x) {
    return _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)x)), 16));
}

INLINE void narrow(bf16 *y, __m512 x) {
    _mm256_storeu_si256((__m256i *)y, (__m256i)_mm512_cvtneps_pbh(x));
}

INLINE float number(bf16 x) {
    const uint32_t bits = (uint32_t)x << 16;
    float y;
    memcpy(&y, &bits, sizeof y);
    return y;
}

INLINE bf16 rounded(float x) {
    bf16 y[16];
    narrow(y, _mm512_set1_ps(x));
    return y[0];
}

/* 32 numbers: first, then second. */
INLINE __m512i narrow_both(__m512 first, __m512 second) {
    return (__m512i)_mm512_cvtne2ps_pbh(second, first);
}

/* Pairs of each number of a with the one of b, of the lower or the upper 16. */
INLINE __m512i pair_low(__m512i a, __m512i b) {
    const __m512i even = _mm512_cvtepu16_epi32(_mm256_setr_epi16(
        0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    const __m512i order = _mm512_or_si512(even, _mm512_slli_epi32(_mm512_add_epi32(even,
        _mm512_set1_epi32(32)), 16));
    return _mm512_permutex2var_epi16(a, order, b);
}

INLINE __m512i pair_high(__m512i a, __m512i b) {
    const __m512i even = _mm512_cvtepu16_epi32(_mm256_setr_epi16(
        16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31));
    const __m512i order = _mm512_or_si512(even, _mm512_slli_epi32(_mm512_add_epi32(even,
        _mm512_set1_epi32(32)), 16));
    return _mm512_permutex2var_epi16(a, order, b);
}

/* 2 to the power of x, to 3e-6. */
INLINE __m512 power_of_two(__m512 x) {
    const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 rest = _mm512_sub_ps(x, whole);
    __m512 y = _mm512_set1_ps(0.00956051f);
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(0.05591704f));
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(0.24024981f));
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(0.69312197f));
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(0.99999920f));
    return _mm512_scalef_ps(y, whole);
}

/* x (16 rows of 16 words) on its side. */
INLINE void transpose(__m512i x[16]) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
#pragma GCC unroll 4
    for (int s = 1; s < 16; s *= 2) {
        /* Of rows i and i + s: columns whose bit s is clear, or those whose bit is set. */
        const __m512i bit = _mm512_and_si512(lane, _mm512_set1_epi32(s));
        const __mmask16 set = _mm512_test_epi32_mask(bit, bit);
        const __m512i low = _mm512_mask_add_epi32(lane, set, _mm512_xor_si512(lane, bit),
                                                  _mm512_set1_epi32(16));
        const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(s));
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++)
            if (!(i & s)) {
                const __m512i a = x[i], b = x[i + s];
                x[i] = _mm512_permutex2var_epi32(a, low, b);
                x[i + s] = _mm512_permutex2var_epi32(a, high, b);
            }
    }
}

/* sums (8, 32) += a (8 rows of n pairs, `row` and `step` words apart) b (n, 32 pairs, `wide` apart). */
INLINE void product(__m512 sums[ROWS][2], const uint32_t *a, int64_t row, int64_t step,
                    const uint32_t *b, int64_t wide, int n) {
    for (int k = 0; k < n; k++, a += step, b += wide) {
        const __m512bh b0 = (__m512bh)_mm512_loadu_si512(b);
        const __m512bh b1 = (__m512bh)_mm512_loadu_si512(b + 16);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
            const __m512bh own = (__m512bh)_mm512_set1_epi32(a[r * row]);
            sums[r][0] = _mm512_dpbf16_ps(sums[r][0], own, b0);
            sums[r][1] = _mm512_dpbf16_ps(sums[r][1], own, b1);
        }
    }
}

INLINE void clear(__m512 sums[ROWS][2]) {
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) sums[r][0] = sums[r][1] = _mm512_setzero_ps();
}

/* y (8, 32), rows `wide` apart, += the product. */
INLINE void add_product(float *y, int64_t wide_y, const uint32_t *a, int64_t row, int64_t step,
                        const uint32_t *b, int64_t wide, int n) {
    __m512 sums[ROWS][2];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) {
        sums[r][0] = _mm512_loadu_ps(y + r * wide_y);
        sums[r][1] = _mm512_loadu_ps(y + r * wide_y + 16);
    }
    product(sums, a, row, step, b, wide, n);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) {
        _mm512_storeu_ps(y + r * wide_y, sums[r][0]);
        _mm512_storeu_ps(y + r * wide_y + 16, sums[r][1]);
    }
}

/* Rows of one head, x (T, C) of rows `wide` apart, as y (T, C), rotated where there are cosines; zeros
   up to a multiple of TILE. */
INLINE void copy_rows(const bf16 *x, int64_t wide, const float *cosine, const float *sine, bf16 *y,
                      int T, int C) {
    for (int t = 0; t < T; t++, x += wide, y += C)
        for (int c = 0; c < C; c += 16) {
            const int other = c < C / 2 ? c + C / 2 : c - C / 2;
            __m512 own = widen(x + c);
            if (cosine) {
                const __m512 turned = _mm512_mul_ps(widen(x + other),
                                                    _mm512_loadu_ps(sine + (int64_t)t * C + c));
                own = _mm512_fmadd_ps(own, _mm512_loadu_ps(cosine + (int64_t)t * C + c), turned);
            }
            narrow(y + c, own);
        }
    memset(y, 0, (size_t)(-T & (TILE - 1)) * C * sizeof *y);
}

/* x (T, C) as pairs of rows (T / 2, C, 2). */
INLINE void pair_rows(const bf16 *x, uint32_t *y, int T, int C) {
    for (int t = 0; t < T; t += 2, x += 2 * C, y += C)
        for (int c = 0; c < C; c += 32) {
            const __m512i a = _mm512_loadu_si512(x + c), b = _mm512_loadu_si512(x + C + c);
            _mm512_storeu_si512(y + c, pair_low(a, b));
            _mm512_storeu_si512(y + c + 16, pair_high(a, b));
        }
}

/* x (T, C) as tiles of pairs of columns (T / TILE, C / 2, TILE, 2). */
INLINE void pair_columns(const bf16 *x, uint32_t *y, int T, int C) {
    for (int t = 0; t < T; t += 16)
        for (int c = 0; c < C; c += 32) {
            __m512i words[16];
            for (int i = 0; i < 16; i++)
                words[i] = _mm512_loadu_si512(x + (int64_t)(t + i) * C + c);
            transpose(words);
            uint32_t *to = y + (int64_t)(t / TILE) * C / 2 * TILE + c / 2 * TILE + t % TILE;
            for (int i = 0; i < 16; i++) _mm512_storeu_si512(to + i * TILE, words[i]);
        }
}

/* Columns (C, TILE) float32 as rows (TILE, C) float32. */
INLINE void to_rows(const float *x, float *y, int C) {
    for (int q = 0; q < TILE; q += 16)
        for (int c = 0; c < C; c += 16) {
            __m512i words[16];
            for (int i = 0; i < 16; i++) words[i] = _mm512_loadu_si512(x + (c + i) * TILE + q);
            transpose(words);
            for (int i = 0; i < 16; i++) _mm512_storeu_si512(y + (q + i) * C + c, words[i]);
        }
}

/* Whether tokens of two stretches may belong to one document. */
INLINE int share_one(const int32_t *a, int n_a, const int32_t *b, int n_b) {
    int32_t low_a = a[0], high_a = a[0], low_b = b[0], high_b = b[0];
    for (int i = 1; i < n_a; i++) {
        low_a = a[i] < low_a ? a[i] : low_a;
        high_a = a[i] > high_a ? a[i] : high_a;
    }
    for (int i = 1; i < n_b; i++) {
        low_b = b[i] < low_b ? b[i] : low_b;
        high_b = b[i] > high_b ? b[i] : high_b;
    }
    return low_a <= high_b && low_b <= high_a;
}

/* Which of 16 queries from q on see key j. */
INLINE __mmask16 seen(int j, int q, const int32_t *segments) {
    const int hidden = j - q;
    const __mmask16 later = hidden <= 0 ? 0xffff : hidden > 15 ? 0 : (0xffff << hidden) & 0xffff;
    if (!segments) return later;
    return _mm512_mask_cmpeq_epi32_mask(later, _mm512_loadu_si512(segments + q),
                                        _mm512_set1_epi32(segments[j]));
}

/* scores (n, 32) = k (n, C) of rows times the queries of a tile. */
INLINE void compare(const bf16 *k, const uint32_t *q, float *scores, int n, int C) {
    for (int j = 0; j < n; j += ROWS) {
        __m512 sums[ROWS][2];
        clear(sums);
        product(sums, (const uint32_t *)(k + (int64_t)j * C), C / 2, 1, q, TILE, C / 2);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
            _mm512_store_ps(scores + (j + r) * TILE, sums[r][0]);
            _mm512_store_ps(scores + (j + r) * TILE + 16, sums[r][1]);
        }
    }
}

/* Set scores (n keys from k0 on, 32 queries from q0 on) that are not seen to `value`. */
INLINE void hide(float *scores, int k0, int n, int q0, const int32_t *segments, float value) {
    for (int j = 0; j < n; j++)
        for (int g = 0; g < TILE; g += 16)
            _mm512_mask_store_ps(scores + j * TILE + g, ~seen(k0 + j, q0 + g, segments),
                                 _mm512_set1_ps(value));
}

/* Room for one head. */
typedef struct {
    bf16 *k, *v, *q, *o;                     /* rows (T, C) */
    uint32_t *k_pairs, *v_pairs, *q_pairs, *o_pairs; /* pairs of rows */
    uint32_t *q_tiles, *o_tiles;             /* pairs of columns */
    float *grad_q, *grad_k, *grad_v;         /* (T / TILE, C, TILE), (T, C), (T, C) */
    float *powers, *deltas;                  /* (T) */
    int32_t *segments;                       /* (T) */
    void *all;
} Room;

static Room make_room(int T, int C) {
    const size_t n = (size_t)T * C, whole = 14 * n * 2 + 3 * n * 4 + 3 * (size_t)T * 4;
    char *at = aligned_alloc(64, (whole + 4095) / 4096 * 4096);
    Room r = {.all = at};
    bf16 **rows[] = {&r.k, &r.v, &r.q, &r.o};
    uint32_t **pairs[] = {&r.k_pairs, &r.v_pairs, &r.q_pairs, &r.o_pairs, &r.q_tiles, &r.o_tiles};
    float **sums[] = {&r.grad_q, &r.grad_k, &r.grad_v};
    for (int i = 0; i < 4; i++, at += n * 2) *rows[i] = (bf16 *)at;
    for (int i = 0; i < 6; i++, at += n * 2) *pairs[i] = (uint32_t *)at;
    for (int i = 0; i < 3; i++, at += n * 4) *sums[i] = (float *)at;
    r.powers = (float *)at, r.deltas = r.powers + T, r.segments = (int32_t *)(r.deltas + T);
    return r;
}

INLINE const int32_t *own_segments(const Attention *a, const Room *r, int b, int T) {
    if (!a->segments) return 0;
    memcpy(r->segments, a->segments + (int64_t)b * a->T, a->T * sizeof(int32_t));
    for (int t = a->T; t < T; t++) r->segments[t] = INT32_MIN;
    return r->segments;
}

/* The values that a tile of queries sees, mixed. */
INLINE void attend_tile(const Attention *a, const Room *r, int b, int h, int q0,
                        const int32_t *segments, int C) {
    const float scale = LOG2_E / sqrtf(C);
    float scores[KEYS * TILE] __attribute__((aligned(64)));
    float mixed[TILE * C] __attribute__((aligned(64))), rows[TILE * C] __attribute__((aligned(64)));
    uint32_t pairs[KEYS / 2 * TILE] __attribute__((aligned(64)));
    __m512 largest[2], total[2];
    for (int g = 0; g < 2; g++) largest[g] = _mm512_set1_ps(LOWEST), total[g] = _mm512_setzero_ps();
    memset(mixed, 0, sizeof mixed);
    for (int k0 = 0; k0 < q0 + TILE; k0 += KEYS) {
        const int n = k0 + KEYS <= q0 + TILE ? KEYS : q0 + TILE - k0;
        if (segments && !share_one(segments + k0, n, segments + q0, TILE)) continue;
        compare(r->k + (int64_t)k0 * C, r->q_tiles + (int64_t)q0 * C / 2, scores, n, C);
        if (segments || k0 + n > q0) hide(scores, k0, n, q0, segments, HIDDEN);
        __m512 before[2], shrink[2];
        for (int g = 0; g < 2; g++) {
            __m512 most = _mm512_load_ps(scores + 16 * g);
            for (int j = 1; j < n; j++)
                most = _mm512_max_ps(most, _mm512_load_ps(scores + j * TILE + 16 * g));
            before[g] = largest[g];
            largest[g] = _mm512_max_ps(before[g], _mm512_mul_ps(most, _mm512_set1_ps(scale)));
            shrink[g] = power_of_two(_mm512_sub_ps(before[g], largest[g]));
            total[g] = _mm512_mul_ps(total[g], shrink[g]);
        }
        for (int j = 0; j < n; j += 2) {
            __m512i own[2];
            for (int i = 0; i < 2; i++) {
                __m512 p[2];
                for (int g = 0; g < 2; g++) {
                    const __m512 s = _mm512_load_ps(scores + (j + i) * TILE + 16 * g);
                    p[g] = power_of_two(_mm512_fmsub_ps(s, _mm512_set1_ps(scale), largest[g]));
                    total[g] = _mm512_add_ps(total[g], p[g]);
                }
                own[i] = narrow_both(p[0], p[1]);
            }
            _mm512_store_si512(pairs + j / 2 * TILE, pair_low(own[0], own[1]));
            _mm512_store_si512(pairs + j / 2 * TILE + 16, pair_high(own[0], own[1]));
        }
        for (int c = 0; c < C; c += ROWS) {
            __m512 sums[ROWS][2];
#pragma GCC unroll 8
            for (int i = 0; i < ROWS; i++)
                for (int g = 0; g < 2; g++)
                    sums[i][g] = _mm512_mul_ps(_mm512_load_ps(mixed + (c + i) * TILE + 16 * g),
                                               shrink[g]);
            product(sums, r->v_pairs + (int64_t)k0 / 2 * C + c, 1, C, pairs, TILE, n / 2);
#pragma GCC unroll 8
            for (int i = 0; i < ROWS; i++)
                for (int g = 0; g < 2; g++)
                    _mm512_store_ps(mixed + (c + i) * TILE + 16 * g, sums[i][g]);
        }
    }
    float logs[TILE], shares[TILE];
    for (int g = 0; g < 2; g++) {
        _mm512_storeu_ps(logs + 16 * g, largest[g]);
        _mm512_storeu_ps(shares + 16 * g, total[g]);
    }
    to_rows(mixed, rows, C);
    const int n_rows = a->T - q0 < TILE ? a->T - q0 : TILE;
    for (int i = 0; i < n_rows; i++) {
        bf16 *out = a->out + (((int64_t)b * a->T + q0 + i) * a->H + h) * C;
        const __m512 share = _mm512_set1_ps(1 / shares[i]);
        for (int c = 0; c < C; c += 16)
            narrow(out + c, _mm512_mul_ps(_mm512_load_ps(rows + i * C + c), share));
        a->powers[((int64_t)b * a->H + h) * a->T + q0 + i] = logs[i] + log2f(shares[i]);
    }
}

/* The heads of one group of queries, of one sequence. */
INLINE void attend_group(const Attention *a, Room *r, int item, int T, int C) {
    const int wide = (a->H + 2 * a->K) * C, n = a->H / a->K, b = item / a->K, g = item % a->K;
    const bf16 *x = a->qkv + (int64_t)b * a->T * wide;
    const int32_t *segments = own_segments(a, r, b, T);
    copy_rows(x + (a->H + g) * C, wide, a->cosine, a->sine, r->k, a->T, C);
    copy_rows(x + (a->H + a->K + g) * C, wide, 0, 0, r->v, a->T, C);
    pair_rows(r->v, r->v_pairs, T, C);
    for (int h = g * n; h < (g + 1) * n; h++) {
        copy_rows(x + h * C, wide, a->cosine, a->sine, r->q, a->T, C);
        pair_columns(r->q, r->q_tiles, T, C);
        for (int q0 = 0; q0 < T; q0 += TILE) attend_tile(a, r, b, h, q0, segments, C);
    }
}

/* Gradients of one tile of scores: KEYS keys at most, TILE queries. */
INLINE void back_tile(const Room *r, int k0, int n, int q0, const int32_t *segments, int C) {
    const float scale = LOG2_E / sqrtf(C);
    float scores[KEYS * TILE] __attribute__((aligned(64)));
    float errors[KEYS * TILE] __attribute__((aligned(64)));
    uint32_t shares[KEYS * TILE / 2] __attribute__((aligned(64))); /* rows of 32 bf16 */
    uint32_t pulls[KEYS * TILE / 2] __attribute__((aligned(64)));  /* the same */
    uint32_t pairs[KEYS / 2 * TILE] __attribute__((aligned(64)));
    compare(r->k + (int64_t)k0 * C, r->q_tiles + (int64_t)q0 * C / 2, scores, n, C);
    if (segments || k0 + n > q0) hide(scores, k0, n, q0, segments, HIDDEN);
    compare(r->v + (int64_t)k0 * C, r->o_tiles + (int64_t)q0 * C / 2, errors, n, C);
    __m512 powers[2], deltas[2];
    for (int g = 0; g < 2; g++) {
        powers[g] = _mm512_loadu_ps(r->powers + q0 + 16 * g);
        deltas[g] = _mm512_loadu_ps(r->deltas + q0 + 16 * g);
    }
    for (int j = 0; j < n; j += 2) {
        __m512i own[2];
        for (int i = 0; i < 2; i++) {
            __m512 p[2], e[2];
            for (int g = 0; g < 2; g++) {
                const int at = (j + i) * TILE + 16 * g;
                p[g] = power_of_two(_mm512_fmsub_ps(_mm512_load_ps(scores + at),
                                                    _mm512_set1_ps(scale), powers[g]));
                e[g] = _mm512_mul_ps(p[g], _mm512_sub_ps(_mm512_load_ps(errors + at), deltas[g]));
            }
            _mm512_store_si512(shares + (j + i) * TILE / 2, narrow_both(p[0], p[1]));
            own[i] = narrow_both(e[0], e[1]);
            _mm512_store_si512(pulls + (j + i) * TILE / 2, own[i]);
        }
        _mm512_store_si512(pairs + j / 2 * TILE, pair_low(own[0], own[1]));
        _mm512_store_si512(pairs + j / 2 * TILE + 16, pair_high(own[0], own[1]));
    }
    for (int j = 0; j < n; j += ROWS)
        for (int c = 0; c < C; c += 32) {
            const int64_t to = (int64_t)(k0 + j) * C + c, from = (int64_t)q0 / 2 * C + c;
            add_product(r->grad_v + to, C, shares + j * TILE / 2, TILE / 2, 1, r->o_pairs + from, C,
                        TILE / 2);
            add_product(r->grad_k + to, C, pulls + j * TILE / 2, TILE / 2, 1, r->q_pairs + from, C,
                        TILE / 2);
        }
    for (int c = 0; c < C; c += ROWS)
        add_product(r->grad_q + (int64_t)q0 * C + c * TILE, TILE,
                    r->k_pairs + (int64_t)k0 / 2 * C + c, 1, C, pairs, TILE, n / 2);
}

/* Gradients x (n, C) of rotated rows as those y of rows before their rotation, times scale. */
INLINE void turn_back(const float *x, const float *cosine, const float *sine, float scale, bf16 *y,
                      int64_t wide, int n, int C) {
    for (int t = 0; t < n; t++, x += C, y += wide)
        for (int c = 0; c < C; c += 16) {
            __m512 own = _mm512_loadu_ps(x + c);
            if (cosine) {
                const int other = c < C / 2 ? c + C / 2 : c - C / 2;
                own = _mm512_mul_ps(own, _mm512_loadu_ps(cosine + (int64_t)t * C + c));
                own = _mm512_fmadd_ps(_mm512_loadu_ps(x + other),
                                      _mm512_loadu_ps(sine + (int64_t)t * C + other), own);
            }
            narrow(y + c, _mm512_mul_ps(own, _mm512_set1_ps(scale)));
        }
}

/* What a head needs of its queries: packed both ways, and the sum of each row's grad_out times out. */
INLINE void prepare_queries(const Attention *a, const Room *r, int b, int h, int T, int C) {
    const int64_t wide = (a->H + 2 * a->K) * C, first = (int64_t)b * a->T;
    copy_rows(a->qkv + first * wide + h * C, wide, a->cosine, a->sine, r->q, a->T, C);
    copy_rows(a->grad_out + (first * a->H + h) * C, a->H * C, 0, 0, r->o, a->T, C);
    pair_rows(r->q, r->q_pairs, T, C);
    pair_rows(r->o, r->o_pairs, T, C);
    pair_columns(r->q, r->q_tiles, T, C);
    pair_columns(r->o, r->o_tiles, T, C);
    memcpy(r->powers, a->powers + ((int64_t)b * a->H + h) * a->T, a->T * sizeof(float));
    for (int t = 0; t < T; t++) {
        if (t >= a->T) {
            r->powers[t] = -HIDDEN, r->deltas[t] = 0; /* no share of anything */
            continue;
        }
        __m512 sum = _mm512_setzero_ps();
        const bf16 *out = a->out + ((first + t) * a->H + h) * C;
        for (int c = 0; c < C; c += 16)
            sum = _mm512_fmadd_ps(widen(out + c), widen(r->o + (int64_t)t * C + c), sum);
        r->deltas[t] = _mm512_reduce_add_ps(sum);
    }
}

INLINE void back_group(const Attention *a, Room *r, int item, int T, int C) {
    const int wide = (a->H + 2 * a->K) * C, n = a->H / a->K, b = item / a->K, g = item % a->K;
    const float scale = 1 / sqrtf(C);
    const bf16 *x = a->qkv + (int64_t)b * a->T * wide;
    bf16 *y = a->grad_qkv + (int64_t)b * a->T * wide;
    const int32_t *segments = own_segments(a, r, b, T);
    float rows[TILE * C] __attribute__((aligned(64)));
    copy_rows(x + (a->H + g) * C, wide, a->cosine, a->sine, r->k, a->T, C);
    copy_rows(x + (a->H + a->K + g) * C, wide, 0, 0, r->v, a->T, C);
    pair_rows(r->k, r->k_pairs, T, C);
    memset(r->grad_k, 0, (size_t)T * C * sizeof(float));
    memset(r->grad_v, 0, (size_t)T * C * sizeof(float));
    for (int h = g * n; h < (g + 1) * n; h++) {
        prepare_queries(a, r, b, h, T, C);
        memset(r->grad_q, 0, (size_t)T * C * sizeof(float));
        for (int k0 = 0; k0 < T; k0 += KEYS)
            for (int q0 = k0; q0 < T; q0 += TILE) {
                const int n_keys = k0 + KEYS <= q0 + TILE ? KEYS : q0 + TILE - k0;
                if (!segments || share_one(segments + k0, n_keys, segments + q0, TILE))
                    back_tile(r, k0, n_keys, q0, segments, C);
            }
        for (int q0 = 0; q0 < a->T; q0 += TILE) {
            to_rows(r->grad_q + (int64_t)q0 * C, rows, C);
            turn_back(rows, a->cosine + (int64_t)q0 * C, a->sine + (int64_t)q0 * C, scale,
                      y + (int64_t)q0 * wide + h * C, wide, a->T - q0 < TILE ? a->T - q0 : TILE, C);
        }
    }
    turn_back(r->grad_k, a->cosine, a->sine, scale, y + (a->H + g) * C, wide, a->T, C);
    turn_back(r->grad_v, 0, 0, 1, y + (a->H + a->K + g) * C, wide, a->T, C);
}

#define OF_WIDTH(C)                                                          \
    static void attend_##C(const Attention *a, Room *r, int item, int T) {   \
        attend_group(a, r, item, T, C);                                      \
    }                                                                        \
    static void back_##C(const Attention *a, Room *r, int item, int T) {     \
        back_group(a, r, item, T, C);                                        \
    }
OF_WIDTH(32)
OF_WIDTH(64)
OF_WIDTH(96)
OF_WIDTH(128)

/* Fill out and powers, or grad_qkv. C is 32, 64, 96 or 128, a constant where it counts. */
void attention_bf16(const Attention *a, int64_t is_back) {
    const int T = (a->T + TILE - 1) / TILE * TILE;
#pragma omp parallel
    {
        Room r = make_room(T, a->C);
#pragma omp for schedule(static)
        for (int item = 0; item < a->B * a->K; item++) {
            if (a->C == 32) (is_back ? back_32 : attend_32)(a, &r, item, T);
            else if (a->C == 64) (is_back ? back_64 : attend_64)(a, &r, item, T);
            else if (a->C == 96) (is_back ? back_96 : attend_96)(a, &r, item, T);
            else (is_back ? back_128 : attend_128)(a, &r, item, T);
        }
        free(r.all);
    }
}

/* 1 / (1 + e^-x) */
INLINE __m512 logistic(__m512 x) {
    const __m512 power = power_of_two(_mm512_max_ps(_mm512_set1_ps(-126),
        _mm512_min_ps(_mm512_set1_ps(126), _mm512_mul_ps(x, _mm512_set1_ps(-LOG2_E)))));
    const __m512 sum = _mm512_add_ps(_mm512_set1_ps(1), power), guess = _mm512_rcp14_ps(sum);
    return _mm512_mul_ps(guess, _mm512_fnmadd_ps(sum, guess, _mm512_set1_ps(2)));
}

#include "train_rows.h"

int has_bf16(void) { return 1; }
#else
int has_bf16(void) { return 0; }
#endif
