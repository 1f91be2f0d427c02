/* Products in fixed point: sums that neither their order nor their grouping changes.

   Parts of 32 columns are summed as floats, in a fixed order, and rounded to whole multiples of 2^-36, which are
   added as 64-bit integers. Whoever adds which parts, on one node or on many, in slices at multiples of 32
   columns or whole: the sum is the same. */
#include "widen.h"

typedef float hf __attribute__((vector_size(VL * 2)));   /* half a vector, for its lanes as doubles fill one */
typedef double hd __attribute__((vector_size(VL * 4)));
typedef uint64_t hq __attribute__((vector_size(VL * 4)));
typedef uint32_t hu __attribute__((vector_size(VL * 2)));

enum { COLUMNS = 32, HALF = VL / 2 };
#define LARGEST 8192.0f /* of a part; 16,384 such parts fit into 64 bits */
#define SHIFT 0x1.8p16  /* the last bit of a double of this size counts 2^-36 */

INLINE uint64_t bits_of_shift(void) {
    double shift = SHIFT;
    uint64_t bits;
    memcpy(&bits, &shift, 8);
    return bits;
}

INLINE hu larger_bits(hu a, hu b) {
#if VL == 16
    return (hu)_mm256_max_epu32((__m256i)a, (__m256i)b);
#elif defined(__AVX2__)
    return (hu)_mm_max_epu32((__m128i)a, (__m128i)b);
#else
    hu mask = (hu)(a > b);
    return (a & mask) | (b & ~mask);
#endif
}
INLINE hf low_half(vf v) { hf half; memcpy(&half, &v, sizeof half); return half; }
INLINE hf high_half(vf v) { hf half; memcpy(&half, (char *)&v + sizeof half, sizeof half); return half; }

/* Adds a part to `sum`, and the bits of SHIFT with it. `largest` keeps the largest magnitude twice over, as bits:
   a NaN's are larger than any number's. */
INLINE void add_part(hq *sum, hf part, hu *largest) {
    *largest = larger_bits((hu)part + (hu)part, *largest);
    *sum += (hq)(__builtin_convertvector(part, hd) + SHIFT);
}

INLINE int out_of_range(hu largest) {
    float limit = LARGEST;
    uint32_t bits;
    memcpy(&bits, &limit, 4);
    int wrong = 0;
    for (int lane = 0; lane < HALF; lane++) wrong |= largest[lane] >= 2 * bits;
    return wrong;
}

/* R rows against one group of a block of 16 channels; a channel has a part of its own. */
INLINE void int4_group_fixed(const int R, const uint32_t *w, const uint16_t *scales, int64_t halves, Rows rows,
                             int64_t first, int64_t g, hq *total, hu *largest) {
    const int16_t *x[4];
    for (int r = 0; r < R; r++) x[r] = fixed_row(rows, first + r) + g * 32;
    vi acc[4][NV];
    if (R > FEWEST) int4_group(R, 0, w, x, acc);
    else int4_group(R, rows.few, w, x, acc);
    for (int r = 0; r < R; r++) for (int v = 0; v < NV; v++) {
        const float *terms = rows.terms + ((first + r) * rows.groups + g) * 2;
        vf part = int4_scaled(scales, halves, v, acc[r][v], terms[1]) * all(terms[0]);
        add_part(total + (r * NV + v) * 2, low_half(part), largest);
        add_part(total + (r * NV + v) * 2 + 1, high_half(part), largest);
    }
}

static void int4_block_fixed(const Matrix *m, Rows rows, int64_t count, int64_t block, uint64_t *const *sums,
                             int64_t to, hu *largest) {
    const uint32_t *w = (const uint32_t *)m->weight + block * (rows.stride / 8 * 16);
    const int64_t halves = scale_halves(m);
    const uint16_t *s = m->scales + block * rows.groups * halves;
    hq total[CHUNK * NV * 2];
    memset(total, 0, (size_t)count * NV * 2 * sizeof *total);
    for (int64_t g = 0; g < rows.groups; g++, s += halves, w += 64) {
        int64_t r = 0;
        for (; !rows.few && r + 4 <= count; r += 4) int4_group_fixed(4, w, s, halves, rows, r, g, total + r * NV * 2, largest);
        for (; r < count; r++) int4_group_fixed(1, w, s, halves, rows, r, g, total + r * NV * 2, largest);
    }
    const uint64_t shifts = (uint64_t)rows.groups * bits_of_shift();
    for (int64_t r = 0; r < count; r++)
        for (int c = 0; c < 16; c++) sums[r][to + c] += total[r * NV * 2 + c / HALF][c % HALF] - shifts;
}

/* One group of 32 columns, at column `from`, of R rows and C channels: a lane of half a vector is a part. */
INLINE void dot_group_fixed(const int format, const int R, const int C, const Matrix *m, Rows rows, int64_t first,
                            int64_t n, int64_t from, hf (*part)[4]) {
    const int64_t k = m->k, end = smaller(k, from + COLUMNS);
    const float *x = rows.x + first * rows.stride;
    vf acc[4][4];
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int c = 0; c < C; c++) acc[r][c] = (vf){};
    int64_t i = from;
    for (; i + VL <= end; i += VL)
        UNROLL for (int c = 0; c < C; c++) {
            vf f = widened(format, m->weight, (n + c) * k + i);
            UNROLL for (int r = 0; r < R; r++) acc[r][c] = fused(f, load(x + r * rows.stride + i), acc[r][c]);
        }
    if (i < end) /* the rows are padded with zeros */
        for (int c = 0; c < C; c++) {
            vf f = widened_end(format, m->weight, (n + c) * k + i, end - i);
            for (int r = 0; r < R; r++) acc[r][c] = fused(f, load(x + r * rows.stride + i), acc[r][c]);
        }
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int c = 0; c < C; c++)
        part[r][c] = low_half(acc[r][c]) + high_half(acc[r][c]);
}

/* The same of int8. */
INLINE void int8_group_fixed(const int R, const int C, const Matrix *m, Rows rows, int64_t first, int64_t n,
                             int64_t from, hf (*part)[4]) {
    const int64_t k = m->k, scales = k / m->group;
    UNROLL for (int c = 0; c < C; c++) {
        const int8_t *w = (const int8_t *)m->weight + (n + c) * k + from;
        int8_t end[COLUMNS];
        if (from + COLUMNS > k) {
            memset(end, 0, sizeof end);
            w = memcpy(end, w, (size_t)(k - from));
        }
        float scale = one_float16(m->scales[(n + c) * scales + from / m->group]);
        UNROLL for (int r = 0; r < R; r++) {
            vi acc = (vi){};
            UNROLL for (int v = 0; v < NV; v++)
                acc = dot_pairs(acc, load_int8(w + v * 2 * VL), load_pairs(fixed_row(rows, first + r) + from + v * 2 * VL));
            vf sum = from_integers(acc) * all(scale * rows.terms[((first + r) * rows.groups + from / COLUMNS) * 2]);
            part[r][c] = low_half(sum) + high_half(sum);
        }
    }
}

/* R rows, C channels from channel n on. */
INLINE void dot_fixed(const int format, const int R, const int C, const Matrix *m, Rows rows, int64_t first, int64_t n,
                      uint64_t *const *sums, int64_t to, hu *largest) {
    hq total[4][4];
    memset(total, 0, sizeof total);
    for (int64_t from = 0; from < m->k; from += COLUMNS) {
        hf part[4][4];
        if (format == INT8) int8_group_fixed(R, C, m, rows, first, n, from, part);
        else dot_group_fixed(format, R, C, m, rows, first, n, from, part);
        UNROLL for (int r = 0; r < R; r++) UNROLL for (int c = 0; c < C; c++)
            add_part(&total[r][c], part[r][c], largest);
    }
    const uint64_t shifts = (uint64_t)((m->k + COLUMNS - 1) / COLUMNS) * HALF * bits_of_shift();
    for (int r = 0; r < R; r++) for (int c = 0; c < C; c++) {
        uint64_t sum = 0;
        for (int lane = 0; lane < HALF; lane++) sum += total[r][c][lane];
        sums[first + r][to + c] += sum - shifts;
    }
}

INLINE void dot_unit_fixed(const int format, const Matrix *m, Rows rows, int64_t count, int64_t unit,
                           uint64_t *const *sums, hu *largest) {
    const int64_t n = unit * UNIT, channels = smaller(UNIT, m->n - n);
    int64_t r = 0;
    for (; r + 4 <= count; r += 4) {
        int64_t c = 0;
        for (; c + 2 <= channels; c += 2) dot_fixed(format, 4, 2, m, rows, r, n + c, sums, c, largest);
        for (; c < channels; c++) dot_fixed(format, 4, 1, m, rows, r, n + c, sums, c, largest);
    }
    for (; r < count; r++) {
        int64_t c = 0;
        for (; c + 4 <= channels; c += 4) dot_fixed(format, 1, 4, m, rows, r, n + c, sums, c, largest);
        for (; c < channels; c++) dot_fixed(format, 1, 1, m, rows, r, n + c, sums, c, largest);
    }
}

int unit_fixed(const Matrix *m, Rows rows, int64_t count, int64_t unit, uint64_t *const *sums) {
    hu largest = (hu){};
    switch (m->format) {
    case FLOAT32: dot_unit_fixed(FLOAT32, m, rows, count, unit, sums, &largest); break;
    case BFLOAT16: dot_unit_fixed(BFLOAT16, m, rows, count, unit, sums, &largest); break;
    case INT8: dot_unit_fixed(INT8, m, rows, count, unit, sums, &largest); break;
    default:
        for (int64_t b = 0; b < 4 && unit * 4 + b < (m->n + 15) / 16; b++)
            int4_block_fixed(m, rows, count, unit * 4 + b, sums, b * 16, &largest);
    }
    return out_of_range(largest);
}

/* The vectors that these files were compiled for: the same source and the same vectors round alike. */
const char *splitinfer_vectors(void) {
#if VL == 16
    return "avx512";
#elif defined(__AVX2__) && defined(__FMA__)
    return "avx2";
#else
    return "portable";
#endif
}
