/* The feed-forward network that every row passes: at once, or begun while this thread has something else to do. */
#include "frames.h"
#include "mlp.h"
#include "rows.h"

#include <poll.h>
#include <stdlib.h>
#include <string.h>

/* One run of it; its scratch memory follows. */
typedef struct {
    Mlp mlp;
    Product gate_up, down; /* into float32 */
    const void *x;
    void *out;
    int bfloat16;
    int64_t size; /* of the first product, in multiplications */
    Member member;
    int loop; /* the second product's, where the caller is at it already; -1 */
} Run;

static Run *new_run(const Mlp *mlp, const void *x, int64_t rows, void *out, int bfloat16, int gives_way) {
    const Matrix *up = mlp->gate_up, *down = mlp->down;
    const int64_t own = lines((sizeof(Run) + 3) / 4), first = lines(rows_floats(up, rows));
    const int64_t between = lines(rows * 2 * down->k), second = lines(rows_floats(down, rows));
    float *memory = team_memory(own + first + between + second + rows * down->n);
    if (!memory) return NULL;
    float *entered = memory + own, *halves = entered + first, *gated = halves + between, *sums = gated + second;
    Run *run = (Run *)memory;
    *run = (Run){
        .mlp = *mlp, .x = x, .out = out, .bfloat16 = bfloat16, .size = rows * down->k * up->k, .loop = -1,
        .gate_up = {up, (int)mlp->count, rows_at(up, rows, entered), rows, halves, 0, 0, gives_way},
        .down = {down, 1, rows_at(down, rows, gated), rows, sums, 0, 0, gives_way},
    };
    return run;
}

static void enter(const Run *a, int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++) enter_row(a->mlp.gate_up, a->gate_up.prepared, r, a->x, a->bfloat16);
}

/* The first product and what becomes of its rows. */
static void widen(const Run *a, Member *member) {
    const Matrix *down = a->mlp.down;
    const Rows hidden = a->down.prepared;
    const int64_t inner = down->k;
    const int64_t begin = team_share(member, a->down.rows, 0), end = team_share(member, a->down.rows, 1);
    if (!a->gate_up.entered) enter(a, begin, end);
    product_pieces(member, a->gate_up);
    for (int64_t r = begin; r < end; r++) {
        float *row = hidden.x + r * hidden.stride;
        gated_row((float *)a->gate_up.out + r * 2 * inner, inner, row);
        memset(row + inner, 0, (size_t)(hidden.stride - inner) * 4);
        prepare_row(down, hidden, r);
    }
}

/* What becomes of the second one's. */
static void leave(const Run *a, const Member *member) {
    const int64_t n = a->mlp.down->n;
    const int64_t begin = team_share(member, a->down.rows, 0), end = team_share(member, a->down.rows, 1);
    for (int64_t r = begin; r < end; r++) {
        float *row = (float *)a->down.out + r * n, scale = a->mlp.norm ? root(row, n, a->mlp.eps) : 1.0f;
        for (int64_t i = 0; a->mlp.norm && i < n; i++) row[i] = row[i] * scale * a->mlp.norm[i];
        write_row(row, n, a->out, a->bfloat16, r * n);
    }
}

static void work(void *given, Member *member) {
    const Run *a = given;
    widen(a, member);
    product_pieces(member, a->down);
    leave(a, member);
}

static int team_of(const Run *run, int threads) { return run->size > PARALLEL_FROM ? threads : 1; }

/* x [rows, H] to out [rows, H]. Returns 0, or -1 without memory. */
int splitinfer_mlp(const Mlp *mlp, const void *x, int64_t rows, void *out, int bfloat16, int threads) {
    Run *run = new_run(mlp, x, rows, out, bfloat16, 0);
    if (!run) return -1;
    team_run(team_of(run, threads), work, run);
    free(run);
    return 0;
}

void *mlp_begin(const Mlp *mlp, const void *x, int64_t rows, void *out, int bfloat16, int gives_way, int threads) {
    Run *run = new_run(mlp, x, rows, out, bfloat16, gives_way);
    if (!run) return NULL;
    enter(run, 0, rows); /* nobody has to wait for this thread before the first product is done */
    run->gate_up.entered = 1;
    run->member = team_begin(team_of(run, threads), work, run);
    return run;
}

enum { PIECES_PER_LOOK = 2 };

/* Works with the others until `there(given)`, and returns 1 as soon as that is so while the second product goes on
   without this thread; 0 where it is all but done. */
static int until(Run *run, int (*there)(const void *), const void *given) {
    if (run->member.count == 1) return 0; /* nobody would go on */
    if (run->loop < 0) {
        widen(run, &run->member);
        run->loop = product_begin(&run->member, &run->down);
    }
    do
        if (there(given)) return 1;
    while (product_take(&run->member, &run->down, run->loop, PIECES_PER_LOOK));
    return 0;
}

static int readable(const void *file) {
    struct pollfd bytes = {.fd = *(const int *)file, .events = POLLIN};
    return poll(&bytes, 1, 0) > 0;
}

/* By the thread that began it, where it waits for bytes from `file` besides: works with the others, and returns 1 as
   soon as there are any while they go on; 0 where it is all but done. It may be called again; `splitinfer_mlp_end`
   follows either way. */
int splitinfer_mlp_until(void *begun, int file) { return until(begun, readable, &file); }

/* By the thread that began it. */
void splitinfer_mlp_end(void *begun) {
    Run *run = begun;
    if (run->loop < 0) team_end(run->member, work, run);
    else {
        product_end(&run->member, &run->down, run->loop);
        leave(run, &run->member);
        team_part(run->member);
    }
    free(run);
}

typedef struct {
    Expected *expected;
    int count;
} Answers;

static int answered(const void *given) {
    const Answers *a = given;
    return answers_there(a->expected, a->count);
}

/* The experts' sum: the one answer, which is of the rows' type, or those of several nodes, float32, into `room`. */
static const void *experts_sum(const Answers *a, int64_t rows, int64_t n, int bfloat16, void *room) {
    const float *parts[MOST_ANSWERS];
    int held = 0;
    for (int i = 0; i < a->count; i++)
        if (a->expected[i].file >= 0) parts[held++] = (const float *)(a->expected[i].room + a->expected[i].body);
    if (a->count == 1) return parts[0];
    return splitinfer_sum(parts, held, rows, n, room, bfloat16, 1) ? NULL : room;
}

enum { BEGUN, OVER, CLOSED, INTERRUPTED };

/* By the thread that began it, where answers, at most MOST_ANSWERS, are all that is missing: ends it, and makes
   `splitinfer_combine` of x and both, if they come as expected while it runs or so many nanoseconds after; `ended` is
   when it had. Returns CLOSED then; OVER if it has ended and they have not all come in time; BEGUN if it has not, and
   INTERRUPTED if it has, because something else came. */
int splitinfer_mlp_close(void *begun, Expected *expected, int count, int64_t patience, int64_t *ended, const void *x,
                         const float *moe_weight, const float *weight, float eps, float scalar, void *out) {
    Run *run = begun;
    const Answers answers = {expected, count};
    const int64_t rows = run->down.rows, n = run->mlp.down->n;
    Combine combine = {x, run->out, 0, run->bfloat16, n, moe_weight, weight, eps, scalar, out};
    float *scratch = team_memory(2 * n + rows * n);
    if (!scratch) return BEGUN;
    int left = 1, state = BEGUN;
    while (left > 0 && until(run, answered, &answers)) left = splitinfer_answers_read(expected, count, 0);
    if (left != SOMETHING_ELSE) {
        splitinfer_mlp_end(begun);
        *ended = nanoseconds();
        for (int64_t now = *ended, end = now + patience; left > 0 && now < end; now = nanoseconds())
            left = splitinfer_answers_read(expected, count, end - now);
        if (!left) combine.moe = experts_sum(&answers, rows, n, combine.bfloat16, scratch + 2 * n);
        for (int64_t r = 0; combine.moe && r < rows; r++) combine_row(&combine, r, scratch);
        state = combine.moe ? CLOSED : left > 0 ? OVER : INTERRUPTED;
    }
    free(scratch);
    return state;
}
