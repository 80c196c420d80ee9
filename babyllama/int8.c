/* One decoding step of a Llama decoder with int8 weights, for any processor; int8.py compiles it and
   makes what is passed.

   A step is bound by reading the weights, so they are int8 with one scale an output. Activations
   become 16-bit integers for each product, whose sums are exact in int32; all else is float32.
   Plain loops: the compiler turns them into vector instructions. Axes as in model.py. */

#include <math.h>
#include <stdint.h>
#include <string.h>

typedef struct {
    const int8_t *values; /* (n, d) */
    const float *scales;  /* (n) */
    int32_t n, d;
} Matrix;

typedef struct {
    Matrix qkv, wo, w13, w2; /* the norms' weights are folded into qkv, w13 and head */
} Layer;

typedef struct {
    int32_t n_layers, n_heads, n_kv_heads, head_dim, hidden_dim, max_seq_len;
    float eps;
    const float *rope; /* (2, max_seq_len, C): cosines and signed sines */
    const Layer *layers;
    Matrix head;
} Model;

/* Products below this many multiplications are not worth waking a second thread. */
#define LARGE 50000

/* x (B, d) as integers q (B, d), each row in its own unit. */
static void to_integers(const float *x, int16_t *q, float *units, int B, int d) {
    const float most = fminf(32767, 2147483647.0f / 128 / d); /* no sum of d can overflow */
    for (int b = 0; b < B; b++, x += d, q += d) {
        float largest = 1e-30f;
        for (int i = 0; i < d; i++) largest = fmaxf(largest, fabsf(x[i]));
        for (int i = 0; i < d; i++) q[i] = (int16_t)lrintf(x[i] * (most / largest));
        units[b] = largest / most;
    }
}

/* y (B, n) = x (B, d) times the matrix; four rows of x at a time share what is read of it. */
static void multiply(const Matrix *m, const float *x, float *y, int B, int16_t *q, float *units) {
    const int n = m->n, d = m->d;
    to_integers(x, q, units, B, d);
#pragma omp parallel for schedule(static) if ((int64_t)B * n * d > LARGE)
    for (int r = 0; r < n; r++) {
        const int8_t *w = m->values + (int64_t)r * d;
        int b = 0;
        for (; b + 4 <= B; b += 4) {
            const int16_t *p = q + (int64_t)b * d;
            int32_t s0 = 0, s1 = 0, s2 = 0, s3 = 0;
            for (int i = 0; i < d; i++) {
                s0 += w[i] * p[i];
                s1 += w[i] * p[d + i];
                s2 += w[i] * p[2 * d + i];
                s3 += w[i] * p[3 * d + i];
            }
            const int32_t sums[4] = {s0, s1, s2, s3};
            for (int j = 0; j < 4; j++)
                y[(int64_t)(b + j) * n + r] = sums[j] * (m->scales[r] * units[b + j]);
        }
        for (; b < B; b++) {
            const int16_t *p = q + (int64_t)b * d;
            int32_t sum = 0;
            for (int i = 0; i < d; i++) sum += w[i] * p[i];
            y[(int64_t)b * n + r] = sum * (m->scales[r] * units[b]);
        }
    }
}

/* e to the power of x: 2 to a whole and a broken power, the latter by its series, to 4e-6. Unlike
   the library's, it becomes vector instructions. */
static inline float power_of_e(float x) {
    const float clipped = x < -87 ? -87 : x > 87 ? 87 : x;
    const float exponent = clipped * 1.44269504f;
    const int32_t whole = (int32_t)(exponent + 128.5f) - 128; /* rounded: it is above -128 */
    const float rest = (exponent - whole) * 0.693147181f;     /* at most 0.35 */
    const float series =
        1 + rest * (1 + rest / 2 * (1 + rest / 3 * (1 + rest / 4 * (1 + rest / 5 * (1 + rest / 6)))));
    union {
        int32_t bits;
        float number;
    } power = {(whole + 127) << 23};
    return power.number * series;
}

/* RMSNorm without its weight: (B, D). */
static void normalise(const float *x, float *y, int B, int D, float eps) {
    for (int b = 0; b < B; b++, x += D, y += D) {
        float squares = 0;
        for (int i = 0; i < D; i++) squares += x[i] * x[i];
        const float scale = 1 / sqrtf(squares / D + eps);
        for (int i = 0; i < D; i++) y[i] = x[i] * scale;
    }
}

/* Turn each pair (c, c + C/2) of one head by its position's angle. */
static void rotate(float *x, const float *cosine, const float *sine, int C) {
    for (int c = 0; c < C / 2; c++) {
        const float a = x[c], b = x[c + C / 2];
        x[c] = a * cosine[c] + b * sine[c];
        x[c + C / 2] = b * cosine[c + C / 2] + a * sine[c + C / 2];
    }
}

/* One head's mixture of the values seen: k, v (S, C); scores is room for S numbers. */
static void attend(const float *q, const float *k, const float *v, float *out, float *scores,
                   int S, int C) {
    float largest = -INFINITY, total = 0;
    const float scale = 1 / sqrtf(C);
    for (int s = 0; s < S; s++) {
        float dot = 0;
        for (int c = 0; c < C; c++) dot += q[c] * k[(int64_t)s * C + c];
        scores[s] = dot * scale;
        largest = fmaxf(largest, scores[s]);
    }
    for (int s = 0; s < S; s++) total += scores[s] = power_of_e(scores[s] - largest);
    memset(out, 0, C * sizeof(float));
    for (int s = 0; s < S; s++) {
        const float share = scores[s] / total;
        for (int c = 0; c < C; c++) out[c] += share * v[(int64_t)s * C + c];
    }
}

/* Rotate q and k of qkv (B, H + 2K, C), store k and v in their column, attend: (B, D).

   cache: (2, B, K, size, C) of this layer; start: (B) first column of each row */
static void attention(const Model *m, float *qkv, float *cache, float *out, float *scores, int B,
                      const int64_t *start, int column, int size) {
    const int H = m->n_heads, K = m->n_kv_heads, C = m->head_dim;
    const int64_t half = (int64_t)B * K * size * C;
#pragma omp parallel for schedule(static) if ((int64_t)B * H * C * column * 2 > LARGE)
    for (int row = 0; row < B * K; row++) {
        const int b = row / K, g = row % K, first = start[b];
        const float *cosine = m->rope + (int64_t)(column - first) * C;
        const float *sine = cosine + (int64_t)m->max_seq_len * C;
        float *own = qkv + (int64_t)b * (H + 2 * K) * C;
        float *k = cache + (int64_t)row * size * C, *v = k + half;
        rotate(own + (H + g) * C, cosine, sine, C);
        memcpy(k + (int64_t)column * C, own + (H + g) * C, C * sizeof(float));
        memcpy(v + (int64_t)column * C, own + (H + K + g) * C, C * sizeof(float));
        for (int h = g * (H / K); h < (g + 1) * (H / K); h++) {
            rotate(own + h * C, cosine, sine, C);
            attend(own + h * C, k + (int64_t)first * C, v + (int64_t)first * C,
                   out + ((int64_t)b * H + h) * C, scores + (int64_t)row * size,
                   column - first + 1, C);
        }
    }
}

/* The gate: (B, 2 F) of w1 and w3 to (B, F). */
static void gate(const float *x, float *y, int B, int F) {
    for (int b = 0; b < B; b++, x += 2 * F, y += F)
        for (int i = 0; i < F; i++) y[i] = x[i] / (1 + power_of_e(-x[i])) * x[F + i];
}

static void add(float *x, const float *y, int64_t n) {
    for (int64_t i = 0; i < n; i++) x[i] += y[i];
}

/* x (B, D) holds the embeddings of the newest tokens and is overwritten; logits (B, V).

   cache: (n_layers, 2, B, K, size, C), whose next free column is `column`
   a, b, scores, q, units: room for (B, 2 F) or (B, (H + 2K) C) floats, whichever is more, twice;
   (B, K, size) floats; (B, D or F) integers; (B) floats */
void step(const Model *m, float *x, float *cache, const int64_t *start, int B, int column,
          int size, float *a, float *b, float *scores, int16_t *q, float *units, float *logits) {
    const int D = m->n_heads * m->head_dim;
    const int64_t layer_size = (int64_t)2 * B * m->n_kv_heads * size * m->head_dim;
    for (int i = 0; i < m->n_layers; i++) {
        const Layer *layer = m->layers + i;
        normalise(x, a, B, D, m->eps);
        multiply(&layer->qkv, a, b, B, q, units);
        attention(m, b, cache + i * layer_size, a, scores, B, start, column, size);
        multiply(&layer->wo, a, b, B, q, units);
        add(x, b, (int64_t)B * D);
        normalise(x, a, B, D, m->eps);
        multiply(&layer->w13, a, b, B, q, units);
        gate(b, a, B, m->hidden_dim);
        multiply(&layer->w2, a, b, B, q, units);
        add(x, b, (int64_t)B * D);
    }
    normalise(x, a, B, D, m->eps);
    multiply(&m->head, a, logits, B, q, units);
}
