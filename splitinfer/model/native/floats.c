/* Products of float32 and bfloat16 weights: a vector holds columns, its lanes are added at the end. */
#include "widen.h"

/* R rows, C channels from channel n on. */
INLINE void dot_tile(const int format, const int R, const int C, const Matrix *m, Rows rows,
                     const int32_t *which, int64_t n, float *out) {
    const int64_t k = m->k;
    const float *x[6];
    for (int r = 0; r < R; r++) x[r] = rows.x + which[r] * rows.stride;
    vf acc[6][8];
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int c = 0; c < C; c++) acc[r][c] = (vf){};
    int64_t i = 0;
    for (; i + VL <= k; i += VL)
        UNROLL for (int c = 0; c < C; c++) {
            vf f = widened(format, m->weight, (n + c) * k + i);
            UNROLL for (int r = 0; r < R; r++) acc[r][c] = fused(f, load(x[r] + i), acc[r][c]);
        }
    if (i < k) /* the rows are padded with zeros */
        for (int c = 0; c < C; c++) {
            vf f = widened_end(format, m->weight, (n + c) * k + i, k - i);
            for (int r = 0; r < R; r++) acc[r][c] = fused(f, load(x[r] + i), acc[r][c]);
        }
    for (int r = 0; r < R; r++) for (int c = 0; c < C; c++) out[r * UNIT + c] = sum_of(acc[r][c]);
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

void float_unit(const Matrix *m, Rows rows, const int32_t *which, int64_t count, int64_t unit, float *out) {
    if (m->format == FLOAT32) dot_unit(FLOAT32, m, rows, which, count, unit, out);
    else dot_unit(BFLOAT16, m, rows, which, count, unit, out);
}
