/* Stored weights as vectors, and what one group of 32 columns of them adds to a product. */
#ifndef SPLITINFER_WIDEN_H
#define SPLITINFER_WIDEN_H

#include "products.h"

enum { NV = 16 / VL }; /* vectors of 16 channels, or of 32 columns' pairs */

/* ---- int4: a vector holds channels ---- */

/* Halves of a group's scales: factors and offsets of 16 channels, or factors alone. */
INLINE int64_t scale_halves(const Matrix *m) { return m->group ? 16 : 32; }

/* One group of 16 channels at `w`: their sums over 32 columns for R <= 2 rows of fixed-point numbers. Each number is
   256 * high + low, both signed bytes, of 8 columns as in `order_few`; sums of high and low stay apart. A fifth fewer instructions for one row. */
INLINE void int4_few(const int R, const uint32_t *w, const int16_t *const *x, vi (*acc)[NV]) {
    vi high[2][NV], low[2][NV];
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int v = 0; v < NV; v++) high[r][v] = low[r][v] = (vi){};
    UNROLL for (int d = 0; d < 4; d++) UNROLL for (int odd = 0; odd < 2; odd++) {
        vi weight[NV];
        UNROLL for (int v = 0; v < NV; v++)
            weight[v] = (vi)((vu)*(const vu_any *)(w + d * 16 + v * VL) >> 4 * odd) & 0x0f0f0f0f;
        UNROLL for (int r = 0; r < R; r++) {
            vi top = all_pairs(x[r] + d * 8 + odd * 2), rest = all_pairs(x[r] + d * 8 + 4 + odd * 2);
            UNROLL for (int v = 0; v < NV; v++) {
                high[r][v] = dot_bytes(high[r][v], weight[v], top);
                low[r][v] = dot_bytes(low[r][v], weight[v], rest);
                SETTLE(high[r][v]);
                SETTLE(low[r][v]);
            }
        }
    }
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int v = 0; v < NV; v++)
        acc[r][v] = whole_sum(high[r][v], low[r][v]);
}

/* The same of R <= 4 rows whose numbers are whole: more unpacking, fewer sums to hold. */
INLINE void int4_many(const int R, const uint32_t *w, const int16_t *const *x, vi (*acc)[NV]) {
    UNROLL for (int d = 0; d < 4; d++) {
        vi word[NV];
        UNROLL for (int v = 0; v < NV; v++) word[v] = (vi)(vu)*(const vu_any *)(w + d * 16 + v * VL);
        UNROLL for (int j = 0; j < 4; j++) {
            vi pair[NV]; /* columns j and j + 4 */
            UNROLL for (int v = 0; v < NV; v++) pair[v] = nibble_pairs(word[v], j);
            UNROLL for (int r = 0; r < R; r++) {
                vi row = all_pairs(x[r] + d * 8 + j * 2);
                UNROLL for (int v = 0; v < NV; v++) {
                    acc[r][v] = dot_pairs(d + j ? acc[r][v] : (vi){}, pair[v], row);
                    SETTLE(acc[r][v]);
                }
            }
        }
    }
}

/* Whichever of the two the rows were prepared for. */
INLINE void int4_group(const int R, const int few, const uint32_t *w, const int16_t *const *x, vi (*acc)[NV]) {
    if (few) int4_few(R, w, x, acc);
    else int4_many(R, w, x, acc);
}

/* Vector v of such sums with the group's scales: of weights times the row's integers, which add up to `whole`. */
INLINE vf int4_scaled(const uint16_t *scales, int64_t halves, int v, vi acc, float whole) {
    vf factor = load_float16(scales + v * VL);
    if (halves == 16) return factor * fused(all(-8.0f), all(whole), from_integers(acc)); /* whole, hence exact */
    return fused(factor, from_integers(acc), load_float16(scales + 16 + v * VL) * all(whole));
}

/* ---- float32, bfloat16: a vector holds columns ---- */

INLINE vf widened(const int format, const void *w, int64_t i) {
    return format == FLOAT32 ? load((const float *)w + i) : load_bfloat16((const uint16_t *)w + i);
}

INLINE vf widened_end(const int format, const void *w, int64_t i, int64_t count) { /* fewer than VL columns */
    float end[VL];
    memset(end, 0, sizeof end);
    for (int64_t c = 0; c < count; c++)
        end[c] = format == FLOAT32 ? ((const float *)w)[i + c] : one_bfloat16(((const uint16_t *)w)[i + c]);
    return load(end);
}

#endif
