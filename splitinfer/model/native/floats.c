/* Products of float32 and bfloat16 weights: a vector holds columns, its lanes are added at the end. */
#include "widen.h"

/* R rows, C channels from channel n on, every `step`th. */
INLINE void dot_tile(const int format, const int R, const int C, const Matrix *m, Rows rows,
                     const int32_t *which, int64_t n, int64_t step, float *out) {
    const int64_t k = m->k, first = n * k, apart = step * k;
    const float *x[6];
    for (int r = 0; r < R; r++) x[r] = rows.x + which[r] * rows.stride;
    vf acc[6][8];
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int c = 0; c < C; c++) acc[r][c] = (vf){};
    int64_t i = 0;
    for (; i + VL <= k; i += VL)
        UNROLL for (int c = 0; c < C; c++) {
            vf f = widened(format, m->weight, first + c * apart + i);
            UNROLL for (int r = 0; r < R; r++) acc[r][c] = fused(f, load(x[r] + i), acc[r][c]);
        }
    if (i < k) /* the rows are padded with zeros */
        for (int c = 0; c < C; c++) {
            vf f = widened_end(format, m->weight, first + c * apart + i, k - i);
            for (int r = 0; r < R; r++) acc[r][c] = fused(f, load(x[r] + i), acc[r][c]);
        }
    for (int r = 0; r < R; r++) for (int c = 0; c < C; c++) out[r * UNIT + c * step] = sum_of(acc[r][c]);
}

/* All channels of a unit for R rows: C at a time, far from each other (see integers.c), then what is left. */
#define ACROSS(R, C) \
    { const int64_t step = channels / C; \
      for (int64_t c = 0; c < step; c++) dot_tile(format, R, C, m, rows, which, n + c, step, out + c); \
      for (int64_t c = step * C; c < channels; c++) dot_tile(format, R, 1, m, rows, which, n + c, 1, out + c); }

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

void float_unit(const Matrix *m, Rows rows, const int32_t *which, int64_t count, int64_t unit, float *out) {
    if (m->format == FLOAT32) dot_unit(FLOAT32, m, rows, which, count, unit, out);
    else dot_unit(BFLOAT16, m, rows, which, count, unit, out);
}
