// The products of attention: a vector operand of 16 query rows times values that are broadcast.
//
// Both operands are dwords of 1 FP32, 2 BF16, 2 INT16 or 4 INT8 values. The vector operand is packed
// as [dwords][terms][16 rows]; the other is read dword by dword, from a token's row (scores) or from
// a panel of interleaved tokens (values). Each output's sum runs in the order of the dwords.
#pragma once

#include "isa.h"

namespace intserve::INTSERVE_ISA {

struct Fp32 {
    using Sum = f32v;
    static constexpr int kTerms = 1, kPer = 1;
    INTSERVE_INLINE f32v zero_sum() { return zero(); }
    INTSERVE_INLINE f32v vector(const int32_t* p) { return as_float(loadi(p)); }
    INTSERVE_INLINE f32v broadcast(int32_t x) { return as_float(splati(x)); }
    INTSERVE_INLINE f32v dot(f32v sum, f32v a, f32v b) { return fma(a, b, sum); }
};

struct Bf16 {
    using Sum = f32v;
    static constexpr int kTerms = 1, kPer = 2;
    INTSERVE_INLINE f32v zero_sum() { return zero(); }
    INTSERVE_INLINE bf16v vector(const int32_t* p) { return as_bf16(loadi(p)); }
    INTSERVE_INLINE bf16v broadcast(int32_t x) { return as_bf16(splati(x)); }
    INTSERVE_INLINE f32v dot(f32v sum, bf16v a, bf16v b) { return dot_bf16(sum, a, b); }
};

// Integers of 16 bits times codes of 8, exactly.
#if INTSERVE_ISA_LEVEL >= 2
// The high and the low byte of each integer, both unsigned, are two terms over the same 4 codes.
struct Int16 {
    // The type that the instruction's own function has: with i32v, GCC 12 copies each sum between
    // registers before and after each product.
    typedef int32_t Sum __attribute__((vector_size(64)));
    static constexpr int kTerms = 2, kPer = 4;
    INTSERVE_INLINE Sum zero_sum() { return (Sum)zeroi(); }
    INTSERVE_INLINE i32v vector(const int32_t* p) { return loadi(p); }
    INTSERVE_INLINE s8v broadcast(int32_t x) { return as_s8(splati(x)); }
    INTSERVE_INLINE Sum dot(Sum sum, i32v a, s8v b) { return (Sum)dot_u8s8((i32v)sum, a, b); }
};
#else
// Codes are widened to 16 bits before.
struct Int16 {
    using Sum = i32v;
    static constexpr int kTerms = 1, kPer = 2;
    INTSERVE_INLINE i32v zero_sum() { return zeroi(); }
    INTSERVE_INLINE i32v vector(const int32_t* p) { return loadi(p); }
    INTSERVE_INLINE i32v broadcast(int32_t x) { return splati(x); }
#if INTSERVE_ISA_LEVEL == 1
    INTSERVE_INLINE i32v dot(i32v sum, i32v a, i32v b) {
        return {_mm256_add_epi32(sum.a, _mm256_madd_epi16(a.a, b.a)),
                _mm256_add_epi32(sum.b, _mm256_madd_epi16(a.b, b.b))};
    }
#else
    INTSERVE_INLINE i32v low(i32v x) { return shift_right_signed<16>(shift_left<16>(x)); }
    INTSERVE_INLINE i32v dot(i32v sum, i32v a, i32v b) {
        return add(sum, add(low(a) * low(b), shift_right_signed<16>(a) * shift_right_signed<16>(b)));
    }
#endif
};
#endif

// Values broadcast at once: enough sums to hide an instruction's latency, as registers allow.
#if INTSERVE_ISA_LEVEL >= 2
constexpr int kAtOnce = 8;
#else
constexpr int kAtOnce = 4;
#endif

// sums[vector][term][n] += sum over dwords of a[vector][.] * b[n][. * STRIDE]; at least one dword.
template <class E, int VECTORS, int STRIDE>
INTSERVE_INLINE void multiply(typename E::Sum (&sums)[VECTORS][E::kTerms][kAtOnce],
                              const int32_t* const (&a)[VECTORS],
                              const int32_t* const (&b)[kAtOnce], int64_t dwords) {
    constexpr int kTerms = E::kTerms, kRows = VECTORS * kTerms, kStep = kTerms * kLanes;
    // Of their own, so that they stay in registers.
    typename E::Sum own[kRows * kAtOnce];
#pragma GCC unroll 32
    for (int i = 0; i < kRows * kAtOnce; ++i)
        own[i] = sums[i / kAtOnce / kTerms][i / kAtOnce % kTerms][i % kAtOnce];
    int64_t s = 0;
    do {
        decltype(E::vector(a[0])) x[kRows];
#pragma GCC unroll 4
        for (int row = 0; row < kRows; ++row)
            x[row] = E::vector(a[row / kTerms] + s * kStep + row % kTerms * kLanes);
#pragma GCC unroll 8
        for (int n = 0; n < kAtOnce; ++n) {
            int32_t dword;
            std::memcpy(&dword, b[n] + s * STRIDE, 4);
            const auto y = E::broadcast(dword);
#pragma GCC unroll 4
            for (int row = 0; row < kRows; ++row)
                own[row * kAtOnce + n] = E::dot(own[row * kAtOnce + n], x[row], y);
        }
    } while (++s < dwords);
#pragma GCC unroll 32
    for (int i = 0; i < kRows * kAtOnce; ++i)
        sums[i / kAtOnce / kTerms][i / kAtOnce % kTerms][i % kAtOnce] = own[i];
}

// Panels of interleaved tokens -----------------------------------------------------------------
//
// For the weighted sums a dword holds one channel of 1, 2 or 4 consecutive tokens. A group of
// channels (those of 64 bytes of a row) is interleaved into panels of 16 dwords,
// [panel][dwords][16], small enough for the first cache.

constexpr int kGroupBytes = 64;

// Which channel of its group a panel's dword holds.
template <int PER> constexpr int channel_of(int panel, int dword) {
#if INTSERVE_ISA_LEVEL >= 2
    // What unpacking 128-bit lanes with each other gives.
    return PER == 1 ? dword : dword / 4 * 4 * PER + 4 * panel + dword % 4;
#else
    return panel * kLanes + dword;
#endif
}

// One dword of each panel, from the rows of PER tokens at the group's first channel.
template <int PER>
INTSERVE_INLINE void interleave(const uint8_t* const (&rows)[PER], int64_t panel_size, int32_t* to) {
    if constexpr (PER == 1) {
        storei(to, loadi(rows[0]));
#if INTSERVE_ISA_LEVEL >= 2
    } else if constexpr (PER == 2) {
        const i32v a = loadi(rows[0]), b = loadi(rows[1]);
        storei(to, _mm512_unpacklo_epi16(a, b));
        storei(to + panel_size, _mm512_unpackhi_epi16(a, b));
    } else {
        const i32v a = loadi(rows[0]), b = loadi(rows[1]), c = loadi(rows[2]), d = loadi(rows[3]);
        const i32v low = _mm512_unpacklo_epi8(a, b), other_low = _mm512_unpacklo_epi8(c, d);
        const i32v high = _mm512_unpackhi_epi8(a, b), other_high = _mm512_unpackhi_epi8(c, d);
        storei(to, _mm512_unpacklo_epi16(low, other_low));
        storei(to + panel_size, _mm512_unpackhi_epi16(low, other_low));
        storei(to + 2 * panel_size, _mm512_unpacklo_epi16(high, other_high));
        storei(to + 3 * panel_size, _mm512_unpackhi_epi16(high, other_high));
#else
    } else {
        for (int panel = 0; panel < PER; ++panel) {
            const uint16_t* const a = reinterpret_cast<const uint16_t*>(rows[0]) + panel * kLanes;
            const uint16_t* const b = reinterpret_cast<const uint16_t*>(rows[1]) + panel * kLanes;
            storei(to + panel * panel_size, bit_or(load_u16(a), shift_left<16>(load_u16(b))));
        }
#endif
    }
}

}  // namespace intserve::INTSERVE_ISA
