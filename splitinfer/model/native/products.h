/* A weight matrix in one of the stored formats, and its product with prepared rows. */
#ifndef SPLITINFER_PRODUCTS_H
#define SPLITINFER_PRODUCTS_H

#include "team.h"
#include "vectors.h"

enum { FLOAT32, BFLOAT16, INT8, INT4 };

/* [n, k]. FLOAT32, BFLOAT16 and INT8 are row-major. INT8 has float16 scales [n, k / group],
   `group` being k or a multiple of 32.
   INT4 is [ceil(n / 16), kp / 8, 16] words, kp = k padded to 32: a word holds 8 columns of one channel,
   the first in its low bits. Its float16 scales are [ceil(n / 16), kp / 32, 2, 16]: factor and offset of
   16 channels, weight = factor * nibble + offset; with a `group` [ceil(n / 16), kp / 32, 16], the factors only:
   weight = factor * (nibble - 8). */
typedef struct {
    int32_t format, group;
    int64_t n, k;
    const void *weight;
    const uint16_t *scales;
} Matrix;

/* Rows as the product wants them, padded with zeros to `stride`. For FLOAT32 and BFLOAT16 they are float32. For
   INT8 and INT4 every 32 columns are 16-bit fixed point, 32 of them in a row's `x`: column = factor * integer with
   |integer| <= 32639; `terms` holds the factor and the sum of the integers. INT4 wants them in another order
   (integers.c), of a step of `few` rows another than of many; no result depends on which. */
typedef struct {
    float *x, *terms;
    int64_t stride, groups;
    int few;
} Rows;

#define PARALLEL_FROM 65536 /* multiplications: below, waking a thread costs more than it saves */

/* Channels of one piece of work; rows that share a pass over its weights; rows at most that count as few. */
enum { UNIT = 64, CHUNK = 48, FEWEST = 2 };

INLINE int64_t padded(int64_t k) { return (k + 31) / 32 * 32; }
INLINE int64_t units_of(int64_t n) { return (n + UNIT - 1) / UNIT; }
INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

INLINE void copy_row(const void *x, int bfloat16, int64_t from, int64_t k, float *to, int64_t stride) {
    if (bfloat16) {
        const uint16_t *half = (const uint16_t *)x + from;
        int64_t i = 0;
        for (; i + VL <= k; i += VL) store(to + i, load_bfloat16(half + i));
        for (; i < k; i++) to[i] = one_bfloat16(half[i]);
    } else
        memcpy(to, (const float *)x + from, (size_t)k * 4);
    memset(to + k, 0, (size_t)(stride - k) * 4);
}
INLINE void write_row(const float *from, int64_t n, void *out, int bfloat16, int64_t to) {
    if (bfloat16) {
        uint16_t *half = (uint16_t *)out + to;
        int64_t i = 0;
        for (; i + VL <= n; i += VL) store_bfloat16(half + i, load(from + i));
        for (; i < n; i++) half[i] = to_bfloat16(from[i]);
    } else
        memcpy((float *)out + to, from, (size_t)n * 4);
}

/* Floats that so many `Rows` of this matrix need: x, then terms. */
int64_t rows_floats(const Matrix *m, int64_t rows);
Rows rows_at(const Matrix *m, int64_t rows, float *memory);

/* The rows from `first` on. */
INLINE Rows rows_from(Rows rows, int64_t first) {
    rows.x += first * rows.stride;
    rows.terms += first * rows.groups * 2;
    return rows;
}
INLINE const int16_t *fixed_row(Rows rows, int64_t row) { return (const int16_t *)(rows.x + row * rows.stride); }

/* Turns row `row` of `rows`, already copied as float32 [k] and padded, into the matrix's own form. A number that
   is not finite makes NaN of all that its row meets. */
void prepare_row(const Matrix *m, Rows rows, int64_t row);
/* Row `row` of x [rows, k], float32 or bfloat16, as the matrix wants it. */
INLINE void enter_row(const Matrix *m, Rows rows, int64_t row, const void *x, int bfloat16) {
    copy_row(x, bfloat16, row * m->k, m->k, rows.x + row * rows.stride, rows.stride);
    prepare_row(m, rows, row);
}

/* Channels of one unit for `count` <= CHUNK rows, chosen by `which` (NULL: 0, 1, ...), into
   out [count, UNIT]. Channels beyond n hold nothing of meaning. */
void unit_product(const Matrix *m, Rows rows, const int32_t *which, int64_t count, int64_t unit, float *out);

/* Adds the product of row i with this unit of channels to sums[i] [UNIT], in fixed point (exact.c), for `count` <=
   CHUNK rows. Returns whether a part was NaN or out of range. */
int unit_fixed(const Matrix *m, Rows rows, int64_t count, int64_t unit, uint64_t *const *sums);

/* The same by format; `which` is given. */
void float_unit(const Matrix *m, Rows rows, const int32_t *which, int64_t count, int64_t unit, float *out);
void int8_unit(const Matrix *m, Rows rows, const int32_t *which, int64_t count, int64_t unit, float *out);
void int4_unit(const Matrix *m, Rows rows, const int32_t *which, int64_t count, int64_t unit, float *out);

/* Prepared rows, the `count` matrices that they meet, and where the results go, side by side: out [rows, sum of n],
   float32 or bfloat16. */
typedef struct {
    const Matrix *matrices;
    int count;
    Rows prepared;
    int64_t rows;
    void *out;
    int out_bfloat16;
    int entered;   /* all rows were prepared before the team began */
    int gives_way; /* between pieces */
} Product;

/* All of it, shared by the team whose members call this. They meet before the first piece, for other members'
   rows unless these were `entered`, and after the last. */
void product_pieces(Member *member, Product product);

/* The same in steps, for a member that may leave the pieces to the others for a while: `product_take` does `most` of
   them, fewer at the end (all where there is one member), and returns 0 where none is left to take. */
int product_begin(Member *member, const Product *product);
int product_take(Member *member, const Product *product, int loop, int64_t most);
void product_end(Member *member, const Product *product, int loop);

#endif
