// What the fastest instructions of this CPU reach on registers alone: the floor under every product
// of bench/native_linear.py. Each function runs `steps` steps of 16 independent sums and returns a
// number that depends on all of them.
#include <immintrin.h>
#include <stdint.h>

#define SUMS 16

#if defined(__AVX512VNNI__)
// 64 products of 8 bits per sum and step.
int64_t int8_products(int64_t steps) {
    __m512i sums[SUMS], a = _mm512_set1_epi32(0x01020304), b = _mm512_set1_epi32(0x04030201);
    for (int i = 0; i < SUMS; ++i) sums[i] = _mm512_set1_epi32(i);
    for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 16
        for (int i = 0; i < SUMS; ++i) sums[i] = _mm512_dpbusd_epi32(sums[i], a, b);
        __asm__ volatile("" : "+v"(a), "+v"(b));
    }
    __m512i all = sums[0];
    for (int i = 1; i < SUMS; ++i) all = _mm512_add_epi32(all, sums[i]);
    return _mm512_reduce_add_epi32(all);
}
#else
int64_t int8_products(int64_t steps) { return steps * 0; }
#endif

#if defined(__AVX512BF16__)
// 32 products of BF16 per sum and step.
int64_t bf16_products(int64_t steps) {
    __m512 sums[SUMS];
    __m512i a = _mm512_set1_epi32(0x3F803F80);
    for (int i = 0; i < SUMS; ++i) sums[i] = _mm512_set1_ps((float)i);
    for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 16
        for (int i = 0; i < SUMS; ++i) sums[i] = _mm512_dpbf16_ps(sums[i], (__m512bh)a, (__m512bh)a);
        __asm__ volatile("" : "+v"(a));
    }
    __m512 all = sums[0];
    for (int i = 1; i < SUMS; ++i) all = _mm512_add_ps(all, sums[i]);
    return (int64_t)_mm512_reduce_add_ps(all);
}
#else
int64_t bf16_products(int64_t steps) { return steps * 0; }
#endif

// The sum of the bytes' words, read in four streams as far apart as cache lines.
int64_t read_words(const uint64_t *words, int64_t count) {
    uint64_t sums[32] = {0};
    for (int64_t i = 0; i + 32 <= count; i += 32)
        for (int j = 0; j < 32; ++j) sums[j] += words[i + j];
    uint64_t all = 0;
    for (int j = 0; j < 32; ++j) all += sums[j];
    return (int64_t)all;
}
