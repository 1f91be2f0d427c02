/* The feed-forward network that every row passes: see mlp.c. */
#ifndef SPLITINFER_MLP_H
#define SPLITINFER_MLP_H

#include "products.h"

/* gate and up are `count` matrices with 2 I channels in all, [2 I, H]; `down` is [H, I]. The result's norm is taken
   times `norm` where that is given. */
typedef struct {
    const Matrix *gate_up, *down;
    int64_t count;
    const float *norm;
    float eps;
} Mlp;

/* x [rows, H] to out [rows, H], begun by the other threads; `splitinfer_mlp_end` joins them, and until then x and out
   stay where they are. NULL without memory. */
void *mlp_begin(const Mlp *mlp, const void *x, int64_t rows, void *out, int bfloat16, int gives_way, int threads);

#endif
