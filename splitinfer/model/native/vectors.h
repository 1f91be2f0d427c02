/* Vectors of floats on whatever the compiler targets, and the loads that widen stored weights to them.

   Every sum in these files is exact, or one chain of fused multiply-adds in a fixed order, so a row's result
   depends neither on the rows beside it nor on the number of threads. Compile with -ffp-contract=off: the only
   fused operations are those written as such. */
#ifndef SPLITINFER_VECTORS_H
#define SPLITINFER_VECTORS_H

#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__) && defined(__AVX512BW__)
#define VL 16 /* floats in a vector */
#else
#define VL 8
#endif

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

typedef float vf __attribute__((vector_size(VL * 4)));
typedef int32_t vi __attribute__((vector_size(VL * 4)));
typedef uint32_t vu __attribute__((vector_size(VL * 4)));
typedef uint16_t vh __attribute__((vector_size(VL * 2)));
typedef int16_t vs __attribute__((vector_size(VL * 4)));
typedef int8_t vb __attribute__((vector_size(VL * 2)));
typedef float vf_any __attribute__((vector_size(VL * 4), aligned(4), may_alias));
typedef int32_t vi_any __attribute__((vector_size(VL * 4), aligned(2), may_alias));
typedef uint32_t vu_any __attribute__((vector_size(VL * 4), aligned(4), may_alias));
typedef uint16_t vh_any __attribute__((vector_size(VL * 2), aligned(2), may_alias));
typedef int8_t vb_any __attribute__((vector_size(VL * 2), aligned(1), may_alias));

INLINE vf load(const float *p) { return (vf)*(const vf_any *)p; }
INLINE void store(float *p, vf v) { *(vf_any *)p = (vf_any)v; }
INLINE vf all(float x) { return x - (vf){}; }

INLINE vf fused(vf a, vf b, vf c) { /* a * b + c, rounded once where the machine can */
#if VL == 16
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && defined(__FMA__)
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

INLINE vf from_integers(vi v) { return __builtin_convertvector(v, vf); }
INLINE vf load_bfloat16(const uint16_t *p) {
    vh half = (vh)*(const vh_any *)p;
    return (vf)(__builtin_convertvector(half, vu) << 16);
}
INLINE float one_float16(uint16_t h) { /* IEEE half to float; infinities do not occur in scales */
#if defined(__F16C__)
    return _cvtsh_ss(h);
#else
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = (uint32_t)(h & 0x7fff) << 13;
    float scaled, value;
    memcpy(&scaled, &rest, 4);
    scaled *= 0x1p112f; /* the difference of the exponents' biases; subnormals come out right */
    memcpy(&rest, &scaled, 4);
    rest |= sign;
    memcpy(&value, &rest, 4);
    return value;
#endif
}
INLINE vf load_float16(const uint16_t *p) {
#if VL == 16
    return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
#elif defined(__F16C__)
    return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
#else
    vf v;
    for (int i = 0; i < VL; i++) v[i] = one_float16(p[i]);
    return v;
#endif
}

INLINE float one_bfloat16(uint16_t h) {
    uint32_t bits = (uint32_t)h << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
INLINE uint16_t to_bfloat16(float x) { /* round to nearest, ties to even; NaN stays NaN */
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 64);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

INLINE void store_bfloat16(uint16_t *p, vf v) {
    vu bits = (vu)v, odd = (bits >> 16) & 1;
    vu rounded = (bits + 0x7fff + odd) >> 16, nan = (vu)(v != v);
    rounded = (rounded & ~nan) | ((bits >> 16 | 64) & nan);
#if VL == 16
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16((__m512i)rounded));
#elif defined(__AVX2__)
    __m256i pairs = _mm256_packus_epi32((__m256i)rounded, (__m256i)rounded);
    _mm_storeu_si128((__m128i *)p, _mm256_castsi256_si128(_mm256_permute4x64_epi64(pairs, 8)));
#else
    *(vh_any *)p = (vh_any)__builtin_convertvector(rounded, vh);
#endif
}

/* ---- integers: a vector holds VL pairs of 16 bits, or VL sums of 32 ---- */

INLINE vi load_pairs(const int16_t *p) { return (vi)*(const vi_any *)p; }
INLINE vi all_pairs(const int16_t *p) { /* one pair in every lane */
    int32_t pair;
    memcpy(&pair, p, 4);
    return pair - (vi){};
}
INLINE vi load_int8(const int8_t *p) { /* 2 * VL bytes, as pairs */
#if VL == 16
    return (vi)_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)p));
#elif defined(__AVX2__)
    return (vi)_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)p));
#else
    vb bytes = (vb)*(const vb_any *)p;
    return (vi)__builtin_convertvector(bytes, vs);
#endif
}

/* sum + a.first * b.first + a.second * b.second in every lane. */
INLINE vi dot_pairs(vi sum, vi a, vi b) {
#if VL == 16 && defined(__AVX512VNNI__)
    return (vi)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#elif VL == 16
    return sum + (vi)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVXVNNI__)
    return (vi)_mm256_dpwssd_avx_epi32((__m256i)sum, (__m256i)a, (__m256i)b);
#elif defined(__AVX2__)
    return sum + (vi)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
    return sum + (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
#endif
}

/* Nibbles j and j + 4 of every word, as pairs; j < 4. */
INLINE vi nibble_pairs(vi words, int j) { return (vi)((vu)words >> 4 * j) & 0x000f000f; }

/* Products of bytes, 0 to 15 in `a` and signed in `b`: what four of them in every lane add to a sum that may take
   eight such steps. `whole_sum` makes one number of 32 bits in every lane of two of them, 256 * high + low. */
INLINE vi dot_bytes(vi sum, vi a, vi b) {
#if VL == 16 && defined(__AVX512VNNI__)
    return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#elif VL == 16
    return (vi)_mm512_add_epi16((__m512i)sum, _mm512_maddubs_epi16((__m512i)a, (__m512i)b));
#elif defined(__AVXVNNI__)
    return (vi)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)a, (__m256i)b);
#elif defined(__AVX2__)
    return (vi)_mm256_add_epi16((__m256i)sum, _mm256_maddubs_epi16((__m256i)a, (__m256i)b));
#else
    for (int bits = 0; bits < 32; bits += 8) sum += ((vi)((vu)a >> bits) & 15) * (b << (24 - bits) >> 24);
    return sum;
#endif
}
INLINE vi whole_sum(vi high, vi low) {
#if (VL == 16 && !defined(__AVX512VNNI__)) || (VL == 8 && defined(__AVX2__) && !defined(__AVXVNNI__))
    const vi one = 0x00010001 - (vi){};
    return dot_pairs(dot_pairs((vi){}, low, one), high, one << 8);
#else
    return (high << 8) + low;
#endif
}

/* Keeps a sum in its register: integer sums may be reordered, and compilers that do so run out of them. */
#if defined(__AVX2__)
#define SETTLE(sum) __asm__("" : "+v"(sum))
#else
#define SETTLE(sum)
#endif

INLINE float sum_of(vf v) { /* a fixed tree */
#if VL == 16
    float a[16];
    store(a, v);
    for (int half = 8; half; half /= 2)
        for (int i = 0; i < half; i++) a[i] += a[i + half];
    return a[0];
#else
    float a[8];
    store(a, v);
    return ((a[0] + a[4]) + (a[2] + a[6])) + ((a[1] + a[5]) + (a[3] + a[7]));
#endif
}

INLINE vf larger(vf a, vf b) {
    vi mask = a > b;
    return (vf)((mask & (vi)a) | (~mask & (vi)b));
}

/* e^x for x <= 88, by 2^n * polynomial (Cephes' expf); below -87 it is 0. Relative error 2e-7. */
INLINE vf exponential(vf x) {
    vi lost = x < all(-87.0f);
    x = larger(x, all(-87.0f));
    vf n = x * all(1.44269504f) + all(12582912.0f); /* 1.5 * 2^23: the sum's low bits are the integer */
    vi integer = (vi)n - (vi)all(12582912.0f);
    n = n - all(12582912.0f);
    vf r = fused(n, all(-0.693359375f), x);
    r = fused(n, all(2.12194440e-4f), r);
    vf p = all(1.9875691500e-4f);
    p = fused(p, r, all(1.3981999507e-3f));
    p = fused(p, r, all(8.3334519073e-3f));
    p = fused(p, r, all(4.1665795894e-2f));
    p = fused(p, r, all(1.6666665459e-1f));
    p = fused(p, r, all(5.0000001201e-1f));
    p = fused(p, r * r, r) + all(1.0f);
    return (vf)(~lost & (vi)((vf)((vi)p + (integer << 23))));
}

/* GELU by its tanh form: x * sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3). */
INLINE vf gelu(vf x) {
    vf u = all(-1.5957691216f) * fused(all(0.044715f) * x * x, x, x);
    vf e = exponential(larger(all(-87.0f), -larger(-u, all(-80.0f)))); /* into the range of `exponential` */
    return x / (all(1.0f) + e);
}

#endif
