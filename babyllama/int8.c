/* Steps of a Llama decoder with int8 weights, for any processor; int8.py compiles it and makes what
   is passed.

   One token is bound by reading the weights, so they are int8 with one scale an output. Activations
   become 16-bit integers for each product, whose sums are exact in int32; all else is float32.
   Plain loops: the compiler turns them into vector instructions. A row's numbers depend neither on
   the rows beside it nor on the threads, to the last bit. The threads of a step do their
   share of each part of it and wait for the others. Axes as in model.py; N rows are the tokens of a
   step, of any sequences: one of each (a reply), or all of a prompt. */

#include <math.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#include "native.h"

#ifdef __AVX2__
#include <immintrin.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

/* Outputs of a matrix that are computed together, and rows of a batch: what fits 16 registers. */
#define WIDE 16
#define TILE 4
/* Bytes of a batch that are multiplied together: what stays next to the processor. */
#define NEAR 16384
/* Numbers of a head that are kept in registers. */
#define BLOCK 32

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
    int32_t n_rows, n_logits, n_sequences, size;
    const int32_t *sequences, *columns; /* (N): where a row's keys and values belong */
    const int64_t *start;               /* (sequences): first column that is no filler */
    float *x;                           /* (N, D): embeddings; overwritten */
    float *cache;                       /* (n_layers, 2, sequences, K, size, C) */
    float *a, *b;                       /* room for (N, 2 F) or (N, (H + 2K) C), whichever is more */
    float *scores;                      /* room for (threads, size) */
    int16_t *q;                         /* room for (N, D or F), made even */
    float *units;                       /* room for (N) */
    float *logits;                      /* (n_logits, V), of the last rows */
} Rows;

typedef struct {
    atomic_int n_waiting, n_times;
} Barrier;

typedef struct {
    int32_t number, n_threads;
    Barrier *barrier;
} Team;

/* Wait for all threads. They spin, for a part takes microseconds, but not for ever: another
   program may have the processor that the last one needs. */
static void wait_for_all(const Team *t) {
    if (t->n_threads == 1) return;
    const int before = atomic_load(&t->barrier->n_times);
    if (atomic_fetch_add(&t->barrier->n_waiting, 1) == t->n_threads - 1) {
        atomic_store(&t->barrier->n_waiting, 0);
        atomic_fetch_add(&t->barrier->n_times, 1);
        return;
    }
    for (int i = 0; atomic_load_explicit(&t->barrier->n_times, memory_order_acquire) == before; i++)
        if (i > 2000) sched_yield();
}

/* The first of a thread's share of n, in groups; its last is before the next thread's first. */
static int first_of(const Team *t, int n, int group, int number) {
    const int n_groups = (n + group - 1) / group;
    const int first = (int)((int64_t)n_groups * number / t->n_threads) * group;
    return first < n ? first : n;
}
#define MINE(i, n)                                                                              \
    int i = first_of(t, n, TILE, t->number), end_##i = first_of(t, n, TILE, t->number + 1);      \
    i < end_##i;                                                                                \
    i++

/* x (d) as integers q (d, made even with a zero) in a unit, which is returned. */
static float to_integers(const float *x, int16_t *q, int d) {
    const float most = fminf(32767, 2147483647.0f / 128 / d); /* no sum of d can overflow */
    float largest = 1e-30f;
#pragma omp simd reduction(max : largest)
    for (int i = 0; i < d; i++) largest = fmaxf(largest, fabsf(x[i]));
    const float scale = most / largest;
    for (int i = 0; i < d; i++) q[i] = (int16_t)(int32_t)rintf(x[i] * scale);
    if (d % 2) q[d] = 0;
    return largest / most;
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
#ifdef __AVX2__
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
static void multiply(const Team *t, const Matrix *m, const int16_t *q, const float *units, float *y,
                     int N, int is_sum) {
    const int n = m->n, d = m->d, first = first_of(t, n, WIDE, t->number);
    const int last = first_of(t, n, WIDE, t->number + 1);
    const int n_near = NEAR / (2 * d) < TILE ? TILE : NEAR / (2 * d) / TILE * TILE;
    for (int near = 0; near < N; near += n_near) {
        const int end = near + n_near < N ? near + n_near : N;
        for (int r = first; r < last; r += WIDE)
            for (int b = near, B; b < end; b += B) {
                int32_t sums[TILE][WIDE];
                B = end - b < TILE ? 1 : TILE;
                if (B == 1) multiply_tile(m->values + (int64_t)r * d, q + (int64_t)b * d, d, 1, sums);
                else multiply_tile(m->values + (int64_t)r * d, q + (int64_t)b * d, d, TILE, sums);
                for (int i = 0; i < B; i++) {
                    float *out = y + (int64_t)(b + i) * n + r;
                    if (n - r >= WIDE) store(sums[i], m->scales + r, units[b + i], out, WIDE, is_sum);
                    else store(sums[i], m->scales + r, units[b + i], out, n - r, is_sum);
                }
            }
    }
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

/* scores (S) += k (S, C) times q, of `width` numbers of the head. */
static inline __attribute__((always_inline)) void add_scores(
    const float *q, const float *k, float *scores, int S, int C, int width) {
    for (int s = 0; s < S; s++) {
        float dot = 0;
#pragma omp simd reduction(+ : dot)
        for (int c = 0; c < width; c++) dot += q[c] * k[(int64_t)s * C + c];
        scores[s] += dot;
    }
}

/* out = shares (S) times v (S, C), of `width` numbers of the head. */
static inline __attribute__((always_inline)) void mix(
    const float *shares, const float *v, float *out, int S, int C, int width) {
    float sums[BLOCK] = {0};
    for (int s = 0; s < S; s++)
        for (int c = 0; c < width; c++) sums[c] += shares[s] * v[(int64_t)s * C + c];
    memcpy(out, sums, width * sizeof(float));
}

/* One head's mixture of the values seen: k, v (S, C); scores is room for S numbers. */
static void attend(const float *q, const float *k, const float *v, float *out, float *scores,
                   int S, int C) {
    float largest = -INFINITY, total = 0;
    const float scale = 1 / sqrtf(C);
    const int whole = C / BLOCK * BLOCK, rest = C - whole;
    memset(scores, 0, S * sizeof(float));
    for (int c = 0; c < whole; c += BLOCK) add_scores(q + c, k + c, scores, S, C, BLOCK);
    if (rest) add_scores(q + whole, k + whole, scores, S, C, rest);
#pragma omp simd reduction(max : largest)
    for (int s = 0; s < S; s++) largest = fmaxf(largest, scores[s]);
#pragma omp simd reduction(+ : total)
    for (int s = 0; s < S; s++) total += scores[s] = power_of_e((scores[s] - largest) * scale);
    for (int c = 0; c < whole; c += BLOCK) mix(scores, v + c, out + c, S, C, BLOCK);
    if (rest) mix(scores, v + whole, out + whole, S, C, rest);
    for (int c = 0; c < C; c++) out[c] /= total;
}

/* Rotate q and k of a row of qkv (H + 2K, C), and store its k and v in their column. */
static void place(const Model *m, const Rows *rows, int row, float *cache) {
    const int H = m->n_heads, K = m->n_kv_heads, C = m->head_dim, size = rows->size;
    const int sequence = rows->sequences[row], column = rows->columns[row];
    const float *cosine = m->rope + (column - rows->start[sequence]) * C;
    const float *sine = cosine + (int64_t)m->max_seq_len * C;
    float *own = rows->b + (int64_t)row * (H + 2 * K) * C;
    float *k = cache + ((int64_t)sequence * K * size + column) * C;
    float *v = k + (int64_t)rows->n_sequences * K * size * C;
    for (int h = 0; h < H + K; h++) rotate(own + h * C, cosine, sine, C);
    for (int g = 0; g < K; g++) {
        memcpy(k + (int64_t)g * size * C, own + (H + g) * C, C * sizeof(float));
        memcpy(v + (int64_t)g * size * C, own + (H + K + g) * C, C * sizeof(float));
    }
}

/* What the heads of a row see: from qkv (H + 2K, C) of b to (H, C) of a. */
static void look(const Model *m, const Rows *rows, int row, int h, const float *cache, float *room) {
    const int H = m->n_heads, K = m->n_kv_heads, C = m->head_dim, size = rows->size;
    const int sequence = rows->sequences[row], first = (int)rows->start[sequence];
    const int64_t at = (((int64_t)sequence * K + h / (H / K)) * size + first) * C;
    const float *k = cache + at, *v = k + (int64_t)rows->n_sequences * K * size * C;
    attend(rows->b + ((int64_t)row * (H + 2 * K) + h) * C, k, v,
           rows->a + ((int64_t)row * H + h) * C, room, rows->columns[row] - first + 1, C);
}

/* The gate, from w1 and w3 (2 F) to (F). */
static void gate(const float *x, float *y, int F) {
    for (int i = 0; i < F; i++) y[i] = x[i] / (1 + power_of_e(-x[i])) * x[F + i];
}

/* The share of one thread. */
static void step_of(const Model *m, const Rows *rows, const Team *t) {
    const int D = m->n_heads * m->head_dim, F = m->hidden_dim, H = m->n_heads, N = rows->n_rows;
    const int64_t layer_size = (int64_t)2 * rows->n_sequences * m->n_kv_heads * rows->size * m->head_dim;
    float *x = rows->x, *a = rows->a, *b = rows->b, *units = rows->units;
    int16_t *q = rows->q;
    for (int l = 0; l < m->n_layers; l++) {
        const Layer *layer = m->layers + l;
        float *cache = rows->cache + l * layer_size;
        for (MINE(i, N)) {
            normalise(x + (int64_t)i * D, layer->attention_norm, a + (int64_t)i * D, D, m->eps);
            units[i] = to_integers(a + (int64_t)i * D, q + (int64_t)i * D, D);
        }
        wait_for_all(t);
        multiply(t, &layer->qkv, q, units, b, N, 0);
        wait_for_all(t);
        for (MINE(i, N)) place(m, rows, i, cache);
        wait_for_all(t);
        for (MINE(i, N * H))
            look(m, rows, i % N, i / N, cache, rows->scores + (int64_t)t->number * rows->size);
        wait_for_all(t);
        for (MINE(i, N)) units[i] = to_integers(a + (int64_t)i * D, q + (int64_t)i * D, D);
        wait_for_all(t);
        multiply(t, &layer->wo, q, units, x, N, 1);
        wait_for_all(t);
        for (MINE(i, N)) {
            normalise(x + (int64_t)i * D, layer->ffn_norm, a + (int64_t)i * D, D, m->eps);
            units[i] = to_integers(a + (int64_t)i * D, q + (int64_t)i * D, D);
        }
        wait_for_all(t);
        multiply(t, &layer->w13, q, units, b, N, 0);
        wait_for_all(t);
        for (MINE(i, N)) {
            gate(b + (int64_t)i * 2 * F, a + (int64_t)i * F, F);
            units[i] = to_integers(a + (int64_t)i * F, q + (int64_t)i * layer->w2.d, F);
        }
        wait_for_all(t);
        multiply(t, &layer->w2, q, units, x, N, 1);
        wait_for_all(t);
    }
    const float *last = x + (int64_t)(N - rows->n_logits) * D;
    for (MINE(i, rows->n_logits)) {
        normalise(last + (int64_t)i * D, m->norm, a + (int64_t)i * D, D, m->eps);
        units[i] = to_integers(a + (int64_t)i * D, q + (int64_t)i * D, D);
    }
    wait_for_all(t);
    multiply(t, &m->head, q, units, rows->logits, rows->n_logits, 0);
}

/* Write the keys and values of all rows to the cache, and the logits of the last. */
void step(const Model *m, const Rows *rows, int n_threads) {
    Barrier barrier = {0};
#ifdef _OPENMP
#pragma omp parallel num_threads(n_threads)
    {
        const Team team = {omp_get_thread_num(), omp_get_num_threads(), &barrier};
        step_of(m, rows, &team);
    }
#else
    const Team alone = {0, 1, &barrier};
    step_of(m, rows, &alone);
    (void)n_threads;
#endif
}
