/* One row's way through what lies between the products: shared by rows.c and stretches.c. */
#ifndef SPLITINFER_ROWS_H
#define SPLITINFER_ROWS_H

#include "products.h"

#include <math.h>
#include <stdlib.h>

/* Floats in whole lines of the cache, and memory for so many. */
INLINE int64_t lines(int64_t floats) { return (floats + 15) / 16 * 16; }
INLINE float *team_memory(int64_t floats) { return aligned_alloc(64, (size_t)lines(floats) * 4); }

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
INLINE void residual_row(const Residual *a, int64_t r, float *own, float *row) {
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
INLINE void heads_row(const Heads *a, const float *from, int64_t r, float *head) {
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

/* gelu(gate) * up, `up` following `gate`: [n] each. */
INLINE void gated_row(const float *gate, int64_t n, float *to) {
    const float *up = gate + n;
    int64_t i = 0;
    for (; i + VL <= n; i += VL) store(to + i, gelu(load(gate + i)) * load(up + i));
    for (; i < n; i++) to[i] = (gelu(all(gate[i])) * all(up[i]))[0];
}

/* See rows.c. */
int splitinfer_choose(const float *scores, int64_t rows, int64_t n, int64_t k, const float *scale, int16_t *index,
                      float *weights);

/* out = (x + norm(dense + norm(moe) * moe_weight) * weight) * scalar, all [rows, n] of one type; without `moe` (NULL)
   the inner norm falls away. */
typedef struct {
    const void *x, *dense, *moe;
    int bfloat16;
    int64_t n;
    const float *moe_weight, *weight;
    float eps, scalar;
    void *out;
} Combine;

/* Row r of a `Combine`; scratch [2 n]. */
void combine_row(const void *given, int64_t r, float *scratch);

/* See rows.c. */
int splitinfer_sum(const float *const *parts, int count, int64_t rows, int64_t n, void *out, int out_bfloat16,
                   int threads);

/* See attention.c. */
int splitinfer_attend(const void *queries, const void *keys, const void *values, const uint16_t *key_scales,
                      const uint16_t *value_scales, void *out, int bfloat16, int64_t rows, int64_t heads,
                      int64_t kv_heads, int64_t size, int64_t seen, int64_t kv_stride, int64_t scale_stride,
                      int64_t window, int threads);

#endif
