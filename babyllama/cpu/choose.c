/* Drawing the next token: what sampling.choose does, in passes over the logits that stay near the
   processor. native.py compiles it. */

#include <math.h>

#include "native.h"

#ifdef _OPENMP
#include <omp.h>
#endif

/* Probabilities that are summed together; of the whole, these sums are searched first. */
#define RUN 256

/* The place of the largest number, of the first where there are several. */
static int place_of_largest(const float *x, int n) {
    int run = 0;
    float top = -INFINITY;
    for (int first = 0; first < n; first += RUN) {
        const int end = first + RUN < n ? first + RUN : n;
        float largest = -INFINITY;
#pragma omp simd reduction(max : largest)
        for (int i = first; i < end; i++) largest = fmaxf(largest, x[i]);
        if (largest > top) top = largest, run = first;
    }
    while (run < n - 1 && x[run] != top) run++;
    return run;
}

/* The sums of all powers, or of those above a floor, in runs (n / RUN, rounded up); returns their
   total. */
static double sum_runs(const float *powers, int n, float floor, float *sums) {
    double total = 0;
    for (int first = 0; first < n; first += RUN) {
        const int end = first + RUN < n ? first + RUN : n;
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int i = first; i < end; i++) sum += powers[i] > floor ? powers[i] : 0;
        if (sums) sums[first / RUN] = sum;
        total += sum;
    }
    return total;
}

/* Where the running sum of the powers reaches `goal`. */
static int reach(const float *powers, const float *sums, int n, double goal) {
    double sum = 0;
    int run = 0;
    while ((run + 1) * RUN < n && sum + sums[run] < goal) sum += sums[run++];
    const int end = (run + 1) * RUN < n ? (run + 1) * RUN : n;
    int last = run * RUN; /* rounding may leave the goal just beyond the run's last token */
    for (int i = run * RUN; i < end; i++) {
        if (powers[i] > 0) last = i;
        sum += powers[i];
        if (sum >= goal) return i;
    }
    return last;
}

/* A token of logits (V), or -1 if all that were drawn lie outside of what may be chosen.

   temperature: 0 takes the likeliest; powers, sums: room for V and V / RUN + 1 numbers */
static int choose_one(const float *logits, int V, float temperature, float top_p, float min_p,
                      const float *chances, int n_chances, float *powers, float *sums) {
    const int likeliest = place_of_largest(logits, V);
    if (temperature == 0) return likeliest;
    const float top = logits[likeliest], coldness = 1 / temperature;
    for (int i = 0; i < V; i++) {
        const float x = (logits[i] - top) * coldness;
        powers[i] = x > -87 ? power_of_e(x) : 0; /* a token that is ruled out is never drawn */
    }
    const double total = sum_runs(powers, V, 0, sums);
    for (int i = 0; i < n_chances; i++) {
        const int token = reach(powers, sums, V, chances[i] * total);
        const float own = powers[token];
        if (own < min_p) continue;
        if (top_p == 1 || sum_runs(powers, V, own, 0) < top_p * total) return token;
    }
    return -1;
}

/* A token of each row of logits (B, V); chances (B, n_chances), the last of which is not used;
   room (threads, V + V / RUN + 1). */
void choose(const float *logits, int B, int V, float temperature, float top_p, float min_p,
            const float *chances, int n_chances, float *room, int64_t *tokens, int n_threads) {
    const int64_t width = V + V / RUN + 1;
#pragma omp parallel for schedule(dynamic) num_threads(n_threads) if (n_threads > 1)
    for (int b = 0; b < B; b++) {
#ifdef _OPENMP
        float *powers = room + omp_get_thread_num() * width;
#else
        float *powers = room;
#endif
        tokens[b] = choose_one(logits + (int64_t)b * V, V, temperature, top_p, min_p,
                               chances + b * n_chances, n_chances - 1, powers, powers + V);
    }
    (void)n_threads, (void)width;
}
