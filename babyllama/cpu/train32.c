/* Training steps in float32, for processors with AVX2 or AVX-512: as train.c, whose comments explain
   the tiles and the axes. Every small product is a few rows of numbers, each broadcast, times two
   registers. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>

#define INLINE static inline __attribute__((always_inline))
#define TILE 32 /* queries of a tile of scores */
#define KEYS 32 /* its keys */
#define HIDDEN -1e30f
#define LOWEST -1e20f
#define LOG2_E 1.44269504f
#define CHUNKS 16
#define NUMBER float
#define NAME(f) f##_f32

#ifdef __AVX512F__
#define WIDE 16 /* numbers of a register */
#define ROWS 8  /* rows of a small product */
typedef __m512 V;
#define larger _mm512_max_ps
#define smaller _mm512_min_ps
#define all _mm512_set1_ps
#else
#define WIDE 8
#define ROWS 4
typedef __m256 V;
#define larger _mm256_max_ps
#define smaller _mm256_min_ps
#define all _mm256_set1_ps
#endif
typedef int32_t VI __attribute__((vector_size(WIDE * 4)));
#define PAIR (2 * WIDE) /* columns of a small product */

INLINE V load(const float *x) {
    V y;
    memcpy(&y, x, sizeof y);
    return y;
}

INLINE void store(float *y, V x) { memcpy(y, &x, sizeof x); }

INLINE V widen(const float *x) { return load(x); }
INLINE void narrow(float *y, V x) { store(y, x); }
INLINE float number(float x) { return x; }
INLINE float rounded(float x) { return x; }

INLINE float sum_of(V x) {
    float y[WIDE];
    store(y, x);
    for (int n = WIDE / 2; n; n /= 2)
        for (int i = 0; i < n; i++) y[i] += y[i + n];
    return y[0];
}

INLINE float most_of(V x) {
    float y[WIDE];
    store(y, x);
    for (int i = 1; i < WIDE; i++) y[0] = fmaxf(y[0], y[i]);
    return y[0];
}

/* 2 to the power of x, at most 126, to float32's rounding: by its series. 0 below -126.5. */
INLINE V power_of_two(V x) {
    const V magic = all(12582912.0f), clipped = larger(all(-127), x); /* a NaN stays one */
    const V whole = (clipped + magic) - magic, rest = clipped - whole;
    V y = all(1.5403530e-4f) * rest + all(1.3333558e-3f);
    y = y * rest + all(9.6181291e-3f);
    y = y * rest + all(5.5504109e-2f);
    y = y * rest + all(2.4022651e-1f);
    y = y * rest + all(6.9314718e-1f);
    y = y * rest + all(1);
    return y * (V)((__builtin_convertvector(whole, VI) + 127) << 23);
}

/* 1 / (1 + e^-x) */
INLINE V logistic(V x) {
    return all(1) / (all(1) + power_of_two(smaller(all(126), x * all(-LOG2_E))));
}

#include "train_rows.h"

typedef struct {
    int32_t B, T, H, K, C;
    const float *qkv, *cosine, *sine;
    const int32_t *segments;
    float *out, *powers;
    const float *grad_out;
    float *grad_qkv;
} Attention;

/* y (n_rows, n_columns), rows `wide_y` apart, += a b: a (n_rows, n), `row` and `step` numbers apart,
   b (n, n_columns), rows `wide` apart; or = where is_first. Multiples of ROWS and of PAIR. */
INLINE void product(float *y, int64_t wide_y, const float *a, int64_t row, int64_t step,
                    const float *b, int64_t wide, int n_rows, int n, int n_columns, int is_first) {
    for (int i = 0; i < n_rows; i += ROWS)
        for (int c = 0; c < n_columns; c += PAIR) {
            const float *left = a + i * row, *right = b + c;
            float *to = y + i * wide_y + c;
            V sums[ROWS][2];
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++) {
                sums[r][0] = is_first ? all(0) : load(to + r * wide_y);
                sums[r][1] = is_first ? all(0) : load(to + r * wide_y + WIDE);
            }
            for (int k = 0; k < n; k++, left += step, right += wide) {
                const V b0 = load(right), b1 = load(right + WIDE);
#pragma GCC unroll 8
                for (int r = 0; r < ROWS; r++) {
                    const V own = all(left[r * row]);
                    sums[r][0] = own * b0 + sums[r][0];
                    sums[r][1] = own * b1 + sums[r][1];
                }
            }
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++) {
                store(to + r * wide_y, sums[r][0]);
                store(to + r * wide_y + WIDE, sums[r][1]);
            }
        }
}

/* Rows of one head, x (T, C) of rows `wide` apart, as y (T, C), rotated where there are cosines; zeros
   up to a multiple of TILE. */
INLINE void copy_rows(const float *x, int64_t wide, const float *cosine, const float *sine, float *y,
                      int T, int C) {
    for (int t = 0; t < T; t++, x += wide, y += C)
        for (int c = 0; c < C; c += WIDE) {
            const int64_t other = c < C / 2 ? c + C / 2 : c - C / 2, at = (int64_t)t * C + c;
            V own = load(x + c);
            if (cosine) own = own * load(cosine + at) + load(x + other) * load(sine + at);
            store(y + c, own);
        }
    memset(y, 0, (size_t)(-T & (TILE - 1)) * C * sizeof *y);
}

/* Rows x (T, C) as tiles of columns (T / TILE, C, TILE). */
INLINE void to_columns(const float *x, float *y, int T, int C) {
    for (int t = 0; t < T; t += TILE, x += TILE * C, y += TILE * C)
        for (int c = 0; c < C; c++)
            for (int i = 0; i < TILE; i++) y[c * TILE + i] = x[i * C + c];
}

/* Gradients x (n, C) of rotated rows as those y of rows before their rotation, times scale. */
INLINE void turn_back(const float *x, const float *cosine, const float *sine, float scale, float *y,
                      int64_t wide, int n, int C) {
    for (int t = 0; t < n; t++, x += C, y += wide)
        for (int c = 0; c < C; c += WIDE) {
            const int64_t other = c < C / 2 ? c + C / 2 : c - C / 2, at = (int64_t)t * C;
            V own = load(x + c);
            if (cosine) own = own * load(cosine + at + c) + load(x + other) * load(sine + at + other);
            store(y + c, own * all(scale));
        }
}

/* Whether tokens of two tiles may belong to one document. */
INLINE int share_one(const int32_t *a, const int32_t *b) {
    int32_t low_a = a[0], high_a = a[0], low_b = b[0], high_b = b[0];
    for (int i = 1; i < TILE; i++) {
        low_a = a[i] < low_a ? a[i] : low_a, high_a = a[i] > high_a ? a[i] : high_a;
        low_b = b[i] < low_b ? b[i] : low_b, high_b = b[i] > high_b ? b[i] : high_b;
    }
    return low_a <= high_b && low_b <= high_a;
}

/* scores (KEYS, TILE) of keys from k0 on and queries from q0 on, HIDDEN where not seen. */
INLINE void compare(const float *k, const float *q_tiles, float *scores, int k0, int q0,
                    const int32_t *segments, int C) {
    product(scores, TILE, k + (int64_t)k0 * C, C, 1, q_tiles + (int64_t)q0 * C, TILE, KEYS, C, TILE,
            1);
    if (!segments && k0 < q0) return;
    VI count;
    for (int i = 0; i < WIDE; i++) count[i] = i;
    for (int j = 0; j < KEYS; j++)
        for (int g = 0; g < TILE; g += WIDE) {
            VI seen = count + (q0 + g) >= (VI){} + (k0 + j), theirs;
            if (segments) {
                memcpy(&theirs, segments + q0 + g, sizeof theirs);
                seen &= theirs == (VI){} + segments[k0 + j];
            }
            float *at = scores + j * TILE + g;
            store(at, (V)(((VI)load(at) & seen) | ((VI)all(HIDDEN) & ~seen)));
        }
}

/* Room for one head. */
typedef struct {
    float *k, *v, *q, *o;                    /* rows (T, C) */
    float *q_tiles, *o_tiles;                /* columns (T / TILE, C, TILE) */
    float *grad_q, *grad_k, *grad_v;         /* (T, C) */
    float *powers, *deltas;                  /* (T) */
    int32_t *segments;                       /* (T) */
    void *all_of_it;
} Room;

static Room make_room(int T, int C) {
    const size_t n = (size_t)T * C;
    float *at = aligned_alloc(64, ((9 * n + 3 * T) * sizeof *at + 4095) / 4096 * 4096);
    Room r = {.all_of_it = at};
    float **parts[] = {&r.k,       &r.v,      &r.q,      &r.o,     &r.q_tiles,
                       &r.o_tiles, &r.grad_q, &r.grad_k, &r.grad_v};
    for (int i = 0; i < 9; i++, at += n) *parts[i] = at;
    r.powers = at, r.deltas = at + T, r.segments = (int32_t *)(at + 2 * T);
    return r;
}

/* What a tile of queries sees: the values, mixed. */
INLINE void attend_tile(const Attention *a, const Room *r, int b, int h, int q0,
                        const int32_t *segments, int C) {
    const V scale = all(LOG2_E / sqrtf(C));
    float scores[KEYS * TILE] __attribute__((aligned(64)));
    float mixed[TILE * C] __attribute__((aligned(64)));
    float shrink[TILE], largest[TILE], total[TILE];
    for (int i = 0; i < TILE; i++) largest[i] = LOWEST, total[i] = 0;
    memset(mixed, 0, sizeof mixed);
    for (int k0 = 0; k0 <= q0; k0 += KEYS) {
        if (segments && !share_one(segments + k0, segments + q0)) continue;
        compare(r->k, r->q_tiles, scores, k0, q0, segments, C);
        for (int g = 0; g < TILE; g += WIDE) {
            V highest = load(scores + g);
            for (int j = 1; j < KEYS; j++) highest = larger(highest, load(scores + j * TILE + g));
            const V before = load(largest + g), now = larger(before, highest * scale);
            const V less = power_of_two(before - now);
            V sum = load(total + g) * less;
            for (int j = 0; j < KEYS; j++) {
                const V p = power_of_two(load(scores + j * TILE + g) * scale - now);
                store(scores + j * TILE + g, p);
                sum = sum + p;
            }
            store(largest + g, now), store(total + g, sum), store(shrink + g, less);
        }
        for (int i = 0; i < TILE; i++)
            for (int c = 0; c < C; c += WIDE)
                store(mixed + i * C + c, load(mixed + i * C + c) * all(shrink[i]));
        product(mixed, C, scores, 1, TILE, r->v + (int64_t)k0 * C, C, TILE, KEYS, C, 0);
    }
    for (int i = 0; i < TILE && q0 + i < a->T; i++) {
        float *out = a->out + (((int64_t)b * a->T + q0 + i) * a->H + h) * C;
        for (int c = 0; c < C; c += WIDE)
            store(out + c, load(mixed + i * C + c) * all(1 / total[i]));
        a->powers[((int64_t)b * a->H + h) * a->T + q0 + i] = largest[i] + log2f(total[i]);
    }
}

/* Gradients of one tile of scores. */
INLINE void back_tile(const Room *r, int k0, int q0, const int32_t *segments, int C) {
    const V scale = all(LOG2_E / sqrtf(C));
    const int64_t keys = (int64_t)k0 * C, queries = (int64_t)q0 * C;
    float shares[KEYS * TILE] __attribute__((aligned(64)));
    float errors[KEYS * TILE] __attribute__((aligned(64)));
    compare(r->k, r->q_tiles, shares, k0, q0, segments, C);
    product(errors, TILE, r->v + keys, C, 1, r->o_tiles + queries, TILE, KEYS, C, TILE, 1);
    for (int g = 0; g < TILE; g += WIDE) {
        const V power = load(r->powers + q0 + g), delta = load(r->deltas + q0 + g);
        for (int at = g; at < KEYS * TILE; at += TILE) {
            const V p = power_of_two(load(shares + at) * scale - power);
            store(shares + at, p);
            store(errors + at, p * (load(errors + at) - delta));
        }
    }
    product(r->grad_v + keys, C, shares, TILE, 1, r->o + queries, C, KEYS, TILE, C, 0);
    product(r->grad_k + keys, C, errors, TILE, 1, r->q + queries, C, KEYS, TILE, C, 0);
    product(r->grad_q + queries, C, errors, 1, TILE, r->k + keys, C, TILE, KEYS, C, 0);
}

/* What the gradients of a head need of its queries. */
INLINE void prepare_queries(const Attention *a, const Room *r, int b, int h, int T, int C) {
    const int64_t first = (int64_t)b * a->T;
    copy_rows(a->grad_out + (first * a->H + h) * C, a->H * C, 0, 0, r->o, a->T, C);
    to_columns(r->o, r->o_tiles, T, C);
    memcpy(r->powers, a->powers + ((int64_t)b * a->H + h) * a->T, a->T * sizeof(float));
    for (int t = 0; t < a->T; t++) {
        V sum = all(0);
        for (int c = 0; c < C; c += WIDE)
            sum = load(a->out + ((first + t) * a->H + h) * C + c) * load(r->o + (int64_t)t * C + c) +
                  sum;
        r->deltas[t] = sum_of(sum);
    }
    for (int t = a->T; t < T; t++) r->powers[t] = -HIDDEN, r->deltas[t] = 0; /* no share of anything */
    memset(r->grad_q, 0, (size_t)T * C * sizeof(float));
}

/* The heads of one group of queries, of one sequence. */
INLINE void do_group(const Attention *a, Room *r, int item, int T, int C, int is_back) {
    const int wide = (a->H + 2 * a->K) * C, n = a->H / a->K, b = item / a->K, g = item % a->K;
    const int64_t first = (int64_t)b * a->T * wide;
    const float *x = a->qkv + first, scale = 1 / sqrtf(C);
    float *y = a->grad_qkv + first;
    const int32_t *segments = a->segments ? r->segments : 0;
    if (segments) memcpy(r->segments, a->segments + (int64_t)b * a->T, a->T * sizeof(int32_t));
    for (int t = a->T; t < T; t++) r->segments[t] = INT32_MIN;
    copy_rows(x + (a->H + g) * C, wide, a->cosine, a->sine, r->k, a->T, C);
    copy_rows(x + (a->H + a->K + g) * C, wide, 0, 0, r->v, a->T, C);
    if (is_back) memset(r->grad_k, 0, 2 * (size_t)T * C * sizeof(float)); /* and grad_v */
    for (int h = g * n; h < (g + 1) * n; h++) {
        copy_rows(x + h * C, wide, a->cosine, a->sine, r->q, a->T, C);
        to_columns(r->q, r->q_tiles, T, C);
        if (!is_back) {
            for (int q0 = 0; q0 < T; q0 += TILE) attend_tile(a, r, b, h, q0, segments, C);
            continue;
        }
        prepare_queries(a, r, b, h, T, C);
        for (int k0 = 0; k0 < T; k0 += KEYS)
            for (int q0 = k0; q0 < T; q0 += TILE)
                if (!segments || share_one(segments + k0, segments + q0))
                    back_tile(r, k0, q0, segments, C);
        turn_back(r->grad_q, a->cosine, a->sine, scale, y + h * C, wide, a->T, C);
    }
    if (!is_back) return;
    turn_back(r->grad_k, a->cosine, a->sine, scale, y + (a->H + g) * C, wide, a->T, C);
    turn_back(r->grad_v, 0, 0, 1, y + (a->H + a->K + g) * C, wide, a->T, C);
}

#define OF_WIDTH(C)                                                        \
    static void attend_##C(const Attention *a, Room *r, int item, int T) { \
        do_group(a, r, item, T, C, 0);                                     \
    }                                                                      \
    static void back_##C(const Attention *a, Room *r, int item, int T) {   \
        do_group(a, r, item, T, C, 1);                                     \
    }
OF_WIDTH(32)
OF_WIDTH(64)
OF_WIDTH(96)
OF_WIDTH(128)

/* Fill out and powers, or grad_qkv. C is 32, 64, 96 or 128, a constant where it counts. */
void attention_f32(const Attention *a, int64_t is_back) {
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
        free(r.all_of_it);
    }
}

int has_f32(void) { return 1; }
#else
int has_f32(void) { return 0; }
#endif
