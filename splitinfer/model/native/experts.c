/* The experts of one layer in one call: rows meet their experts, and leave as weighted sums. */
#include "frames.h"
#include "products.h"

#include <stdatomic.h>
#include <stdlib.h>

enum { SUM_FLOAT32, SUM_BFLOAT16, SUM_FIXED }; /* what the sums are written as */

/* Up to so many rows a thread takes long strips of channels, for it reads one expert's weights in one run. */
enum { LONG_STRIPS_UNTIL = 16 };

typedef struct {
    float *memory;        /* all that follows lies in here */
    Rows source, hidden;  /* x [rows, H] and the activations [places, I], as the products want them */
    float *gate_up;       /* [places, 2 I] */
    int32_t *order;       /* [places]: places (row * K + k) by ascending expert */
    int32_t *row, *begin; /* [places] the row of each; [experts + 1] where each expert begins in `order` */
    int32_t *used;        /* the experts that any row chose, ascending */
    int32_t *piece;       /* [used + 1]: pieces of CHUNK places before each used expert */
    int64_t places;       /* that are held */
} Plan;

static int64_t rounded(int64_t floats) { return (floats + 15) / 16 * 16; }

static int make_plan(Plan *p, const Matrix *gate_up, const Matrix *down, int64_t experts, int64_t rows,
                     int64_t places) {
    int64_t source = rounded(rows_floats(gate_up, rows)), hidden = rounded(rows_floats(down, places));
    int64_t between = rounded(places * gate_up->n), whole = rounded(2 * places + 3 * experts + 2);
    p->memory = aligned_alloc(64, (size_t)(source + hidden + between + whole) * 4);
    if (!p->memory) return -1;
    p->source = rows_at(gate_up, rows, p->memory);
    p->hidden = rows_at(down, places, p->memory + source);
    p->hidden.few = p->source.few; /* few rows meet an expert, however many places there are */
    p->gate_up = p->memory + source + hidden;
    p->order = (int32_t *)(p->gate_up + between);
    p->row = p->order + places;
    p->begin = p->row + places;
    p->used = p->begin + experts + 1;
    p->piece = p->used + experts;
    return 0;
}

/* Sorts places by expert, keeping the order of rows; returns how many experts are used, or -1 with the first
   expert that is not held in `wrong`. */
static int64_t sort_places(Plan *p, const Matrix *gate_up, int64_t experts, const int16_t *index,
                           int64_t places, int64_t k, int64_t *wrong) {
    memset(p->begin, 0, (size_t)(experts + 1) * 4);
    for (int64_t i = 0; i < places; i++) {
        if (index[i] == -1) continue;
        if (index[i] < 0 || index[i] >= experts || !gate_up[index[i]].weight) {
            *wrong = index[i];
            return -1;
        }
        p->begin[index[i] + 1]++;
    }
    int64_t used = 0;
    p->piece[0] = 0;
    for (int64_t e = 0; e < experts; e++) {
        if (p->begin[e + 1]) {
            p->used[used++] = (int32_t)e;
            p->piece[used] = p->piece[used - 1] + (p->begin[e + 1] + CHUNK - 1) / CHUNK;
        }
        p->begin[e + 1] += p->begin[e];
    }
    for (int64_t i = 0; i < places; i++)
        if (index[i] != -1) p->order[p->begin[index[i]]++] = (int32_t)i;
    for (int64_t e = experts; e > 0; e--) p->begin[e] = p->begin[e - 1];
    p->begin[0] = 0;
    for (int64_t i = 0; i < p->begin[experts]; i++) p->row[i] = (int32_t)(p->order[i] / k);
    return used;
}

static void gate_and_up(const Plan *p, const Matrix *matrices, int64_t used, int64_t piece) {
    const int64_t n = matrices[p->used[0]].n, units = units_of(n), chunk = piece / units, unit = piece % units;
    int64_t u = 0;
    while (u + 1 < used && p->piece[u + 1] <= chunk) u++;
    const int32_t e = p->used[u];
    int64_t first = p->begin[e] + (chunk - p->piece[u]) * CHUNK, count = smaller(CHUNK, p->begin[e + 1] - first);
    float part[CHUNK * UNIT];
    unit_product(matrices + e, p->source, p->row + first, count, unit, part);
    int64_t channels = smaller(UNIT, n - unit * UNIT);
    for (int64_t i = 0; i < count; i++)
        memcpy(p->gate_up + (first + i) * n + unit * UNIT, part + i * UNIT, (size_t)channels * 4);
}

/* gelu(gate) * up of one place, times `weight`. */
static void activate(const Plan *p, const Matrix *down, int64_t place, float weight) {
    const int64_t inner = down->k;
    const float *gate = p->gate_up + place * 2 * inner, *up = gate + inner;
    float *to = p->hidden.x + place * p->hidden.stride;
    int64_t i = 0;
    for (; i + VL <= inner; i += VL) store(to + i, gelu(load(gate + i)) * load(up + i) * all(weight));
    for (; i < inner; i++) to[i] = (gelu(all(gate[i])) * all(up[i]))[0] * weight;
    memset(to + inner, 0, (size_t)(p->hidden.stride - inner) * 4);
    prepare_row(down, p->hidden, place);
}

/* Adds the products of one expert's rows with one unit of channels to their sums in total [rows, UNIT]. */
static void add_expert(const Plan *p, const Matrix *matrices, int32_t e, int64_t unit, const float *weights,
                       float *total) {
    float part[CHUNK * UNIT];
    for (int64_t first = p->begin[e]; first < p->begin[e + 1]; first += CHUNK) {
        int64_t count = smaller(CHUNK, p->begin[e + 1] - first);
        unit_product(matrices + e, rows_from(p->hidden, first), 0, count, unit, part);
        for (int64_t i = 0; i < count; i++) {
            float *sum = total + p->row[first + i] * UNIT;
            vf weight = all(weights[p->order[first + i]]);
            for (int64_t c = 0; c < UNIT; c += VL) store(sum + c, load(sum + c) + weight * load(part + i * UNIT + c));
        }
    }
}

/* Units `unit` to `end` of the output's channels: every expert in ascending order adds to its rows. */
static void down_and_sum(const Plan *p, const Matrix *matrices, int64_t n, int64_t used, int64_t unit, int64_t end,
                         int64_t rows, const float *weights, float *total, void *out, int out_bfloat16) {
    memset(total, 0, (size_t)((end - unit) * rows * UNIT) * 4);
    for (int64_t u = 0; u < used; u++)
        for (int64_t i = unit; i < end; i++)
            add_expert(p, matrices, p->used[u], i, weights, total + (i - unit) * rows * UNIT);
    for (int64_t i = unit; i < end; i++)
        for (int64_t r = 0; r < rows; r++)
            write_row(total + ((i - unit) * rows + r) * UNIT, smaller(UNIT, n - i * UNIT), out, out_bfloat16,
                      r * n + i * UNIT);
}

/* The same in fixed point, of rows that have their weights already; returns whether a sum left its range. */
static int down_and_sum_fixed(const Plan *p, const Matrix *matrices, int64_t n, int64_t used, int64_t unit,
                              int64_t rows, uint64_t *total, uint64_t *out) {
    const int64_t channels = smaller(UNIT, n - unit * UNIT);
    int wrong = 0;
    memset(total, 0, (size_t)(rows * UNIT) * 8);
    for (int64_t u = 0; u < used; u++) {
        const int32_t e = p->used[u];
        for (int64_t first = p->begin[e]; first < p->begin[e + 1]; first += CHUNK) {
            int64_t count = smaller(CHUNK, p->begin[e + 1] - first);
            uint64_t *sums[CHUNK];
            for (int64_t i = 0; i < count; i++) sums[i] = total + p->row[first + i] * UNIT;
            wrong |= unit_fixed(matrices + e, rows_from(p->hidden, first), count, unit, sums);
        }
    }
    for (int64_t r = 0; r < rows; r++) memcpy(out + r * n + unit * UNIT, total + r * UNIT, (size_t)channels * 8);
    return wrong;
}

/* A call, for the team that works on it. */
typedef struct {
    Plan plan;
    const Matrix *gate_up, *down, *first, *second; /* all matrices, and one of each that is held */
    const void *x;
    int x_bfloat16, out_kind;
    int64_t rows, used, strip; /* strip: units of output channels that a thread takes at a time */
    const float *weights;
    void *out;
    atomic_int failed, out_of_range;
} Call;

static void strip_of_sums(Call *c, int64_t unit, int64_t end, void *total) {
    const int64_t n = c->second->n;
    if (c->out_kind == SUM_FIXED) {
        for (; unit < end; unit++)
            if (down_and_sum_fixed(&c->plan, c->down, n, c->used, unit, c->rows, total, c->out))
                atomic_store(&c->out_of_range, 1);
    } else
        down_and_sum(&c->plan, c->down, n, c->used, unit, end, c->rows, c->weights, total, c->out,
                     c->out_kind == SUM_BFLOAT16);
}

static void experts_work(void *given, Member *member) {
    Call *c = given;
    const Plan *p = &c->plan;
    const int64_t pieces = p->piece[c->used] * units_of(c->first->n);
    const int64_t held = p->places, units = units_of(c->second->n);
    const int inner = team_loop(member), outer = team_loop(member);
    void *total = aligned_alloc(64, (size_t)(c->strip * c->rows * UNIT) * 8);
    if (!total) atomic_store(&c->failed, 1);
    for (int64_t r = team_share(member, c->rows, 0); r < team_share(member, c->rows, 1); r++)
        enter_row(c->first, p->source, r, c->x, c->x_bfloat16);
    team_meet(member);
    for (int64_t piece, end; team_take(member, inner, pieces, INT64_MAX, &piece, &end);)
        for (; piece < end; piece++) gate_and_up(p, c->gate_up, c->used, piece);
    team_meet(member);
    for (int64_t i = team_share(member, held, 0); i < team_share(member, held, 1); i++)
        activate(p, c->second, i, c->out_kind == SUM_FIXED ? c->weights[p->order[i]] : 1.0f);
    team_meet(member);
    for (int64_t i, end; total && team_take(member, outer, (units + c->strip - 1) / c->strip, INT64_MAX, &i, &end);)
        for (; i < end; i++) strip_of_sums(c, i * c->strip, smaller(units, (i + 1) * c->strip), total);
    free(total);
}

/* out [rows, H] = sum over k of weights[row, k] * expert index[row, k] (x [rows, H]), an index of -1 left out.
   `gate_up` and `down` are tables of `experts` matrices, [2 I, H] and [H, I], all of one format each; without
   a weight where the expert is not held. x is float32 or bfloat16, out one of SUM_*; floating sums go by
   ascending expert, fixed ones are int64, in steps of 2^-36. Returns 0, -1 without memory, 1 with the first expert
   that is not held in `wrong`, or 2 where a fixed sum left its range. With `answer`, in whose frame `out` lies, that
   goes on its way. */
int splitinfer_experts(const Matrix *gate_up, const Matrix *down, int64_t experts, const void *x,
                       int x_bfloat16, int64_t rows, const int16_t *index, const float *weights, int64_t k,
                       void *out, int out_kind, int64_t *wrong, Answer *answer, int threads) {
    const int64_t start = nanoseconds();
    const Matrix *first = gate_up;
    while (!first->weight && first < gate_up + experts - 1) first++;
    const Matrix *second = down + (first - gate_up);
    const int64_t places = rows * k, width = first->k;
    Call c = {.gate_up = gate_up, .down = down, .first = first, .second = second, .x = x, .x_bfloat16 = x_bfloat16,
              .out_kind = out_kind, .rows = rows, .weights = weights, .out = out};
    Plan *const plan = &c.plan;
    if (make_plan(plan, first, second, experts, rows, places)) return -1;
    c.used = sort_places(plan, gate_up, experts, index, places, k, wrong);
    if (c.used < 0) {
        free(plan->memory);
        return 1;
    }
    plan->places = plan->begin[experts];
    const int64_t units = units_of(second->n);
    c.strip = rows <= LONG_STRIPS_UNTIL ? (units + 2 * threads - 1) / (2 * threads) : 1;
    team_run(plan->places * width * first->n > PARALLEL_FROM ? threads : 1, experts_work, &c);
    free(plan->memory);
    const int failed = c.failed ? -1 : c.out_of_range ? 2 : 0;
    if (answer && !failed) answer_send(answer, nanoseconds() - start);
    return failed;
}
