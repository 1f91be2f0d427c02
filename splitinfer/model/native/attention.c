/* Attention of one sequence's new rows over its cached keys and values. */
#include "widen.h"

#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>

enum { TILE = 6 }; /* (row, head) pairs that share a pass over one head's keys and values */

typedef struct {
    const uint8_t *queries, *keys, *values;
    const uint16_t *key_scales, *value_scales; /* float16, of int8 keys and values */
    uint8_t *out;
    int bfloat16, stored;                /* queries and out; the format of keys and values */
    int64_t rows, heads, kv_heads, size; /* size: the head's dimension */
    int64_t seen, window;                /* keys; 0: no window */
    int64_t kv_stride, scale_stride;     /* elements between heads */
} Call;

static int64_t item_size(int format) { return format == FLOAT32 ? 4 : format == BFLOAT16 ? 2 : 1; }

/* Some query rows' heads that read the same keys: pair i is row `row + i / heads`, head `head + i % heads`. */
typedef struct {
    int64_t row, rows, head, heads, kv_head;
    int64_t lo[TILE], hi[TILE], from, to; /* keys that each pair sees, and all of them together */
} Tile;

static void place(const Call *c, Tile *t) {
    t->from = c->seen, t->to = 0;
    for (int64_t i = 0; i < t->rows * t->heads; i++) {
        t->hi[i] = c->seen - c->rows + t->row + i / t->heads + 1;
        t->lo[i] = c->window && t->hi[i] > c->window ? t->hi[i] - c->window : 0;
        t->from = smaller(t->from, t->lo[i]);
        t->to = t->hi[i] > t->to ? t->hi[i] : t->to;
    }
}

/* scores [pairs, width] of keys `from` to `to`, column 0 being key `from`. */
static void score(const Call *c, const Tile *t, int64_t pairs, float *queries, float *scores, int64_t width) {
    Matrix keys = {c->stored, (int32_t)c->size, t->to - t->from, c->size,
                   c->keys + (t->kv_head * c->kv_stride + t->from * c->size) * item_size(c->stored),
                   c->key_scales ? c->key_scales + t->kv_head * c->scale_stride + t->from : 0};
    Rows rows = rows_at(&keys, pairs, queries);
    for (int64_t i = 0; i < pairs; i++) {
        int64_t from = ((t->row + i / t->heads) * c->heads + t->head + i % t->heads) * c->size;
        copy_row(c->queries, c->bfloat16, from, c->size, rows.x + i * rows.stride, rows.stride);
        prepare_row(&keys, rows, i);
    }
    float part[CHUNK * UNIT];
    for (int64_t unit = 0; unit < units_of(keys.n); unit++) {
        unit_product(&keys, rows, 0, pairs, unit, part);
        for (int64_t i = 0; i < pairs; i++) memcpy(scores + i * width + unit * UNIT, part + i * UNIT, UNIT * 4);
    }
}

/* Turns a pair's scores into e^(score - largest), 0 where it sees nothing; returns their sum. Lanes are
   counted from the first key seen, so that other rows of the tile do not matter. */
static float exponentials(float *scores, int64_t lo, int64_t hi, int64_t width) {
    float largest = scores[lo];
    for (int64_t i = lo + 1; i < hi; i++) largest = scores[i] > largest ? scores[i] : largest;
    memset(scores, 0, (size_t)lo * 4);
    for (int64_t i = hi; i < width; i++) scores[i] = -INFINITY;
    vf sum = (vf){};
    int64_t i = lo;
    for (; i < hi; i += VL) {
        vf e = exponential(load(scores + i) - all(largest));
        store(scores + i, e);
        sum += e;
    }
    memset(scores + i, 0, (size_t)(width - i) * 4);
    return sum_of(sum);
}

INLINE vf whole_numbers(const int8_t *p) { /* VL bytes, as floats */
    typedef int8_t bytes __attribute__((vector_size(VL)));
    bytes each;
    memcpy(&each, p, VL);
#if defined(__AVX512F__)
    return from_integers((vi)_mm512_cvtepi8_epi32((__m128i)each));
#elif defined(__AVX2__)
    return from_integers((vi)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
#else
    return from_integers(__builtin_convertvector(each, vi));
#endif
}

INLINE float one_value(const int stored, const void *values, int64_t i) {
    return stored == INT8 ? ((const int8_t *)values)[i] : widened_end(stored, values, i, 1)[0];
}

/* out [R, C vectors] = sum over keys of weight * value, columns `d` to `d` + C * VL. */
INLINE void value_tile(const int R, const int C, const int stored, const Call *c, const uint8_t *values,
                       const float *weights, int64_t width, int64_t count, int64_t d, float *out,
                       int64_t stride) {
    vf acc[TILE][8];
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int v = 0; v < C; v++) acc[r][v] = (vf){};
    for (int64_t s = 0; s < count; s++)
        UNROLL for (int v = 0; v < C; v++) {
            int64_t i = s * c->size + d + v * VL;
            vf f = stored == INT8 ? whole_numbers((const int8_t *)values + i) : widened(stored, values, i);
            UNROLL for (int r = 0; r < R; r++)
                acc[r][v] = fused(all(weights[r * width + s]), f, acc[r][v]);
        }
    for (int r = 0; r < R; r++) for (int v = 0; v < C; v++) store(out + r * stride + d + v * VL, acc[r][v]);
}

#define COLUMNS(R, C) \
    { for (; d + C * VL <= size; d += C * VL) \
          value_tile(R, C, stored, c, values, weights, width, count, d, out, stride); \
      for (; d + VL <= size; d += VL) \
          value_tile(R, 1, stored, c, values, weights, width, count, d, out, stride); }

INLINE void weigh(const int stored, const Call *c, const Tile *t, int64_t pairs, const float *weights,
                  int64_t width, float *out, int64_t stride) {
    int64_t count = t->to - t->from, size = c->size, d = 0;
    const uint8_t *values = c->values + (t->kv_head * c->kv_stride + t->from * size) * item_size(stored);
    switch (pairs) {
    case 1: COLUMNS(1, 8) break;
    case 2: COLUMNS(2, 4) break;
    case 3: COLUMNS(3, 4) break;
    case 4: COLUMNS(4, 2) break;
    case 5: COLUMNS(5, 2) break;
    default: COLUMNS(6, 2)
    }
    for (; d < size; d++) /* the odd columns of a head that is no multiple of a vector */
        for (int64_t r = 0; r < pairs; r++) {
            float sum = 0.0f;
            for (int64_t s = 0; s < count; s++)
                sum += weights[r * width + s] * one_value(stored, values, s * size + d);
            out[r * stride + d] = sum;
        }
}

/* Multiplies each pair's weights by the scales of the values that they are for. */
static void scale_weights(const Call *c, const Tile *t, int64_t pairs, float *weights, int64_t width) {
    const uint16_t *scales = c->value_scales + t->kv_head * c->scale_stride + t->from;
    for (int64_t s = 0; s < t->to - t->from; s++) {
        float scale = one_float16(scales[s]);
        for (int64_t i = 0; i < pairs; i++) weights[i * width + s] *= scale;
    }
}

static void attend_tile(const Call *c, Tile *t, float *memory) {
    const int64_t pairs = t->rows * t->heads, stride = padded(c->size);
    place(c, t);
    const int64_t width = units_of(t->to - t->from) * UNIT + VL;
    float *queries = memory, *out = queries + TILE * (stride + stride / 16), *scores = out + TILE * stride;
    float sums[TILE];
    score(c, t, pairs, queries, scores, width);
    for (int64_t i = 0; i < pairs; i++)
        sums[i] = exponentials(scores + i * width, t->lo[i] - t->from, t->hi[i] - t->from, width);
    if (c->value_scales) scale_weights(c, t, pairs, scores, width);
    switch (c->stored) {
    case FLOAT32: weigh(FLOAT32, c, t, pairs, scores, width, out, stride); break;
    case BFLOAT16: weigh(BFLOAT16, c, t, pairs, scores, width, out, stride); break;
    default: weigh(INT8, c, t, pairs, scores, width, out, stride);
    }
    for (int64_t i = 0; i < pairs; i++) {
        float *row = out + i * stride, share = 1.0f / sums[i];
        for (int64_t d = 0; d < c->size; d++) row[d] *= share;
        int64_t to = ((t->row + i / t->heads) * c->heads + t->head + i % t->heads) * c->size;
        write_row(row, c->size, c->out, c->bfloat16, to);
    }
}

/* The tiles of a call: `height` rows by `part` of the `group` heads that share keys. */
typedef struct {
    const Call *call;
    int64_t group, part, parts, height, tiles;
    size_t nbytes; /* of memory for one tile */
    atomic_int failed;
} Tiles;

static void attend_work(void *given, Member *member) {
    Tiles *a = given;
    const Call *c = a->call;
    const int64_t across = c->kv_heads * a->parts;
    const int loop = team_loop(member);
    float *memory = aligned_alloc(64, a->nbytes);
    if (!memory) atomic_store(&a->failed, 1);
    for (int64_t item, end; memory && team_take(member, loop, across * a->tiles, INT64_MAX, &item, &end);)
        for (; item < end; item++) {
            int64_t row = item / across * a->height, first = item / c->kv_heads % a->parts * a->part;
            int64_t kv_head = item % c->kv_heads;
            Tile t = {.row = row, .rows = smaller(a->height, c->rows - row), .head = kv_head * a->group + first,
                      .heads = smaller(a->part, a->group - first), .kv_head = kv_head};
            attend_tile(c, &t, memory);
        }
    free(memory);
}

/* Causal softmax attention, without scaling, of queries [rows, heads, size] over keys and values
   [kv_heads, seen, size], whose heads lie `kv_stride` elements apart; the last `rows` of them are the queries'
   own positions. A row sees `window` keys with its own, or all before it for 0. out [rows, heads, size]. Keys
   and values are of the queries' type, or int8 with float16 scales [kv_heads, seen], heads `scale_stride` apart.
   Returns 0, or -1 without memory. */
int splitinfer_attend(const void *queries, const void *keys, const void *values, const uint16_t *key_scales,
                      const uint16_t *value_scales, void *out, int bfloat16, int64_t rows, int64_t heads,
                      int64_t kv_heads, int64_t size, int64_t seen, int64_t kv_stride, int64_t scale_stride,
                      int64_t window, int threads) {
    const int stored = key_scales ? INT8 : bfloat16 ? BFLOAT16 : FLOAT32;
    const Call c = {queries, keys, values, key_scales, value_scales, out, bfloat16, stored, rows, heads, kv_heads,
                    size, seen, window, kv_stride, scale_stride};
    const int64_t group = heads / kv_heads, part = group > TILE ? 4 : group; /* heads of a tile */
    const int64_t parts = (group + part - 1) / part, height = part < TILE ? TILE / part : 1;
    const int64_t tiles = (rows + height - 1) / height, stride = padded(size);
    const int64_t floats = TILE * (2 * stride + stride / 16 + units_of(seen) * UNIT + 2 * UNIT);
    Tiles a = {&c, group, part, parts, height, tiles, ((size_t)floats * 4 + 63) / 64 * 64, 0};
    team_run(rows * heads * size * seen > PARALLEL_FROM ? threads : 1, attend_work, &a);
    return a.failed ? -1 : 0;
}
