/* Products of weight matrices with rows, shared by a team of threads. See products.h. */
#include "products.h"

#include <stdlib.h>

int64_t rows_floats(const Matrix *m, int64_t rows) { return rows * (padded(m->k) + padded(m->k) / 16); }

Rows rows_at(const Matrix *m, int64_t rows, float *memory) {
    int64_t stride = padded(m->k);
    return (Rows){memory, memory + rows * stride, stride, stride / 32, rows <= FEWEST};
}

void unit_product(const Matrix *m, Rows rows, const int32_t *which, int64_t count, int64_t unit, float *out) {
    static const int32_t in_order[CHUNK] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15,
                                            16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31,
                                            32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42, 43, 44, 45, 46, 47};
    if (!which) which = in_order;
    switch (m->format) {
    case INT8: int8_unit(m, rows, which, count, unit, out); break;
    case INT4: int4_unit(m, rows, which, count, unit, out); break;
    default: float_unit(m, rows, which, count, unit, out);
    }
}

enum { PIECES_PER_GIFT = 8 };

/* One unit of channels of one chunk of rows. */
static void product_piece(const Product *p, int64_t width, int64_t units, int64_t piece) {
    float part[CHUNK * UNIT];
    int64_t first = piece / units * CHUNK, unit = piece % units, before = 0;
    int64_t held = smaller(CHUNK, p->rows - first);
    const Matrix *m = p->matrices;
    for (; unit >= units_of(m->n); m++) unit -= units_of(m->n), before += m->n;
    unit_product(m, rows_from(p->prepared, first), 0, held, unit, part);
    int64_t channels = smaller(UNIT, m->n - unit * UNIT);
    for (int64_t r = 0; r < held; r++)
        write_row(part + r * UNIT, channels, p->out, p->out_bfloat16, (first + r) * width + before + unit * UNIT);
}

int product_begin(Member *member, const Product *p) {
    const int loop = team_loop(member);
    if (!p->entered) team_meet(member);
    return loop;
}

int product_take(Member *member, const Product *p, int loop, int64_t most) {
    int64_t width = 0, units = 0, piece, end;
    for (int i = 0; i < p->count; i++) width += p->matrices[i].n, units += units_of(p->matrices[i].n);
    if (!team_take(member, loop, (p->rows + CHUNK - 1) / CHUNK * units, most, &piece, &end)) return 0;
    for (; piece < end; piece++) {
        if (p->gives_way && piece % PIECES_PER_GIFT == 0) team_give_way();
        product_piece(p, width, units, piece);
    }
    return 1;
}

void product_end(Member *member, const Product *p, int loop) {
    while (product_take(member, p, loop, INT64_MAX)) {}
    team_meet(member);
}

void product_pieces(Member *member, Product p) { product_end(member, &p, product_begin(member, &p)); }

typedef struct {
    Product product;
    const void *x;
    int x_bfloat16;
} Call;

static void product_work(void *given, Member *member) {
    const Call *c = given;
    for (int64_t r = team_share(member, c->product.rows, 0); r < team_share(member, c->product.rows, 1); r++)
        enter_row(c->product.matrices, c->product.prepared, r, c->x, c->x_bfloat16);
    product_pieces(member, c->product);
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
    Call c = {{matrices, count, rows_at(matrices, rows, memory), rows, out, out_bfloat16}, x, x_bfloat16};
    team_run(rows * width * k > PARALLEL_FROM ? threads : 1, product_work, &c);
    free(memory);
    return 0;
}
