/* Stored weights as vectors, and what one group of 32 columns of them adds to a product. */
#ifndef SPLITINFER_WIDEN_H
#define SPLITINFER_WIDEN_H

#include "products.h"

enum { NV = 16 / VL }; /* vectors of 16 channels, or of 32 columns' pairs */

/* ---- int4: a vector holds channels ---- */

/* Halves of a group's scales: factors and offsets of 16 channels, or factors alone. */
INLINE int64_t scale_halves(const Matrix *m) { return m->group ? 16 : 32; }

/* One group of 16 channels at `w`: their sums over 32 columns for R rows of fixed-point numbers. */
INLINE void int4_group(const int R, const uint32_t *w, const int16_t *const *x, vi (*acc)[NV]) {
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
