/* What stands between the products of a layer, and the softmax of the loss, row by row: the body for
   one format of what the products take and give. Before it: NUMBER, the format; NAME(f), the name of a
   function for it; V, a register of WIDE float32, `all`, `load`, `store`, `larger`, `sum_of`, `most_of`;
   `widen` and `narrow` from and to the format, `power_of_two` and `logistic`. N = B T. */

/* sum = x (N, D) + y, if there is a y, else sum is x; normed = RMSNorm of sum, whose rows were scaled
   by scales (N). D is a multiple of 16. */
void NAME(norm_forward)(const float *x, const NUMBER *y, float *sum, const float *weight,
                        NUMBER *normed, float *scales, int64_t N, int64_t D, float eps) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < N; i++) {
        const float *own = y ? sum + i * D : x + i * D;
        V squares = all(0);
        for (int64_t d = 0; d < D; d += WIDE) {
            V value = load(x + i * D + d);
            if (y) {
                value = value + widen(y + i * D + d);
                store(sum + i * D + d, value);
            }
            squares = value * value + squares;
        }
        scales[i] = 1 / sqrtf(sum_of(squares) / D + eps);
        const V scale = all(scales[i]);
        for (int64_t d = 0; d < D; d += WIDE)
            narrow(normed + i * D + d, load(own + d) * scale * load(weight + d));
    }
}

/* grad (N, D) += the gradient of x, from that of its norm; narrowed: grad in the format, if wanted;
   sums (CHUNKS, D): the gradients of the weight, chunk by chunk. */
void NAME(norm_backward)(const float *x, const float *scales, const float *weight,
                         const NUMBER *grad_normed, float *grad, NUMBER *narrowed, float *sums,
                         int64_t N, int64_t D) {
#pragma omp parallel for schedule(static)
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
        float *sum = sums + (int64_t)chunk * D;
        memset(sum, 0, D * sizeof *sum);
        for (int64_t i = N * chunk / CHUNKS; i < N * (chunk + 1) / CHUNKS; i++) {
            const float *own = x + i * D;
            const NUMBER *given = grad_normed + i * D;
            const V scale = all(scales[i]);
            V dot = all(0);
            for (int64_t d = 0; d < D; d += WIDE) {
                const V part = widen(given + d) * (load(own + d) * scale);
                store(sum + d, load(sum + d) + part);
                dot = part * load(weight + d) + dot;
            }
            const V mean = all(sum_of(dot) / D);
            for (int64_t d = 0; d < D; d += WIDE) {
                const V normed = load(own + d) * scale, g = widen(given + d) * load(weight + d);
                const V change = g - normed * mean;
                const V total = change * scale + load(grad + i * D + d);
                store(grad + i * D + d, total);
                if (narrowed) narrow(narrowed + i * D + d, total);
            }
        }
    }
}

/* y (N, F) = silu(a) b, from rows a, b of x (N, 2 F). */
void NAME(gate_forward)(const NUMBER *x, NUMBER *y, int64_t N, int64_t F) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < N; i++)
        for (int64_t f = 0; f < F; f += WIDE) {
            const V a = widen(x + 2 * i * F + f), b = widen(x + (2 * i + 1) * F + f);
            narrow(y + i * F + f, a * logistic(a) * b);
        }
}

/* The same y again, and the gradient of x from grad (N, F) of y. */
void NAME(gate_backward)(const NUMBER *x, const NUMBER *grad, NUMBER *y, NUMBER *grad_x, int64_t N,
                         int64_t F) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < N; i++)
        for (int64_t f = 0; f < F; f += WIDE) {
            const int64_t at = 2 * i * F + f;
            const V a = widen(x + at), b = widen(x + at + F), g = widen(grad + i * F + f);
            const V s = logistic(a), silu = a * s;
            const V slope = silu * (all(1) - s) + s; /* silu' = s + silu (1 - s) */
            narrow(y + i * F + f, silu * b);
            narrow(grad_x + at, g * b * slope);
            narrow(grad_x + at + F, g * silu);
        }
}

/* sum = x (n) + y */
void NAME(add)(const float *x, const NUMBER *y, float *sum, int64_t n) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < n / WIDE; i++)
        store(sum + WIDE * i, load(x + WIDE * i) + widen(y + WIDE * i));
}

/* Look at logits x (N, n_outputs) of outputs from `first` on: the largest so far, the sum of powers of e
   over it (N); and the targets' logits, where they are among these. */
void NAME(softmax_look)(const NUMBER *x, const int64_t *targets, float *largest, float *powers,
                        float *aimed, int64_t N, int64_t n_outputs, int64_t first) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < N; i++) {
        const NUMBER *own = x + i * n_outputs;
        const int64_t target = targets[i] - first, whole = n_outputs / WIDE * WIDE;
        if (0 <= target && target < n_outputs) aimed[i] = number(own[target]);
        V highest = all(largest[i]), total = all(0);
        for (int64_t v = 0; v < whole; v += WIDE) highest = larger(highest, widen(own + v));
        float top = most_of(highest);
        for (int64_t v = whole; v < n_outputs; v++) top = fmaxf(top, number(own[v]));
        for (int64_t v = 0; v < whole; v += WIDE)
            total = total + power_of_two(widen(own + v) * all(LOG2_E) + all(-top * LOG2_E));
        powers[i] = powers[i] * exp2f((largest[i] - top) * LOG2_E) + sum_of(total);
        for (int64_t v = whole; v < n_outputs; v++)
            powers[i] += exp2f((number(own[v]) - top) * LOG2_E);
        largest[i] = top;
    }
}

/* The same logits become the gradient of the loss of each row: softmax, minus 1 at the target. */
void NAME(softmax_error)(NUMBER *x, const int64_t *targets, const float *largest,
                         const float *powers, int64_t N, int64_t n_outputs, int64_t first) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < N; i++) {
        NUMBER *own = x + i * n_outputs;
        const int64_t target = targets[i] - first, whole = n_outputs / WIDE * WIDE;
        const int is_here = 0 <= target && target < n_outputs;
        const float share = 1 / powers[i], shift = -largest[i] * LOG2_E;
        const float right = is_here ? exp2f(number(own[target]) * LOG2_E + shift) * share : 0;
        for (int64_t v = 0; v < whole; v += WIDE)
            narrow(own + v, power_of_two(widen(own + v) * all(LOG2_E) + all(shift)) * all(share));
        for (int64_t v = whole; v < n_outputs; v++)
            own[v] = rounded(exp2f(number(own[v]) * LOG2_E + shift) * share);
        if (is_here) own[target] = rounded(right - 1);
    }
}
