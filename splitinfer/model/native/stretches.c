/* Whole stretches of a layer: products and what lies between them, without leaving the team of threads. */
#include "frames.h"
#include "mlp.h"
#include "rows.h"

#include <stdlib.h>
#include <string.h>

/* A member's own floats in memory that has `each` for every one of them. */
static float *own(const Member *member, float *memory, int64_t each) { return memory + member->index * each; }

typedef struct {
    Heads heads;
    Product product; /* into float32 */
    const void *x;
    const float *norm;
    float *scratch; /* [threads, 2 size] */
} AttentionIn;

static void attention_in_work(void *given, Member *member) {
    const AttentionIn *a = given;
    const Product *p = &a->product;
    const int64_t k = p->matrices->k, begin = team_share(member, p->rows, 0), end = team_share(member, p->rows, 1);
    for (int64_t r = begin; r < end; r++) {
        float *row = p->prepared.x + r * p->prepared.stride;
        copy_row(a->x, a->heads.bfloat16, r * k, k, row, p->prepared.stride);
        float scale = root(row, k, a->heads.eps);
        for (int64_t i = 0; i < k; i++) row[i] = row[i] * scale * a->norm[i];
        prepare_row(p->matrices, p->prepared, r);
    }
    product_pieces(member, *p);
    for (int64_t r = begin; r < end; r++)
        heads_row(&a->heads, (float *)p->out + r * a->heads.width, r, own(member, a->scratch, 2 * a->heads.size));
}

/* What leads to attention: the norm of x [rows, k], its product with `count` matrices, and `splitinfer_heads`
   of that. x is of the same type as the results. */
int splitinfer_attention_in(const Matrix *matrices, int count, const void *x, int64_t rows, const float *norm,
                            float eps, int64_t size, int64_t turning, int64_t values, int value_norm,
                            const float *weight, const float *cosine, const float *sine, void *turned,
                            void *value, int bfloat16, int threads) {
    int64_t width = 0;
    for (int i = 0; i < count; i++) width += matrices[i].n;
    const int64_t inputs = lines(rows_floats(matrices, rows)), outputs = lines(rows * width);
    float *memory = team_memory(inputs + outputs + threads * 2 * size);
    if (!memory) return -1;
    AttentionIn a = {
        {width, size, turning, width / size - values, values, value_norm, weight, cosine, sine, eps, turned, value,
         bfloat16},
        {matrices, count, rows_at(matrices, rows, memory), rows, memory + inputs, 0},
        x, norm, memory + inputs + outputs,
    };
    team_run(rows * width * matrices->k > PARALLEL_FROM ? threads : 1, attention_in_work, &a);
    free(memory);
    return 0;
}

typedef struct {
    Residual residual;
    Product product, scores; /* into float32; without matrices: no router */
    const void *attended;
    float *scratch; /* [threads, n] */
} AttentionOut;

static void attention_out_work(void *given, Member *member) {
    const AttentionOut *a = given;
    const Product *p = &a->product;
    const int64_t n = a->residual.n, begin = team_share(member, p->rows, 0), end = team_share(member, p->rows, 1);
    for (int64_t r = begin; r < end; r++) enter_row(p->matrices, p->prepared, r, a->attended, a->residual.bfloat16);
    product_pieces(member, *p);
    for (int64_t r = begin; r < end; r++) {
        float *row = (float *)p->out + r * n;
        residual_row(&a->residual, r, row, own(member, a->scratch, n));
        if (a->scores.matrices) enter_row(a->scores.matrices, a->scores.prepared, r, p->out, 0);
    }
    if (a->scores.matrices) product_pieces(member, a->scores);
}

/* What follows attention: the product of `attended` [rows, k] with `output`, `splitinfer_residual` of x and that,
   and, unless `router` is NULL, `splitinfer_choose` of its product with the normed rows. With `beside` that network
   begins on `first_out`, into `beside_out`; what ends it comes back in `begun`. */
int splitinfer_attention_out(const Matrix *output, const Matrix *router, const void *attended, const void *x,
                             int bfloat16, int64_t rows, const float *weight, float eps, const float *first,
                             const float *second, const float *third, void *sum, void *first_out,
                             void *second_out, int64_t chosen, const float *expert_scale, int16_t *index,
                             float *weights, const Mlp *beside, void *beside_out, int gives_way, void **begun,
                             int threads) {
    const int64_t k = output->k, n = output->n;
    const Matrix *next = router ? router : output;
    const int64_t inputs = lines(rows_floats(output, rows)), outputs = lines(rows * n);
    const int64_t routed = lines(rows_floats(next, rows));
    float *memory = team_memory(inputs + outputs + routed + rows * next->n + threads * n);
    if (!memory) return -1;
    float *product = memory + inputs, *scores = product + outputs + routed;
    AttentionOut a = {
        {x, bfloat16, n, weight, first, second, third, eps, sum, first_out, second_out},
        {output, 1, rows_at(output, rows, memory), rows, product, 0},
        {router, 1, rows_at(next, rows, product + outputs), rows, scores, 0},
        attended, scores + rows * next->n,
    };
    team_run(rows * n * k > PARALLEL_FROM ? threads : 1, attention_out_work, &a);
    if (beside) *begun = mlp_begin(beside, first_out, rows, beside_out, bfloat16, gives_way, threads);
    if (router) splitinfer_choose(scores, rows, router->n, chosen, expert_scale, index, weights);
    free(memory);
    return beside && !*begun ? -1 : 0;
}

/* What a layer's attention has of its own, and what follows it: as `splitinfer_attention_in` and `_out` have it. */
typedef struct {
    const Matrix *projections, *output, *router;
    const float *norm, *head_scale, *post, *first, *second, *third, *expert_scale;
    const Mlp *beside;
    int64_t count, size, turning, values, window, chosen; /* count: of projections; window 0: all */
    float eps;
    int32_t value_norm;
} Attention;

/* A sequence's part of the rows: `rows` of them, and its buffers of keys and values [values, capacity, size]. Theirs
   go behind `old` others, of which they see the last `seen`. */
typedef struct {
    int64_t rows, capacity, old, seen;
    uint8_t *keys, *values;
} Sequence;

/* Row r's keys and values to where its sequence keeps them, as its row `to`; then its queries behind those of the
   rows before it. */
static void keep(const Attention *a, const Sequence *sequence, int64_t r, int64_t to, uint8_t *turned,
                 const uint8_t *value, int64_t head) {
    const int64_t heads = a->turning - a->values;
    uint8_t *row = turned + r * a->turning * head;
    for (int64_t h = 0; h < a->values; h++) {
        const int64_t at = (h * sequence->capacity + to) * head;
        memcpy(sequence->keys + at, row + (heads + h) * head, (size_t)head);
        memcpy(sequence->values + at, value + (r * a->values + h) * head, (size_t)head);
    }
    memmove(turned + r * heads * head, row, (size_t)(heads * head));
}

/* `splitinfer_attention_in`, the rows' keys and values into the buffers of their sequences, in order, attention over
   these, and `splitinfer_attention_out`: a layer up to its experts. With `beside_out` the dense network begins. What
   nodes are asked goes into `requests`, so many, and from there on its way. */
int splitinfer_attention(const Attention *a, const Sequence *sequences, int64_t count, const void *x, int bfloat16,
                         int64_t rows, const float *cosine, const float *sine, void *sum, void *first_out,
                         void *second_out, int16_t *index, float *weights, void *beside_out, int gives_way,
                         void **begun, Request *requests, int64_t asked, int threads) {
    const int64_t head = a->size * (bfloat16 ? 2 : 4), heads = a->turning - a->values;
    const int64_t in = lines(rows * a->turning * a->size), between = lines(rows * a->values * a->size);
    uint8_t *turned = (uint8_t *)team_memory(in + between + rows * heads * a->size);
    if (!turned) return -1;
    uint8_t *value = turned + in * 4, *attended = value + between * 4;
    int failed = splitinfer_attention_in(a->projections, (int)a->count, x, rows, a->norm, a->eps, a->size, a->turning,
                                         a->values, a->value_norm, a->head_scale, cosine, sine, turned, value,
                                         bfloat16, threads);
    for (int64_t i = 0, r = 0; !failed && i < count; i++)
        for (int64_t n = 0; n < sequences[i].rows; n++, r++)
            keep(a, sequences + i, r, sequences[i].old + n, turned, value, head);
    for (int64_t i = 0, r = 0; !failed && i < count; r += sequences[i++].rows) {
        const Sequence *s = sequences + i;
        const int64_t from = (s->old - s->seen) * head, at = r * heads * head;
        failed = splitinfer_attend(turned + at, s->keys + from, s->values + from, 0, 0, attended + at, bfloat16, s->rows,
                                   heads, a->values, a->size, s->seen + s->rows, s->capacity * a->size, 0, a->window,
                                   threads);
    }
    if (!failed)
        failed = splitinfer_attention_out(a->output, a->router, attended, x, bfloat16, rows, a->post, a->eps, a->first,
                                          a->second, a->third, sum, first_out, second_out, a->chosen, a->expert_scale,
                                          index, weights, beside_out ? a->beside : 0, beside_out, gives_way, begun,
                                          threads);
    free(turned);
    for (int64_t i = 0; !failed && i < asked; i++)
        splitinfer_request_send(requests + i, second_out, rows * a->output->n * (bfloat16 ? 2 : 4), index, weights,
                                rows * a->chosen);
    return failed;
}
