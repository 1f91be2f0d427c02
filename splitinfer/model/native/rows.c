/* What happens to rows between the products: norms, rotation, gating, the choice of experts. One call where
   PyTorch has five operators, each of which costs more than its arithmetic for a few rows. */
#include "products.h"

#include <math.h>
#include <stdlib.h>

enum { ROWS_APIECE = 16 }; /* below, another thread costs more than it saves */

#define ROWS_PARALLEL _Pragma("omp parallel for schedule(static) num_threads(threads) if (rows > ROWS_APIECE)")

/* 1 / sqrt(mean of squares + eps) of a row; sums in eight (or sixteen) lanes, then their tree. */
INLINE float root(const float *x, int64_t n, float eps) {
    vf sum = (vf){};
    int64_t i = 0;
    for (; i + VL <= n; i += VL) {
        vf v = load(x + i);
        sum = fused(v, v, sum);
    }
    float total = sum_of(sum);
    for (; i < n; i++) total += x[i] * x[i];
    return 1.0f / sqrtf(total / (float)n + eps);
}

INLINE void read_row(const void *x, int bfloat16, int64_t row, int64_t n, float *to) {
    copy_row(x, bfloat16, row * n, n, to, n);
}

/* out [rows, n] = RMS norm of x times weight (NULL: 1). */
int splitinfer_norm(const void *x, int x_bfloat16, int64_t rows, int64_t n, const float *weight, float eps,
                    void *out, int out_bfloat16, int threads) {
    int failed = 0;
    ROWS_PARALLEL
    for (int64_t r = 0; r < rows; r++) {
        float *row = malloc((size_t)n * 4);
        if (!row) { failed = 1; continue; }
        read_row(x, x_bfloat16, r, n, row);
        float scale = root(row, n, eps);
        if (weight)
            for (int64_t i = 0; i < n; i++) row[i] = row[i] * scale * weight[i];
        else
            for (int64_t i = 0; i < n; i++) row[i] *= scale;
        write_row(row, n, out, out_bfloat16, r * n);
        free(row);
    }
    return failed ? -1 : 0;
}

/* x + norm(y) * weight, rounded to x's type into `sum`; that sum's norm times `first` and `second` (NULL:
   none) in x's type, and times `third` (NULL: 1) as float32 into `normed`. All [rows, n]. */
int splitinfer_residual(const void *x, const void *y, int bfloat16, int64_t rows, int64_t n, const float *weight,
                        float eps, const float *first, const float *second, const float *third, void *sum,
                        float *normed, void *first_out, void *second_out, int threads) {
    int failed = 0;
    ROWS_PARALLEL
    for (int64_t r = 0; r < rows; r++) {
        float *row = malloc((size_t)n * 4), *own = normed + r * n;
        if (!row) { failed = 1; continue; }
        read_row(y, bfloat16, r, n, own);
        float scale = root(own, n, eps);
        read_row(x, bfloat16, r, n, row);
        for (int64_t i = 0; i < n; i++) own[i] = row[i] + own[i] * scale * weight[i];
        write_row(own, n, sum, bfloat16, r * n);
        read_row(sum, bfloat16, r, n, own); /* as everybody else will see it */
        scale = root(own, n, eps);
        for (int64_t i = 0; i < n; i++) own[i] *= scale;
        for (int64_t i = 0; i < n; i++) row[i] = own[i] * first[i];
        write_row(row, n, first_out, bfloat16, r * n);
        if (second) {
            for (int64_t i = 0; i < n; i++) row[i] = own[i] * second[i];
            write_row(row, n, second_out, bfloat16, r * n);
        }
        if (third)
            for (int64_t i = 0; i < n; i++) own[i] *= third[i];
        free(row);
    }
    return failed ? -1 : 0;
}

/* out = (x + norm(dense + norm(moe) * moe_weight) * weight) * scalar, all [rows, n] of one type; without `moe`
   (NULL) the inner norm falls away. */
int splitinfer_combine(const void *x, const void *dense, const void *moe, int bfloat16, int64_t rows, int64_t n,
                       const float *moe_weight, const float *weight, float eps, float scalar, void *out,
                       int threads) {
    int failed = 0;
    ROWS_PARALLEL
    for (int64_t r = 0; r < rows; r++) {
        float *row = malloc((size_t)n * 8), *other = row + n, scale;
        if (!row) { failed = 1; continue; }
        read_row(dense, bfloat16, r, n, row);
        if (moe) {
            read_row(moe, bfloat16, r, n, other);
            scale = root(other, n, eps);
            for (int64_t i = 0; i < n; i++) row[i] += other[i] * scale * moe_weight[i];
        }
        scale = root(row, n, eps);
        read_row(x, bfloat16, r, n, other);
        for (int64_t i = 0; i < n; i++) row[i] = (other[i] + row[i] * scale * weight[i]) * scalar;
        write_row(row, n, out, bfloat16, r * n);
        free(row);
    }
    return failed ? -1 : 0;
}

/* Projections [rows, (heads + kv_heads (+ kv_heads)) * size] to normalised heads: the first `turning` times
   `weight` [turning, size] and rotated by cos and sin [rows, size] (pairs (i, i + size / 2), the first half of
   sin negated) into `turned` [rows, turning, size]; the `values` heads from `first_value` on as they are into
   `value` [rows, values, size]. */
int splitinfer_heads(const float *projected, int64_t rows, int64_t width, int64_t size, int64_t turning,
                     int64_t first_value, int64_t values, const float *weight, const float *cosine,
                     const float *sine, float eps, void *turned, void *value, int bfloat16, int threads) {
    const int64_t half = size / 2;
    int failed = 0;
    ROWS_PARALLEL
    for (int64_t r = 0; r < rows; r++) {
        float *head = malloc((size_t)size * 8), *out = head + size;
        if (!head) { failed = 1; continue; }
        const float *from = projected + r * width, *c = cosine + r * size, *s = sine + r * size;
        for (int64_t h = 0; h < turning; h++) {
            float scale = root(from + h * size, size, eps);
            for (int64_t i = 0; i < size; i++) head[i] = from[h * size + i] * scale * weight[h * size + i];
            for (int64_t i = 0; i < half; i++) {
                out[i] = head[i] * c[i] + head[i + half] * s[i];
                out[i + half] = head[i + half] * c[i + half] + head[i] * s[i + half];
            }
            write_row(out, size, turned, bfloat16, (r * turning + h) * size);
        }
        for (int64_t h = 0; h < values; h++) {
            const float *v = from + (first_value + h) * size;
            float scale = root(v, size, eps);
            for (int64_t i = 0; i < size; i++) out[i] = v[i] * scale;
            write_row(out, size, value, bfloat16, (r * values + h) * size);
        }
        free(head);
    }
    return failed ? -1 : 0;
}

/* out [rows, n] = gelu(x[:, :n]) * x[:, n:], float32. */
int splitinfer_gated(const float *x, int64_t rows, int64_t n, float *out, int threads) {
    ROWS_PARALLEL
    for (int64_t r = 0; r < rows; r++) {
        const float *gate = x + r * 2 * n, *up = gate + n;
        float *to = out + r * n;
        int64_t i = 0;
        for (; i + VL <= n; i += VL) store(to + i, gelu(load(gate + i)) * load(up + i));
        for (; i < n; i++) to[i] = (gelu(all(gate[i])) * all(up[i]))[0];
    }
    return 0;
}

/* The k largest of scores [rows, n] in falling order (of equals the first) into index [rows, k]; their softmax
   times scale[index] into weights [rows, k]. A NaN is never chosen before a number. */
int splitinfer_choose(const float *scores, int64_t rows, int64_t n, int64_t k, const float *scale, int64_t *index,
                      float *weights) {
    for (int64_t r = 0; r < rows; r++) {
        const float *row = scores + r * n;
        int64_t *chosen = index + r * k, held = 0;
        for (int64_t e = 0; e < n; e++) {
            int64_t place = held;
            for (; place > 0; place--) {
                float other = row[chosen[place - 1]];
                if (!(row[e] > other || (isnan(other) && !isnan(row[e])))) break;
            }
            if (place == k) continue;
            if (held < k) held++;
            for (int64_t i = held - 1; i > place; i--) chosen[i] = chosen[i - 1];
            chosen[place] = e;
        }
        float sum = 0.0f, *w = weights + r * k;
        for (int64_t i = 0; i < k; i++) sum += w[i] = expf(row[chosen[i]] - row[chosen[0]]);
        for (int64_t i = 0; i < k; i++) w[i] = w[i] / sum * scale[chosen[i]];
    }
    return 0;
}
