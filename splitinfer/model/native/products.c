/* Products of weight matrices with rows, in every format. See products.h. */
#include "widen.h"

#include <stdlib.h>

int64_t rows_floats(const Matrix *m, int64_t rows) { return rows * (padded(m->k) + padded(m->k) / 32); }

Rows rows_at(const Matrix *m, int64_t rows, float *memory) {
    int64_t stride = padded(m->k);
    return (Rows){memory, memory + rows * stride, stride, stride / 32};
}

void prepare_row(const Matrix *m, Rows rows, int64_t row) {
    /* A nibble is masked in place, never shifted down: its value is nibble * 16^j, so the row is divided by
       16^j beforehand, which is exact. The last one is shifted: as it stands it would be the sign. */
    static const float nibble_factor[8] = {1.0f, 0x1p-4f, 0x1p-8f, 0x1p-12f, 0x1p-16f, 0x1p-20f, 0x1p-24f, 1.0f};
    if (m->format != INT4) return;
    float *x = rows.x + row * rows.stride, *sums = rows.sums + row * rows.groups;
    for (int64_t g = 0; g < rows.groups; g++, x += 32) {
        vf sum = load(x);
        for (int i = VL; i < 32; i += VL) sum += load(x + i);
        sums[g] = sum_of(sum);
        for (int i = 0; i < 32; i++) x[i] *= nibble_factor[i % 8];
    }
}

/* ---- int4: a vector holds channels, the sum runs over columns ---- */

/* Words are loaded again for every nibble: held in registers they would push the sums out of them. */
#define AGAIN __asm__ volatile("" ::: "memory")

INLINE void scaled(const uint16_t *scales, int64_t halves, int v, float sum, vf acc, vf *total) {
    vf factor = load_float16(scales + v * VL);
    if (halves == 16)
        *total = fused(factor, acc + all(-8.0f * sum), *total);
    else
        *total = fused(load_float16(scales + 16 + v * VL), all(sum), fused(factor, acc, *total));
}

/* R rows, B blocks: nibbles are widened in registers. */
INLINE void int4_tile(const int R, const int B, const Matrix *m, Rows rows, const int32_t *which,
                      int64_t block, float *out) {
    const int64_t words = rows.stride / 8 * 16, group = scale_halves(m), halves = rows.groups * group;
    const uint32_t *w = (const uint32_t *)m->weight + block * words;
    const uint16_t *s = m->scales + block * halves;
    const float *x[6];
    for (int r = 0; r < R; r++) x[r] = rows.x + which[r] * rows.stride;
    vf total[4][4][NV];
    memset(total, 0, sizeof total);
    for (int64_t g = 0; g < rows.groups; g++) {
        vf acc[4][4][NV];
        UNROLL for (int r = 0; r < R; r++) UNROLL for (int b = 0; b < B; b++)
            UNROLL for (int v = 0; v < NV; v++) acc[r][b][v] = (vf){};
        for (int d = 0; d < 4; d++) {
            UNROLL for (int j = 0; j < 8; j++) {
                AGAIN;
                UNROLL for (int b = 0; b < B; b++) UNROLL for (int v = 0; v < NV; v++) {
                    vf f = nibbles((vu)*(const vu_any *)(w + b * words + (g * 4 + d) * 16 + v * VL), j);
                    UNROLL for (int r = 0; r < R; r++)
                        acc[r][b][v] = fused(f, all(x[r][g * 32 + d * 8 + j]), acc[r][b][v]);
                }
            }
        }
        UNROLL for (int r = 0; r < R; r++) UNROLL for (int b = 0; b < B; b++)
            UNROLL for (int v = 0; v < NV; v++)
                scaled(s + b * halves + g * group, group, v, rows.sums[which[r] * rows.groups + g], acc[r][b][v],
                       &total[r][b][v]);
    }
    for (int r = 0; r < R; r++) for (int b = 0; b < B; b++)
        for (int v = 0; v < NV; v++) store(out + r * UNIT + b * 16 + v * VL, total[r][b][v]);
}

/* R of many rows against one group already widened to `f`. */
INLINE void int4_group_tile(const int R, const vf *f, const uint16_t *scales, int64_t halves, Rows rows,
                            const int32_t *which, int64_t g, vf *total) {
    const float *x[6];
    UNROLL for (int r = 0; r < R; r++) x[r] = rows.x + which[r] * rows.stride + g * 32;
    vf acc[6][NV];
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int v = 0; v < NV; v++) acc[r][v] = (vf){};
    for (int k = 0; k < 32; k++)
        UNROLL for (int r = 0; r < R; r++) UNROLL for (int v = 0; v < NV; v++)
            acc[r][v] = fused(f[k * NV + v], all(x[r][k]), acc[r][v]);
    for (int r = 0; r < R; r++)
        for (int v = 0; v < NV; v++)
            scaled(scales, halves, v, rows.sums[which[r] * rows.groups + g], acc[r][v], total + r * NV + v);
}

static void int4_many(const Matrix *m, Rows rows, const int32_t *which, int64_t count, int64_t block,
                      float *out) {
    const uint32_t *w = (const uint32_t *)m->weight + block * (rows.stride / 8 * 16);
    const int64_t group = scale_halves(m);
    const uint16_t *s = m->scales + block * rows.groups * group;
    vf total[CHUNK * NV], f[32 * NV];
    memset(total, 0, sizeof total);
    for (int64_t g = 0; g < rows.groups; g++) {
        for (int d = 0; d < 4; d++) for (int v = 0; v < NV; v++) {
            vu word = (vu)*(const vu_any *)(w + (g * 4 + d) * 16 + v * VL);
            UNROLL for (int j = 0; j < 8; j++) f[(d * 8 + j) * NV + v] = nibbles(word, j);
        }
        int64_t r = 0;
        for (; r + 6 <= count; r += 6) int4_group_tile(6, f, s + g * group, group, rows, which + r, g, total + r * NV);
        for (; r + 2 <= count; r += 2) int4_group_tile(2, f, s + g * group, group, rows, which + r, g, total + r * NV);
        if (r < count) int4_group_tile(1, f, s + g * group, group, rows, which + r, g, total + r * NV);
    }
    for (int64_t r = 0; r < count; r++)
        for (int v = 0; v < NV; v++) store(out + r * UNIT + v * VL, total[r * NV + v]);
}

static void int4_unit(const Matrix *m, Rows rows, const int32_t *which, int64_t count, int64_t unit,
                      float *out) {
    int64_t block = unit * 4, end = smaller(block + 4, (m->n + 15) / 16);
    if (count == 1 && end - block == 4) return int4_tile(1, 4, m, rows, which, block, out);
    for (; count == 2 && end - block >= 2; block += 2, out += 32) int4_tile(2, 2, m, rows, which, block, out);
    for (; block < end; block++, out += 16) {
        switch (count) {
        case 1: int4_tile(1, 1, m, rows, which, block, out); break;
        case 2: int4_tile(2, 1, m, rows, which, block, out); break;
        case 3: int4_tile(3, 1, m, rows, which, block, out); break;
        case 4: int4_tile(4, 1, m, rows, which, block, out); break;
        default: int4_many(m, rows, which, count, block, out);
        }
    }
}

/* ---- float32, bfloat16, int8: a vector holds columns, its lanes are added at the end ---- */

/* R rows, C channels from channel n on. */
INLINE void dot_tile(const int format, const int R, const int C, const Matrix *m, Rows rows,
                     const int32_t *which, int64_t n, float *out) {
    const int64_t k = m->k, groups = format == INT8 ? k / m->group : 1, length = k / groups;
    const float *x[6];
    for (int r = 0; r < R; r++) x[r] = rows.x + which[r] * rows.stride;
    vf total[6][8];
    memset(total, 0, sizeof total);
    for (int64_t g = 0; g < groups; g++) {
        vf acc[6][8];
        UNROLL for (int r = 0; r < R; r++) UNROLL for (int c = 0; c < C; c++) acc[r][c] = (vf){};
        int64_t i = g * length, end = i + length;
        for (; i + VL <= end; i += VL)
            UNROLL for (int c = 0; c < C; c++) {
                vf f = widened(format, m->weight, (n + c) * k + i);
                UNROLL for (int r = 0; r < R; r++) acc[r][c] = fused(f, load(x[r] + i), acc[r][c]);
            }
        if (i < end) /* the rows are padded with zeros, or the next group's columns meet zeros of `end` */
            for (int c = 0; c < C; c++) {
                vf f = widened_end(format, m->weight, (n + c) * k + i, end - i);
                for (int r = 0; r < R; r++) acc[r][c] = fused(f, load(x[r] + i), acc[r][c]);
            }
        UNROLL for (int r = 0; r < R; r++) UNROLL for (int c = 0; c < C; c++)
            total[r][c] = format == INT8
                              ? fused(all(one_float16(m->scales[(n + c) * groups + g])), acc[r][c], total[r][c])
                              : acc[r][c];
    }
    for (int r = 0; r < R; r++) for (int c = 0; c < C; c++) out[r * UNIT + c] = sum_of(total[r][c]);
}

/* All channels of a unit for R rows: C at a time, then what is left one by one. */
#define ACROSS(R, C) \
    { int64_t c = 0; \
      for (; c + C <= channels; c += C) dot_tile(format, R, C, m, rows, which, n + c, out + c); \
      for (; c < channels; c++) dot_tile(format, R, 1, m, rows, which, n + c, out + c); }

INLINE void dot_unit(const int format, const Matrix *m, Rows rows, const int32_t *which, int64_t count,
                     int64_t unit, float *out) {
    int64_t n = unit * UNIT, channels = smaller(UNIT, m->n - n);
    for (; count >= 6; count -= 6, which += 6, out += 6 * UNIT) ACROSS(6, 2)
    switch (count) {
    case 1: ACROSS(1, 8) break;
    case 2: ACROSS(2, 4) break;
    case 3: ACROSS(3, 4) break;
    case 4: ACROSS(4, 2) break;
    case 5: ACROSS(5, 2) break;
    default: break;
    }
}

void unit_product(const Matrix *m, Rows rows, const int32_t *which, int64_t count, int64_t unit, float *out) {
    static const int32_t in_order[CHUNK] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15,
                                            16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31,
                                            32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42, 43, 44, 45, 46, 47};
    if (!which) which = in_order;
    switch (m->format) {
    case FLOAT32: dot_unit(FLOAT32, m, rows, which, count, unit, out); break;
    case BFLOAT16: dot_unit(BFLOAT16, m, rows, which, count, unit, out); break;
    case INT8: dot_unit(INT8, m, rows, which, count, unit, out); break;
    default: int4_unit(m, rows, which, count, unit, out);
    }
}

void product_pieces(const Matrix *matrices, int count, Rows prepared, int64_t rows, void *out, int out_bfloat16) {
    const int64_t chunks = (rows + CHUNK - 1) / CHUNK;
    int64_t width = 0, units = 0;
    for (int i = 0; i < count; i++) width += matrices[i].n, units += units_of(matrices[i].n);
#pragma omp for schedule(dynamic)
    for (int64_t piece = 0; piece < chunks * units; piece++) {
        float part[CHUNK * UNIT];
        int64_t first = piece / units * CHUNK, unit = piece % units, before = 0;
        int64_t held = smaller(CHUNK, rows - first);
        const Matrix *m = matrices;
        for (; unit >= units_of(m->n); m++) unit -= units_of(m->n), before += m->n;
        Rows chunk = prepared;
        chunk.x += first * prepared.stride;
        chunk.sums += first * prepared.groups;
        unit_product(m, chunk, 0, held, unit, part);
        int64_t channels = smaller(UNIT, m->n - unit * UNIT);
        for (int64_t r = 0; r < held; r++)
            write_row(part + r * UNIT, channels, out, out_bfloat16,
                      (first + r) * width + before + unit * UNIT);
    }
}

/* out [rows, n_0 + n_1 + ...] = x [rows, k] times each of `count` matrices transposed, which agree in k and
   format; x and out are float32, or bfloat16 if so flagged. Returns 0, or -1 without memory. */
int splitinfer_product(const Matrix *matrices, int count, const void *x, int x_bfloat16, int64_t rows, void *out,
                       int out_bfloat16, int threads) {
    const int64_t k = matrices->k;
    int64_t width = 0;
    for (int i = 0; i < count; i++) width += matrices[i].n;
    float *memory = aligned_alloc(64, ((size_t)rows_floats(matrices, rows) * 4 + 63) / 64 * 64);
    if (!memory) return -1;
    Rows prepared = rows_at(matrices, rows, memory);
#pragma omp parallel num_threads(threads) if (rows * width * k > PARALLEL_FROM)
    {
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; r++) {
            copy_row(x, x_bfloat16, r * k, k, prepared.x + r * prepared.stride, prepared.stride);
            prepare_row(matrices, prepared, r);
        }
        product_pieces(matrices, count, prepared, rows, out, out_bfloat16);
    }
    free(memory);
    return 0;
}
