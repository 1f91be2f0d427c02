/* What happens to rows between the products: norms, rotation, gating, the choice of experts. One call where
   PyTorch has five operators, each of which costs more than its arithmetic for a few rows. */
#include "products.h"

#include <math.h>
#include <omp.h>
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

/* The scales of one `splitinfer_residual`, and where its results go. */
typedef struct {
    const void *x;
    int bfloat16;
    int64_t n;
    const float *weight, *first, *second, *third;
    float eps;
    void *sum, *first_out, *second_out;
} Residual;

/* One row of it: `own` holds y as float32 and becomes the norm times `third`; `row` is [n] of scratch. */
static void residual_row(const Residual *a, int64_t r, float *own, float *row) {
    const int64_t n = a->n;
    float scale = root(own, n, a->eps);
    read_row(a->x, a->bfloat16, r, n, row);
    for (int64_t i = 0; i < n; i++) own[i] = row[i] + own[i] * scale * a->weight[i];
    write_row(own, n, a->sum, a->bfloat16, r * n);
    read_row(a->sum, a->bfloat16, r, n, own); /* as everybody else will see it */
    scale = root(own, n, a->eps);
    for (int64_t i = 0; i < n; i++) own[i] *= scale;
    for (int64_t i = 0; i < n; i++) row[i] = own[i] * a->first[i];
    write_row(row, n, a->first_out, a->bfloat16, r * n);
    if (a->second) {
        for (int64_t i = 0; i < n; i++) row[i] = own[i] * a->second[i];
        write_row(row, n, a->second_out, a->bfloat16, r * n);
    }
    if (a->third)
        for (int64_t i = 0; i < n; i++) own[i] *= a->third[i];
}

/* x + norm(y) * weight, rounded to x's type into `sum`; that sum's norm times `first` and `second` (NULL:
   none) in x's type, and times `third` (NULL: 1) as float32 into `normed`. All [rows, n]. */
int splitinfer_residual(const void *x, const void *y, int bfloat16, int64_t rows, int64_t n, const float *weight,
                        float eps, const float *first, const float *second, const float *third, void *sum,
                        float *normed, void *first_out, void *second_out, int threads) {
    const Residual a = {x, bfloat16, n, weight, first, second, third, eps, sum, first_out, second_out};
    int failed = 0;
    ROWS_PARALLEL
    for (int64_t r = 0; r < rows; r++) {
        float *row = malloc((size_t)n * 4);
        if (!row) { failed = 1; continue; }
        read_row(y, bfloat16, r, n, normed + r * n);
        residual_row(&a, r, normed + r * n, row);
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

/* Projected heads and what becomes of them: see `splitinfer_heads`. */
typedef struct {
    int64_t width, size, turning, first_value, values;
    int value_norm;
    const float *weight, *cosine, *sine;
    float eps;
    void *turned, *value;
    int bfloat16;
} Heads;

/* One row; `head` is [2 * size] of scratch. */
static void heads_row(const Heads *a, const float *from, int64_t r, float *head) {
    const int64_t size = a->size, half = size / 2;
    const float *c = a->cosine + r * size, *s = a->sine + r * size;
    float *out = head + size;
    for (int64_t h = 0; h < a->turning; h++) {
        float scale = root(from + h * size, size, a->eps);
        for (int64_t i = 0; i < size; i++) head[i] = from[h * size + i] * scale * a->weight[h * size + i];
        for (int64_t i = 0; i < half; i++) {
            out[i] = head[i] * c[i] + head[i + half] * s[i];
            out[i + half] = head[i + half] * c[i + half] + head[i] * s[i + half];
        }
        write_row(out, size, a->turned, a->bfloat16, (r * a->turning + h) * size);
    }
    for (int64_t h = 0; h < a->values; h++) {
        const float *v = from + (a->first_value + h) * size;
        float scale = a->value_norm ? root(v, size, a->eps) : 1.0f;
        for (int64_t i = 0; i < size; i++) out[i] = v[i] * scale;
        write_row(out, size, a->value, a->bfloat16, (r * a->values + h) * size);
    }
}

/* Projections [rows, width] to normalised heads: the first `turning` times `weight` [turning, size] and rotated
   by cosine and sine [rows, size] (pairs (i, i + size / 2), the first half of sine negated) into `turned`
   [rows, turning, size]; the `values` heads from `first_value` on into `value` [rows, values, size], normalised
   if `value_norm`, else as they are. */
int splitinfer_heads(const float *projected, int64_t rows, int64_t width, int64_t size, int64_t turning,
                     int64_t first_value, int64_t values, int value_norm, const float *weight, const float *cosine,
                     const float *sine, float eps, void *turned, void *value, int bfloat16, int threads) {
    const Heads a = {width, size, turning, first_value, values, value_norm, weight, cosine, sine,
                     eps, turned, value, bfloat16};
    int failed = 0;
    ROWS_PARALLEL
    for (int64_t r = 0; r < rows; r++) {
        float *head = malloc((size_t)size * 8);
        if (!head) { failed = 1; continue; }
        heads_row(&a, projected + r * width, r, head);
        free(head);
    }
    return failed ? -1 : 0;
}

static void gated_row(const float *gate, int64_t n, float *to) {
    const float *up = gate + n;
    int64_t i = 0;
    for (; i + VL <= n; i += VL) store(to + i, gelu(load(gate + i)) * load(up + i));
    for (; i < n; i++) to[i] = (gelu(all(gate[i])) * all(up[i]))[0];
}

/* out [rows, n] = gelu(x[:, :n]) * x[:, n:], float32. */
int splitinfer_gated(const float *x, int64_t rows, int64_t n, float *out, int threads) {
    ROWS_PARALLEL
    for (int64_t r = 0; r < rows; r++) gated_row(x + r * 2 * n, n, out + r * n);
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

/* ---- whole stretches of a layer: the same, without leaving the team of threads in between ---- */

static float *team_memory(int64_t floats) { return aligned_alloc(64, ((size_t)floats * 4 + 63) / 64 * 64); }

/* What leads to attention: the norm of x [rows, k], its product with `count` matrices, and `splitinfer_heads`
   of that. x is of the same type as the results. */
int splitinfer_attention_in(const Matrix *matrices, int count, const void *x, int64_t rows, const float *norm,
                            float eps, int64_t size, int64_t turning, int64_t values, int value_norm,
                            const float *weight, const float *cosine, const float *sine, void *turned,
                            void *value, int bfloat16, int threads) {
    const int64_t k = matrices->k;
    int64_t width = 0;
    for (int i = 0; i < count; i++) width += matrices[i].n;
    const Heads a = {width, size, turning, width / size - values, values, value_norm, weight, cosine, sine,
                     eps, turned, value, bfloat16};
    const int64_t inputs = (rows_floats(matrices, rows) + 15) / 16 * 16, outputs = (rows * width + 15) / 16 * 16;
    float *memory = team_memory(inputs + outputs + threads * 2 * size);
    if (!memory) return -1;
    Rows prepared = rows_at(matrices, rows, memory);
    float *projected = memory + inputs;
#pragma omp parallel num_threads(threads) if (rows * width * k > PARALLEL_FROM)
    {
        float *head = projected + outputs + omp_get_thread_num() * 2 * size;
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; r++) {
            float *row = prepared.x + r * prepared.stride;
            copy_row(x, bfloat16, r * k, k, row, prepared.stride);
            float scale = root(row, k, eps);
            for (int64_t i = 0; i < k; i++) row[i] = row[i] * scale * norm[i];
            prepare_row(matrices, prepared, r);
        }
        product_pieces(matrices, count, prepared, rows, projected, 0);
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; r++) heads_row(&a, projected + r * width, r, head);
    }
    free(memory);
    return 0;
}

/* What follows attention: the product of `attended` [rows, k] with `output`, `splitinfer_residual` of x and that,
   and, unless `router` is NULL, `splitinfer_choose` of its product with the normed rows. */
int splitinfer_attention_out(const Matrix *output, const Matrix *router, const void *attended, const void *x,
                             int bfloat16, int64_t rows, const float *weight, float eps, const float *first,
                             const float *second, const float *third, void *sum, void *first_out,
                             void *second_out, int64_t chosen, const float *expert_scale, int64_t *index,
                             float *weights, int threads) {
    const int64_t k = output->k, n = output->n;
    const Residual a = {x, bfloat16, n, weight, first, second, third, eps, sum, first_out, second_out};
    const Matrix *next = router ? router : output;
    const int64_t inputs = (rows_floats(output, rows) + 15) / 16 * 16, outputs = (rows * n + 15) / 16 * 16;
    const int64_t routed = (rows_floats(next, rows) + 15) / 16 * 16;
    float *memory = team_memory(inputs + outputs + routed + rows * next->n + threads * n);
    if (!memory) return -1;
    Rows prepared = rows_at(output, rows, memory);
    float *product = memory + inputs;
    Rows normed = rows_at(next, rows, product + outputs);
    float *scores = product + outputs + routed;
#pragma omp parallel num_threads(threads) if (rows * n * k > PARALLEL_FROM)
    {
        float *scratch = scores + rows * next->n + omp_get_thread_num() * n;
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; r++) {
            copy_row(attended, bfloat16, r * k, k, prepared.x + r * prepared.stride, prepared.stride);
            prepare_row(output, prepared, r);
        }
        product_pieces(output, 1, prepared, rows, product, 0);
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; r++) {
            residual_row(&a, r, product + r * n, scratch);
            if (!router) continue;
            copy_row(product, 0, r * n, n, normed.x + r * normed.stride, normed.stride);
            prepare_row(router, normed, r);
        }
        if (router) product_pieces(router, 1, normed, rows, scores, 0);
    }
    if (router) splitinfer_choose(scores, rows, router->n, chosen, expert_scale, index, weights);
    free(memory);
    return 0;
}

/* The feed-forward network that every row passes, x [rows, H] to out [rows, H]: gate and up are `count` matrices
   with 2 I channels in all; the result's norm times `norm` where that is given. */
int splitinfer_mlp(const Matrix *gate_up, int count, const Matrix *down, const void *x, int64_t rows,
                   const float *norm, float eps, void *out, int bfloat16, int threads) {
    const int64_t k = gate_up->k, inner = down->k, n = down->n;
    const int64_t first = (rows_floats(gate_up, rows) + 15) / 16 * 16, between = (rows * 2 * inner + 15) / 16 * 16;
    const int64_t second = (rows_floats(down, rows) + 15) / 16 * 16;
    float *memory = team_memory(first + between + second + rows * n);
    if (!memory) return -1;
    Rows source = rows_at(gate_up, rows, memory), hidden = rows_at(down, rows, memory + first + between);
    float *halves = memory + first, *result = halves + between + second;
#pragma omp parallel num_threads(threads) if (rows * inner * k > PARALLEL_FROM)
    {
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; r++) {
            copy_row(x, bfloat16, r * k, k, source.x + r * source.stride, source.stride);
            prepare_row(gate_up, source, r);
        }
        product_pieces(gate_up, count, source, rows, halves, 0);
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; r++) {
            float *row = hidden.x + r * hidden.stride;
            gated_row(halves + r * 2 * inner, inner, row);
            memset(row + inner, 0, (size_t)(hidden.stride - inner) * 4);
            prepare_row(down, hidden, r);
        }
        product_pieces(down, 1, hidden, rows, result, 0);
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; r++) {
            float *row = result + r * n, scale = norm ? root(row, n, eps) : 1.0f;
            for (int64_t i = 0; norm && i < n; i++) row[i] = row[i] * scale * norm[i];
            write_row(row, n, out, bfloat16, r * n);
        }
    }
    free(memory);
    return 0;
}
