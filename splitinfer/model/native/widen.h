/* Stored weights as floats, a vector at a time. */
#ifndef SPLITINFER_WIDEN_H
#define SPLITINFER_WIDEN_H

#include "products.h"

/* ---- int4: a vector holds channels ---- */

enum { NV = 16 / VL }; /* vectors in a block of 16 channels */

/* Nibble j of each word, times 16^j: see `prepare_row`. */
INLINE vf nibbles(vu word, int j) {
    if (j == 7) return from_integers((vi)(word >> 28));
    return from_integers((vi)(word & (15u << 4 * j)));
}

/* Halves of a group's scales: factors and offsets of 16 channels, or factors alone. */
INLINE int64_t scale_halves(const Matrix *m) { return m->group ? 16 : 32; }

/* ---- float32, bfloat16, int8: a vector holds columns ---- */

INLINE vf widened(const int format, const void *w, int64_t i) {
    if (format == FLOAT32) return load((const float *)w + i);
    if (format == BFLOAT16) return load_bfloat16((const uint16_t *)w + i);
    return load_int8((const int8_t *)w + i);
}

INLINE vf widened_end(const int format, const void *w, int64_t i, int64_t count) { /* fewer than VL columns */
    float end[VL];
    memset(end, 0, sizeof end);
    for (int64_t c = 0; c < count; c++) {
        if (format == FLOAT32) end[c] = ((const float *)w)[i + c];
        else if (format == BFLOAT16) end[c] = one_bfloat16(((const uint16_t *)w)[i + c]);
        else end[c] = ((const int8_t *)w)[i + c];
    }
    return load(end);
}

#endif
