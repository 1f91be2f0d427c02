/* What happens to rows between the products: norms, rotation, gating, the choice of experts. One call where
   PyTorch has five operators, each of which costs more than its arithmetic for a few rows. */
#include "rows.h"

#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

enum { ROWS_APIECE = 16 }; /* below, another thread costs more than it saves */

/* Rows one by one, each with [scratch] floats of memory: what the operators here that are no product share. */
typedef struct {
    void (*row)(const void *arg, int64_t r, float *scratch);
    const void *arg;
    int64_t rows, scratch;
    atomic_int failed;
} ByRow;

static void row_work(void *given, Member *member) {
    ByRow *b = given;
    float *scratch = malloc((size_t)b->scratch * 4);
    if (!scratch) atomic_store(&b->failed, 1);
    for (int64_t r = team_share(member, b->rows, 0); scratch && r < team_share(member, b->rows, 1); r++)
        b->row(b->arg, r, scratch);
    free(scratch);
}

/* Returns 0, or -1 without memory. */
static int by_row(void (*row)(const void *, int64_t, float *), const void *arg, int64_t rows, int64_t scratch,
                  int threads) {
    ByRow b = {row, arg, rows, scratch, 0};
    team_run(rows > ROWS_APIECE ? threads : 1, row_work, &b);
    return b.failed ? -1 : 0;
}

typedef struct {
    const void *x;
    int x_bfloat16, out_bfloat16;
    int64_t n;
    const float *weight;
    float eps;
    void *out;
} Norm;

static void norm_row(const void *given, int64_t r, float *row) {
    const Norm *a = given;
    read_row(a->x, a->x_bfloat16, r, a->n, row);
    float scale = root(row, a->n, a->eps);
    if (a->weight)
        for (int64_t i = 0; i < a->n; i++) row[i] = row[i] * scale * a->weight[i];
    else
        for (int64_t i = 0; i < a->n; i++) row[i] *= scale;
    write_row(row, a->n, a->out, a->out_bfloat16, r * a->n);
}

/* out [rows, n] = RMS norm of x times weight (NULL: 1). */
int splitinfer_norm(const void *x, int x_bfloat16, int64_t rows, int64_t n, const float *weight, float eps,
                    void *out, int out_bfloat16, int threads) {
    const Norm a = {x, x_bfloat16, out_bfloat16, n, weight, eps, out};
    return by_row(norm_row, &a, rows, n, threads);
}

typedef struct {
    Residual residual;
    const void *y;
    float *normed;
} FromRows;

static void residual_of_rows(const void *given, int64_t r, float *row) {
    const FromRows *a = given;
    float *own = a->normed + r * a->residual.n;
    read_row(a->y, a->residual.bfloat16, r, a->residual.n, own);
    residual_row(&a->residual, r, own, row);
}

/* x + norm(y) * weight, rounded to x's type into `sum`; that sum's norm times `first` and `second` (NULL:
   none) in x's type, and times `third` (NULL: 1) as float32 into `normed`. All [rows, n]. */
int splitinfer_residual(const void *x, const void *y, int bfloat16, int64_t rows, int64_t n, const float *weight,
                        float eps, const float *first, const float *second, const float *third, void *sum,
                        float *normed, void *first_out, void *second_out, int threads) {
    const FromRows a = {
        {x, bfloat16, n, weight, first, second, third, eps, sum, first_out, second_out}, y, normed,
    };
    return by_row(residual_of_rows, &a, rows, n, threads);
}

void combine_row(const void *given, int64_t r, float *row) {
    const Combine *a = given;
    const int64_t n = a->n;
    float *other = row + n, scale;
    read_row(a->dense, a->bfloat16, r, n, row);
    if (a->moe) {
        read_row(a->moe, a->bfloat16, r, n, other);
        scale = root(other, n, a->eps);
        for (int64_t i = 0; i < n; i++) row[i] += other[i] * scale * a->moe_weight[i];
    }
    scale = root(row, n, a->eps);
    read_row(a->x, a->bfloat16, r, n, other);
    for (int64_t i = 0; i < n; i++) row[i] = (other[i] + row[i] * scale * a->weight[i]) * a->scalar;
    write_row(row, n, a->out, a->bfloat16, r * n);
}

/* A `Combine` of all rows. */
int splitinfer_combine(const void *x, const void *dense, const void *moe, int bfloat16, int64_t rows, int64_t n,
                       const float *moe_weight, const float *weight, float eps, float scalar, void *out,
                       int threads) {
    const Combine a = {x, dense, moe, bfloat16, n, moe_weight, weight, eps, scalar, out};
    return by_row(combine_row, &a, rows, 2 * n, threads);
}

typedef struct {
    Heads heads;
    const float *projected;
} ProjectedHeads;

static void projected_heads_row(const void *given, int64_t r, float *scratch) {
    const ProjectedHeads *a = given;
    heads_row(&a->heads, a->projected + r * a->heads.width, r, scratch);
}

/* Projections [rows, width] to normalised heads: the first `turning` times `weight` [turning, size] and rotated
   by cosine and sine [rows, size] (pairs (i, i + size / 2), the first half of sine negated) into `turned`
   [rows, turning, size]; the `values` heads from `first_value` on into `value` [rows, values, size], normalised
   if `value_norm`, else as they are. */
int splitinfer_heads(const float *projected, int64_t rows, int64_t width, int64_t size, int64_t turning,
                     int64_t first_value, int64_t values, int value_norm, const float *weight, const float *cosine,
                     const float *sine, float eps, void *turned, void *value, int bfloat16, int threads) {
    const ProjectedHeads a = {
        {width, size, turning, first_value, values, value_norm, weight, cosine, sine, eps, turned, value, bfloat16},
        projected,
    };
    return by_row(projected_heads_row, &a, rows, 2 * size, threads);
}

typedef struct {
    const float *x;
    float *out;
    int64_t n;
} Gated;

static void gated_of_rows(const void *given, int64_t r, float *scratch) {
    const Gated *a = given;
    (void)scratch;
    gated_row(a->x + r * 2 * a->n, a->n, a->out + r * a->n);
}

/* out [rows, n] = gelu(x[:, :n]) * x[:, n:], float32. */
int splitinfer_gated(const float *x, int64_t rows, int64_t n, float *out, int threads) {
    const Gated a = {x, out, n};
    return by_row(gated_of_rows, &a, rows, 1, threads);
}

typedef struct {
    const float *const *parts;
    int count, bfloat16;
    int64_t n;
    void *out;
} Sum;

static void sum_row(const void *given, int64_t r, float *row) {
    const Sum *a = given;
    memcpy(row, a->parts[0] + r * a->n, (size_t)a->n * 4);
    for (int p = 1; p < a->count; p++)
        for (int64_t i = 0; i < a->n; i++) row[i] += a->parts[p][r * a->n + i];
    write_row(row, a->n, a->out, a->bfloat16, r * a->n);
}

/* out [rows, n] = the sum of `count` parts [rows, n] float32, in their order and rounded once. */
int splitinfer_sum(const float *const *parts, int count, int64_t rows, int64_t n, void *out, int out_bfloat16,
                   int threads) {
    const Sum a = {parts, count, out_bfloat16, n, out};
    return by_row(sum_row, &a, rows, n, threads);
}

/* The k largest of scores [rows, n] in falling order (of equals the first) into index [rows, k]; their softmax
   times scale[index] into weights [rows, k]. A NaN is never chosen before a number. */
int splitinfer_choose(const float *scores, int64_t rows, int64_t n, int64_t k, const float *scale, int16_t *index,
                      float *weights) {
    for (int64_t r = 0; r < rows; r++) {
        const float *row = scores + r * n;
        int16_t *chosen = index + r * k;
        int64_t held = 0;
        for (int64_t e = 0; e < n; e++) {
            int64_t place = held;
            for (; place > 0; place--) {
                float other = row[chosen[place - 1]];
                if (!(row[e] > other || (isnan(other) && !isnan(row[e])))) break;
            }
            if (place == k) continue;
            if (held < k) held++;
            for (int64_t i = held - 1; i > place; i--) chosen[i] = chosen[i - 1];
            chosen[place] = (int16_t)e;
        }
        float sum = 0.0f, *w = weights + r * k;
        for (int64_t i = 0; i < k; i++) sum += w[i] = expf(row[chosen[i]] - row[chosen[0]]);
        for (int64_t i = 0; i < k; i++) w[i] = w[i] / sum * scale[chosen[i]];
    }
    return 0;
}
