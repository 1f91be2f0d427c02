/* Products of int8 and int4 weights with rows in fixed point. Inside 32 columns sums are whole numbers, hence
   exact in any order and at twice the rate of floats; the groups' sums are added as floats, in order. */
#include "widen.h"

#include <math.h>

enum {
    LARGEST = 32639, /* of a fixed-point number: 127 * 256 + 127 */
    AHEAD = 8,       /* groups of weights that are asked for before they are needed */
};

/* ---- rows ---- */

/* 32 floats to integers; factor and sum go to `terms`. Numbers below 1e-30 count as 0. */
INLINE void to_fixed(const float *x, int32_t *integers, float *terms) {
    vi largest = (vi){}, sum = (vi){};
    for (int i = 0; i < 32; i += VL) {
        vi size = (vi)load(x + i) & 0x7fffffff; /* floats without sign compare as integers, NaN above all */
        vi larger_one = size > largest;
        largest = (size & larger_one) | (largest & ~larger_one);
    }
    int32_t most = 0, whole = 0;
    for (int i = 0; i < VL; i++) most = largest[i] > most ? largest[i] : most;
    float size;
    memcpy(&size, &most, 4);
    const int lost = most >= 0x7f800000; /* infinite or NaN */
    const float inverse = lost || size < 1e-30f ? 0.0f : LARGEST / size;
    const vf middle = all(12582912.0f); /* 1.5 * 2^23: a sum's low bits are the rounded number */
    for (int i = 0; i < 32; i += VL) {
        vi integer = lost ? (vi){} : (vi)(load(x + i) * all(inverse) + middle) - (vi)middle;
        *(vi_any *)(integers + i) = (vi_any)integer;
        sum += integer;
    }
    for (int i = 0; i < VL; i++) whole += sum[i];
    terms[0] = lost ? NAN : size / LARGEST;
    terms[1] = (float)whole;
}

/* What int4 wants of every 8 columns, for few rows: the high bytes of 0 2 4 6 1 3 5 7, then their low bytes, all
   signed. For many: 0 4 1 5 2 6 3 7. */
INLINE void order_few(const int32_t *integers, int8_t *to) {
    for (int d = 0; d < 32; d += 8, to += 16)
        for (int i = 0; i < 8; i++) {
            int32_t number = integers[d + i / 4 + i % 4 * 2];
            to[i] = (int8_t)((number + 128) >> 8);
            to[8 + i] = (int8_t)number;
        }
}
INLINE void order_many(const int32_t *integers, int16_t *to) {
    for (int d = 0; d < 32; d += 8)
        for (int i = 0; i < 4; i++) {
            to[d + 2 * i] = (int16_t)integers[d + i];
            to[d + 2 * i + 1] = (int16_t)integers[d + 4 + i];
        }
}

void prepare_row(const Matrix *m, Rows rows, int64_t row) {
    if (m->format != INT4 && m->format != INT8) return;
    const float *x = rows.x + row * rows.stride;
    int16_t *fixed = (int16_t *)(rows.x + row * rows.stride); /* in place: each group is read before it is written */
    float *terms = rows.terms + row * rows.groups * 2;
    for (int64_t g = 0; g < rows.groups; g++, x += 32, fixed += 32, terms += 2) {
        int32_t integers[32];
        int16_t ordered[32];
        to_fixed(x, integers, terms);
        if (m->format == INT4 && rows.few) order_few(integers, (int8_t *)ordered);
        else if (m->format == INT4) order_many(integers, ordered);
        else
            for (int i = 0; i < 32; i++) ordered[i] = (int16_t)integers[i];
        memcpy(fixed, ordered, sizeof ordered);
    }
}

/* ---- int4: a vector holds channels, the sum runs over columns ---- */

/* Blocks of a tile stay apart: interleaved, their sums would not fit the registers. */
#define APART __asm__ volatile("" ::: "memory")

/* R rows, B blocks from `block` on, every `step`th: so many long runs of memory are read at once. */
INLINE void int4_tile(const int R, const int B, const int few, const Matrix *m, Rows rows, const int32_t *which,
                      int64_t block, int64_t step, float *out) {
    const int64_t words = rows.stride / 8 * 16, halves = scale_halves(m);
    const uint32_t *w = (const uint32_t *)m->weight + block * words;
    const uint16_t *s = m->scales + block * rows.groups * halves;
    const int16_t *x[4];
    const float *terms[4];
    for (int r = 0; r < R; r++) {
        x[r] = fixed_row(rows, which[r]);
        terms[r] = rows.terms + which[r] * rows.groups * 2;
    }
    vf total[4][2][NV];
    memset(total, 0, sizeof total);
    const int64_t jump = rows.groups > AHEAD ? rows.groups - AHEAD : 0;
    int64_t ahead = AHEAD * 256, scales_ahead = AHEAD * halves;
    for (int64_t g = 0; g < rows.groups; g++) {
        if (g == jump && (block + 1) % step == 0) { /* after the last tile of a unit comes the next unit's first */
            ahead += (B - 1) * step * words * 4;
            scales_ahead += (B - 1) * step * rows.groups * halves;
        }
        UNROLL for (int b = 0; b < B; b++) {
            APART;
            const uint32_t *words_at = w + b * step * words + g * 64;
            const uint16_t *scales = s + (b * step * rows.groups + g) * halves;
            UNROLL for (int line = 0; line < 4; line++)
                __builtin_prefetch((const char *)(words_at + line * 16) + ahead);
            __builtin_prefetch(scales + scales_ahead);
            vi acc[4][NV];
            int4_group(R, few, words_at, x, acc);
            UNROLL for (int v = 0; v < NV; v++) UNROLL for (int r = 0; r < R; r++) {
                vf sum = int4_scaled(scales, halves, v, acc[r][v], terms[r][2 * g + 1]);
                total[r][b][v] = fused(sum, all(terms[r][2 * g]), total[r][b][v]);
            }
        }
        UNROLL for (int r = 0; r < R; r++) x[r] += 32;
    }
    for (int r = 0; r < R; r++) for (int b = 0; b < B; b++)
        for (int v = 0; v < NV; v++) store(out + r * UNIT + b * step * 16 + v * VL, total[r][b][v]);
}

/* All blocks of a unit for R rows: B at a time, then what is left one by one. */
#define BLOCKS(R, B, few) \
    { const int64_t step = blocks / B; \
      for (int64_t b = 0; b < step; b++) int4_tile(R, B, few, m, rows, which, first + b, step, out + b * 16); \
      for (int64_t b = step * B; b < blocks; b++) int4_tile(R, 1, few, m, rows, which, first + b, 1, out + b * 16); }

void int4_unit(const Matrix *m, Rows rows, const int32_t *which, int64_t count, int64_t unit, float *out) {
    const int64_t first = unit * 4, blocks = smaller(4, (m->n + 15) / 16 - first), step = rows.few ? FEWEST : 4;
    for (; count > 0; count -= step, which += step, out += step * UNIT) {
        if (rows.few && count == 1) BLOCKS(1, 2, 1)
        else if (rows.few) BLOCKS(2, 1, 1)
        else if (count == 1) BLOCKS(1, 2, 0)
        else if (count == 2) BLOCKS(2, 1, 0)
        else if (count == 3) BLOCKS(3, 1, 0)
        else BLOCKS(4, 1, 0)
    }
}

/* ---- int8: a vector holds columns, its lanes are added at the end ---- */

/* Group `g` of 32 columns for R rows and C channels, which lie `apart` bytes from each other at `w`. */
INLINE void int8_group(const int R, const int C, const int8_t *w, int64_t apart, const uint16_t *scales,
                       int64_t scales_apart, const int16_t *const *x, const float *const *terms, int64_t g,
                       vf (*total)[8]) {
    UNROLL for (int c = 0; c < C; c++) {
        vi weight[NV];
        UNROLL for (int v = 0; v < NV; v++) weight[v] = load_int8(w + c * apart + v * 2 * VL);
        float scale = scales ? one_float16(scales[c * scales_apart]) : 1.0f;
        UNROLL for (int r = 0; r < R; r++) {
            vi acc = (vi){};
            UNROLL for (int v = 0; v < NV; v++)
                acc = dot_pairs(acc, weight[v], load_pairs(x[r] + g * 32 + v * 2 * VL));
            vf factor = all(scales ? terms[r][2 * g] * scale : terms[r][2 * g]);
            total[r][c] = fused(from_integers(acc), factor, total[r][c]);
        }
    }
}

/* R rows, C channels from channel n on, every `step`th. */
INLINE void int8_tile(const int R, const int C, const Matrix *m, Rows rows, const int32_t *which, int64_t n,
                      int64_t step, float *out) {
    const int64_t k = m->k, full = k / 32, groups = k / m->group, apart = step * k, scales_apart = step * groups;
    const int8_t *w = (const int8_t *)m->weight + n * k;
    const uint16_t *scales = m->scales + n * groups;
    const int16_t *x[4];
    const float *terms[4];
    for (int r = 0; r < R; r++) {
        x[r] = fixed_row(rows, which[r]);
        terms[r] = rows.terms + which[r] * rows.groups * 2;
    }
    vf total[4][8];
    memset(total, 0, sizeof total);
    if (groups == 1)
        for (int64_t g = 0; g < full; g++) {
            /* Fewer rows leave the processor time to fetch by itself; asking would only be in its way. */
            if (R == 4) UNROLL for (int c = 0; c < C; c++) __builtin_prefetch(w + c * apart + k + g * 32);
            int8_group(R, C, w + g * 32, apart, 0, 0, x, terms, g, total);
        }
    else
        for (int64_t g = 0; g < full; g++)
            int8_group(R, C, w + g * 32, apart, scales + g * 32 / m->group, scales_apart, x, terms, g, total);
    if (full * 32 < k) { /* one scale per channel, then */
        int8_t end[C][32];
        memset(end, 0, sizeof end);
        for (int c = 0; c < C; c++) memcpy(end[c], w + c * apart + full * 32, (size_t)(k - full * 32));
        int8_group(R, C, end[0], 32, 0, 0, x, terms, full, total);
    }
    for (int r = 0; r < R; r++) for (int c = 0; c < C; c++) {
        float sum = sum_of(total[r][c]);
        out[r * UNIT + c * step] = groups == 1 ? sum * one_float16(scales[c * step]) : sum;
    }
}

/* All channels of a unit for R rows: C at a time, then what is left one by one. Those of a tile lie far from each
   other, each with the next tile's behind it: C long runs of memory are read at once, which two cores do up to a
   third faster than one run or neighbouring rows. */
#define ACROSS(R, C) \
    { const int64_t step = channels / C; \
      for (int64_t c = 0; c < step; c++) int8_tile(R, C, m, rows, which, n + c, step, out + c); \
      for (int64_t c = step * C; c < channels; c++) int8_tile(R, 1, m, rows, which, n + c, 1, out + c); }

void int8_unit(const Matrix *m, Rows rows, const int32_t *which, int64_t count, int64_t unit, float *out) {
    int64_t n = unit * UNIT, channels = smaller(UNIT, m->n - n);
    for (; count >= 4; count -= 4, which += 4, out += 4 * UNIT) ACROSS(4, 2)
    switch (count) {
    case 1: ACROSS(1, 8) break;
    case 2: ACROSS(2, 4) break;
    case 3: ACROSS(3, 4) break;
    default: break;
    }
}
