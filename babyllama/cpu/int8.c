/* Steps of a Llama decoder with int8 weights, for any processor; int8.py compiles it and makes what
   is passed.

   One token is bound by reading the weights, so they are int8 with one scale an output. Activations
   become 16-bit integers for each product, whose sums are exact in int32; all else is float32.
   Plain loops, but for the innermost: the compiler turns them into vector instructions. Threads
   share each part of a step. A row's numbers depend neither on the rows beside it nor on the
   threads, to the last bit. Axes as in model.py; N rows are the tokens of a step, of any sequences:
   one of each (a reply), or all of a prompt. */

#include <math.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#include <time.h>

#include "attention.h"
#include "native.h"

#ifdef _OPENMP
#include <omp.h>
#endif

/* Outputs of a matrix that are computed together, and rows of a batch: what fits the registers. */
#define WIDE 16
#ifdef __AVX512VNNI__
#define TILE 8
#else
#define TILE 4
#endif
/* Bytes of a batch that are multiplied together: what stays next to the processor. */
#define NEAR 16384

typedef struct {
    const int8_t *values; /* (n / WIDE, d / 2, WIDE, 2), where n and d are rounded up with zeros */
    const float *scales;  /* (n), likewise */
    int32_t n, d;         /* d is even, n as it is */
} Matrix;

typedef struct {
    const float *attention_norm, *ffn_norm; /* (D) */
    Matrix qkv, wo, w13, w2;
} Layer;

typedef struct {
    int32_t n_layers, n_heads, n_kv_heads, head_dim, hidden_dim, max_seq_len;
    float eps;
    const float *rope; /* (2, max_seq_len, C): cosines and signed sines */
    const Layer *layers;
    const float *norm; /* (D) */
    Matrix head;
} Model;

typedef struct {
    int32_t n_rows, n_logits, n_sequences, size, is_half; /* is_half: the cache is float16 */
    const int32_t *sequences, *columns; /* (N): where a row's keys and values belong */
    const int64_t *start;               /* (sequences): first column that is no padding */
    float *x;                           /* (N, D): embeddings; overwritten */
    void *cache;                        /* (n_layers, 2, sequences, K, size, C) */
    float *a, *b;                       /* room for (N, 2 F) or (N, (H + 2K) C), what is more */
    float *scores;                      /* room for (threads, size) */
    int16_t *q;                         /* room for (N, D or F), made even */
    float *units;                       /* room for (N) */
    float *logits;                      /* (n_logits, V), of the last rows */
} Rows;

/* A part of a step, of which threads take a few items at a time: how many were taken, and done. */
typedef struct {
    atomic_int taken, done;
} Part;

/* A thread of the team, and the part that it is at. */
typedef struct {
    int32_t number, n_threads;
    Part *part;
} Team;

#define PARTS_OF_A_LAYER 10

/* Take items i to end of n; returns 0 when all are taken. A thread that has no processor holds up
   the others only where it has taken something, for they do the rest. */
static int take(const Team *t, int n, int most, int *i, int *end) {
    const int share = (n + 4 * t->n_threads - 1) / (4 * t->n_threads);
    const int size = share < most ? share : most;
    *i = n ? atomic_fetch_add_explicit(&t->part->taken, size, memory_order_relaxed) : 0;
    *end = *i + size < n ? *i + size : n;
    return *i < n;
}

static void done(const Team *t, int n_items) {
    atomic_fetch_add_explicit(&t->part->done, n_items, memory_order_release);
}

/* Go on to the next part when all n items of this one are done. It takes microseconds, so a thread
   spins, but not for ever: another program may have the processor that the last item needs. */
static void next_part(Team *t, int n) {
    for (int i = 0; atomic_load_explicit(&t->part->done, memory_order_acquire) < n; i++) {
        const struct timespec pause = {0, 20000};
        if (i > 4000) nanosleep(&pause, 0);
        else if (i > 2000) sched_yield();
    }
    t->part++;
}

/* for (SHARE(i, end, n, most)): this thread's items, as long as there are any. */
#define SHARE(i, end, n, most) \
    int i, end;                \
    take(t, n, most, &i, &end);\
    done(t, end - i)
#define MANY 32

/* x (d) as integers q (d, made even with a zero) in a unit, which is returned; NaN, and so is all that
   comes of it, if a number is not finite. The compiler was told that there are none: look at bits. */
static float to_integers(const float *x, int16_t *q, int d) {
    const float most = fminf(32767, 2147483647.0f / 128 / d); /* no sum of d can overflow */
    float largest = 1e-30f;
    uint32_t highest = 0;
#pragma omp simd reduction(max : largest, highest)
    for (int i = 0; i < d; i++) {
        uint32_t bits;
        memcpy(&bits, x + i, sizeof bits);
        bits &= 0x7fffffff;
        highest = bits > highest ? bits : highest;
        largest = fmaxf(largest, fabsf(x[i]));
    }
    const float scale = most / largest;
    for (int i = 0; i < d; i++) q[i] = (int16_t)(int32_t)rintf(x[i] * scale);
    if (d % 2) q[d] = 0;
    float unit = largest / most;
    const uint32_t nan = 0x7fc00000;
    if (highest >= 0x7f800000) memcpy(&unit, &nan, sizeof unit);
    return unit;
}

/* Put sums (WIDE) where y points, or add them there, but for what is beyond the matrix. */
static inline void store(const int32_t *sums, const float *scales, float unit, float *y, int n,
                         int is_sum) {
    float found[WIDE] = {0};
    if (is_sum) memcpy(found, y, n * sizeof *y);
    for (int i = 0; i < WIDE; i++) found[i] += sums[i] * (scales[i] * unit);
    memcpy(y, found, n * sizeof *y);
}

/* sums (B, WIDE) of WIDE outputs, times B rows of q (d). B is a constant where it is called. */
static inline __attribute__((always_inline)) void multiply_tile(
    const int8_t *w, const int16_t *q, int d, int B, int32_t sums[TILE][WIDE]) {
#ifdef __AVX512VNNI__
    if (B == TILE) { /* fewer wait for their own sums */
        __m512i all[TILE];
#pragma GCC unroll 8
        for (int b = 0; b < TILE; b++) all[b] = _mm512_setzero_si512();
        for (int i = 0; i < d; i += 2, w += 2 * WIDE) {
            const __m512i own = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)w));
#pragma GCC unroll 8
            for (int b = 0; b < TILE; b++) {
                int32_t pair;
                memcpy(&pair, q + b * d + i, sizeof pair);
                all[b] = _mm512_dpwssd_epi32(all[b], own, _mm512_set1_epi32(pair));
            }
        }
#pragma GCC unroll 8
        for (int b = 0; b < TILE; b++) _mm512_storeu_si512(sums[b], all[b]);
        return;
    }
#endif
#ifdef HAS_AVX2
    __m256i low[TILE], high[TILE];
    for (int b = 0; b < B; b++) low[b] = high[b] = _mm256_setzero_si256();
    for (int i = 0; i < d; i += 2, w += 2 * WIDE) {
        const __m256i w_low = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)w));
        const __m256i w_high = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(w + WIDE)));
#pragma GCC unroll 4
        for (int b = 0; b < B; b++) {
            int32_t pair;
            memcpy(&pair, q + b * d + i, sizeof pair);
            const __m256i both = _mm256_set1_epi32(pair);
            low[b] = _mm256_add_epi32(low[b], _mm256_madd_epi16(w_low, both));
            high[b] = _mm256_add_epi32(high[b], _mm256_madd_epi16(w_high, both));
        }
    }
    for (int b = 0; b < B; b++) {
        _mm256_storeu_si256((__m256i *)sums[b], low[b]);
        _mm256_storeu_si256((__m256i *)(sums[b] + WIDE / 2), high[b]);
    }
#else
    memset(sums, 0, B * sizeof *sums);
    for (int i = 0; i < d; i += 2, w += 2 * WIDE)
        for (int b = 0; b < B; b++) {
            const int32_t first = q[b * d + i], second = q[b * d + i + 1];
            for (int j = 0; j < WIDE; j++)
                sums[b][j] += w[2 * j] * first + w[2 * j + 1] * second;
        }
#endif
}

/* y (N, n) = or += q (N, d) in its units, times the matrix. */
static void multiply(Team *t, const Matrix *m, const int16_t *q, const float *units, float *y,
                     int N, int is_sum) {
    const int n = m->n, d = m->d, n_tiles = N ? (n + WIDE - 1) / WIDE : 0;
    const int n_near = NEAR / (2 * d) < TILE ? TILE : NEAR / (2 * d) / TILE * TILE;
    for (SHARE(tile, end, n_tiles, MANY))
        for (int near = 0; near < N; near += n_near)
            for (int r = tile * WIDE; r < end * WIDE; r += WIDE)
                for (int b = near, B; b < near + n_near && b < N; b += B) {
                    const int8_t *w = m->values + (int64_t)r * d;
                    int32_t sums[TILE][WIDE];
                    B = N - b < 4 ? 1 : N - b < TILE ? 4 : TILE;
                    if (B == 1) multiply_tile(w, q + (int64_t)b * d, d, 1, sums);
                    else if (B < TILE) multiply_tile(w, q + (int64_t)b * d, d, 4, sums);
                    else multiply_tile(w, q + (int64_t)b * d, d, TILE, sums);
                    for (int i = 0; i < B; i++) {
                        float *out = y + (int64_t)(b + i) * n + r;
                        const float *scales = m->scales + r, unit = units[b + i];
                        if (n - r >= WIDE) store(sums[i], scales, unit, out, WIDE, is_sum);
                        else store(sums[i], scales, unit, out, n - r, is_sum);
                    }
                }
    next_part(t, n_tiles);
}

/* RMSNorm of x (D). */
static void normalise(const float *x, const float *weight, float *y, int D, float eps) {
    float squares = 0;
#pragma omp simd reduction(+ : squares)
    for (int i = 0; i < D; i++) squares += x[i] * x[i];
    const float scale = 1 / sqrtf(squares / D + eps);
    for (int i = 0; i < D; i++) y[i] = x[i] * scale * weight[i];
}

/* Turn each pair (c, c + C/2) of one head by its position's angle. */
static void rotate(float *x, const float *cosine, const float *sine, int C) {
    for (int c = 0; c < C / 2; c++) {
        const float a = x[c], b = x[c + C / 2];
        x[c] = a * cosine[c] + b * sine[c];
        x[c + C / 2] = b * cosine[c + C / 2] + a * sine[c + C / 2];
    }
}

/* Whether keys and values may be float16 here. */
int has_half(void) {
#ifdef __FLT16_MAX__
    return 1;
#else
    return 0;
#endif
}

/* Where keys of a sequence's head g begin in the cache, in numbers; values are half a layer on. */
static int64_t place_of(const Model *m, const Rows *rows, int layer, int sequence, int g) {
    const int64_t size = (int64_t)rows->size * m->head_dim, K = m->n_kv_heads;
    return ((2 * layer * rows->n_sequences + sequence) * K + g) * size;
}

static int64_t half_of_layer(const Model *m, const Rows *rows) {
    return (int64_t)rows->n_sequences * m->n_kv_heads * rows->size * m->head_dim;
}

/* Rotate q and k of a row of qkv (H + 2K, C), and store its k and v in their column. */
static void place(const Model *m, const Rows *rows, int layer, int row) {
    const int H = m->n_heads, K = m->n_kv_heads, C = m->head_dim;
    const int sequence = rows->sequences[row], column = rows->columns[row];
    const float *cosine = m->rope + (column - rows->start[sequence]) * C;
    const float *sine = cosine + (int64_t)m->max_seq_len * C;
    float *own = rows->b + (int64_t)row * (H + 2 * K) * C;
    for (int h = 0; h < H + K; h++) rotate(own + h * C, cosine, sine, C);
    for (int g = 0; g < K; g++) {
        const int64_t at = place_of(m, rows, layer, sequence, g) + (int64_t)column * C;
        keep(own + (H + g) * C, rows->cache, at, C, rows->is_half);
        keep(own + (H + K + g) * C, rows->cache, at + half_of_layer(m, rows), C, rows->is_half);
    }
}

/* What a head of a row sees: from qkv (H + 2K, C) of b to (H, C) of a. */
static void look(const Model *m, const Rows *rows, int layer, int row, int h, float *room) {
    const int H = m->n_heads, K = m->n_kv_heads, C = m->head_dim, sequence = rows->sequences[row];
    const int first = (int)rows->start[sequence], S = rows->columns[row] - first + 1;
    const int64_t k = place_of(m, rows, layer, sequence, h / (H / K)) + (int64_t)first * C;
    const int64_t v = k + half_of_layer(m, rows);
    const float *q = rows->b + ((int64_t)row * (H + 2 * K) + h) * C;
    float *out = rows->a + ((int64_t)row * H + h) * C;
    const int16_t *halves = rows->cache;
    const float *whole = rows->cache;
    /* After a head of a sequence comes that of the next, unless a prompt's rows share them. */
    const int64_t ahead = rows->n_rows > rows->n_sequences ? 0 : (int64_t)K * rows->size * C;
    if (rows->is_half) attend(q, halves + k, halves + v, out, room, S, C, ahead, 1);
    else attend(q, whole + k, whole + v, out, room, S, C, ahead, 0);
}

/* The gate, from w1 and w3 (2 F) to (F). */
static void gate(const float *x, float *y, int F) {
    for (int i = 0; i < F; i++) y[i] = x[i] / (1 + power_of_e(-x[i])) * x[F + i];
}

/* The rows x (N, D), normed, as integers. */
static void prepare(Team *t, const Model *m, const float *x, const float *weight, const Rows *rows,
                    int N) {
    const int D = m->n_heads * m->head_dim;
    for (SHARE(i, end, N, MANY))
        for (int row = i; row < end; row++) {
            float *y = rows->a + (int64_t)row * D;
            if (weight) normalise(x + (int64_t)row * D, weight, y, D, m->eps);
            rows->units[row] = to_integers(y, rows->q + (int64_t)row * D, D);
        }
    next_part(t, N);
}

/* What one thread does. */
static void step_of(const Model *m, const Rows *rows, Team *t) {
    const int D = m->n_heads * m->head_dim, F = m->hidden_dim, H = m->n_heads, N = rows->n_rows;
    float *x = rows->x, *a = rows->a, *b = rows->b, *units = rows->units;
    float *scores = rows->scores + (int64_t)t->number * rows->size;
    int16_t *q = rows->q;
    for (int l = 0; l < m->n_layers; l++) {
        const Layer *layer = m->layers + l;
        prepare(t, m, x, layer->attention_norm, rows, N);
        multiply(t, &layer->qkv, q, units, b, N, 0);
        for (SHARE(i, end, N, MANY))
            for (int row = i; row < end; row++) place(m, rows, l, row);
        next_part(t, N);
        for (SHARE(i, end, N * H, MANY))
            for (int j = i; j < end; j++) look(m, rows, l, j % N, j / N, scores);
        next_part(t, N * H);
        prepare(t, m, x, 0, rows, N);
        multiply(t, &layer->wo, q, units, x, N, 1);
        prepare(t, m, x, layer->ffn_norm, rows, N);
        multiply(t, &layer->w13, q, units, b, N, 0);
        for (SHARE(i, end, N, MANY))
            for (int row = i; row < end; row++) {
                float *y = a + (int64_t)row * F;
                gate(b + (int64_t)row * 2 * F, y, F);
                units[row] = to_integers(y, q + (int64_t)row * layer->w2.d, F);
            }
        next_part(t, N);
        multiply(t, &layer->w2, q, units, x, N, 1);
    }
    const int n_logits = rows->n_logits;
    prepare(t, m, x + (int64_t)(N - n_logits) * D, m->norm, rows, n_logits);
    multiply(t, &m->head, q, units, rows->logits, n_logits, 0);
}

/* Write the keys and values of all rows to the cache, and the logits of the last. */
void step(const Model *m, const Rows *rows, int n_threads) {
    Part parts[PARTS_OF_A_LAYER * m->n_layers + 2];
    memset(parts, 0, sizeof parts);
#ifdef _OPENMP
#pragma omp parallel num_threads(n_threads)
    {
        Team team = {omp_get_thread_num(), omp_get_num_threads(), parts};
        step_of(m, rows, &team);
    }
#else
    Team alone = {0, 1, parts};
    step_of(m, rows, &alone);
    (void)n_threads;
#endif
}
