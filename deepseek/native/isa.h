// Vectors of 16 lanes for one instruction set. Kernels are written once on these types and
// functions, and compiled once per instruction set, each time in a namespace of its own
// (`intserve::avx2`, ...), so that no function that was compiled for one is ever linked for another.
//
// A kernel's source is a .cpp file in KERNELS of CMakeLists.txt:
//     #include "isa.h"
//     namespace intserve::INTSERVE_ISA { ... }
// It uses no inline functions of the standard library that the compiler might not inline.
//
//     avx512bf16   one zmm; BF16 dot products (vdpbf16ps)
//     avx512       one zmm; F, BW, DQ, VL and VNNI
//     avx2         two ymm; FMA and F16C. Products of 8 bits go through 16 bits, exactly.
//     portable     the compiler's own vectors, for any CPU
//
// Integer results are the same bits on all of them. Floating-point results differ where one fuses a
// multiplication with an addition and another cannot (`fma`, `dot_bf16`).
//
// AMX: a further namespace, whose kernels hold tiles of 16 rows of activations by 16 outputs. The
// weights' layout [K/4][16][4] is the one that its tiles are loaded from.
#pragma once

#include <cstdint>
#include <cstring>

#if INTSERVE_ISA_LEVEL > 0
#include <immintrin.h>
#endif

#define INTSERVE_INLINE static inline __attribute__((always_inline))

namespace intserve::INTSERVE_ISA {

constexpr int kLanes = 16;

#if INTSERVE_ISA_LEVEL >= 2  // avx512, avx512bf16

using f32v = __m512;   // 16 floats
using i32v = __m512i;  // 16 integers of 32 bits, 32 of 16 or 64 of 8: the function says which
using s8v = __m512i;   // 16 x 4 signed bytes, ready for dot_u8s8

INTSERVE_INLINE f32v load(const float* p) { return _mm512_loadu_ps(p); }
INTSERVE_INLINE void store(float* p, f32v v) { _mm512_storeu_ps(p, v); }
INTSERVE_INLINE __mmask16 first_lanes(int n) { return static_cast<__mmask16>((1u << n) - 1); }
INTSERVE_INLINE f32v load_first(const float* p, int n) {
    return _mm512_maskz_loadu_ps(first_lanes(n), p);
}
INTSERVE_INLINE void store_first(float* p, f32v v, int n) {
    _mm512_mask_storeu_ps(p, first_lanes(n), v);
}
INTSERVE_INLINE f32v splat(float x) { return _mm512_set1_ps(x); }
INTSERVE_INLINE f32v fma(f32v a, f32v b, f32v c) { return _mm512_fmadd_ps(a, b, c); }
INTSERVE_INLINE f32v max(f32v a, f32v b) { return _mm512_max_ps(a, b); }
INTSERVE_INLINE f32v min(f32v a, f32v b) { return _mm512_min_ps(a, b); }
INTSERVE_INLINE f32v less_then(f32v a, f32v b, f32v yes, f32v no) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes);
}

INTSERVE_INLINE i32v loadi(const void* p) { return _mm512_loadu_si512(p); }
INTSERVE_INLINE void storei(void* p, i32v v) { _mm512_storeu_si512(p, v); }
INTSERVE_INLINE i32v splati(int32_t x) { return _mm512_set1_epi32(x); }
INTSERVE_INLINE i32v add(i32v a, i32v b) { return _mm512_add_epi32(a, b); }
INTSERVE_INLINE i32v sub(i32v a, i32v b) { return _mm512_sub_epi32(a, b); }
INTSERVE_INLINE i32v bit_and(i32v a, i32v b) { return _mm512_and_si512(a, b); }
INTSERVE_INLINE i32v bit_or(i32v a, i32v b) { return _mm512_or_si512(a, b); }
INTSERVE_INLINE i32v bit_xor(i32v a, i32v b) { return _mm512_xor_si512(a, b); }
template <int N> INTSERVE_INLINE i32v shift_left(i32v a) { return _mm512_slli_epi32(a, N); }
template <int N> INTSERVE_INLINE i32v shift_right(i32v a) { return _mm512_srli_epi32(a, N); }
template <int N> INTSERVE_INLINE i32v shift_right_signed(i32v a) { return _mm512_srai_epi32(a, N); }
INTSERVE_INLINE i32v max(i32v a, i32v b) { return _mm512_max_epi32(a, b); }
INTSERVE_INLINE i32v min(i32v a, i32v b) { return _mm512_min_epi32(a, b); }

INTSERVE_INLINE f32v to_float(i32v a) { return _mm512_cvtepi32_ps(a); }
INTSERVE_INLINE i32v to_nearest(f32v a) { return _mm512_cvtps_epi32(a); }
INTSERVE_INLINE f32v as_float(i32v a) { return _mm512_castsi512_ps(a); }
INTSERVE_INLINE i32v as_int(f32v a) { return _mm512_castps_si512(a); }

INTSERVE_INLINE i32v load_u8(const uint8_t* p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
INTSERVE_INLINE i32v load_s8(const int8_t* p) {
    return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
INTSERVE_INLINE i32v load_u16(const uint16_t* p) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
INTSERVE_INLINE void store_low8(void* p, i32v v) {
    _mm_storeu_si128(static_cast<__m128i*>(p), _mm512_cvtepi32_epi8(v));
}
INTSERVE_INLINE void store_low16(uint16_t* p, i32v v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(v));
}

INTSERVE_INLINE s8v as_s8(i32v a) { return a; }
INTSERVE_INLINE s8v splat_s8(const int8_t* p) {
    int32_t x;
    std::memcpy(&x, p, 4);
    return _mm512_set1_epi32(x);
}
INTSERVE_INLINE i32v dot_u8s8(i32v acc, i32v u8, s8v s8) {
    return _mm512_dpbusd_epi32(acc, u8, s8);
}

#elif INTSERVE_ISA_LEVEL == 1  // avx2

struct f32v {
    __m256 a, b;
};
struct i32v {
    __m256i a, b;
};
// Even and odd bytes, widened to 16 bits, of both halves.
struct s8v {
    __m256i even_a, odd_a, even_b, odd_b;
};

INTSERVE_INLINE f32v operator+(f32v x, f32v y) {
    return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)};
}
INTSERVE_INLINE f32v operator-(f32v x, f32v y) {
    return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)};
}
INTSERVE_INLINE f32v operator*(f32v x, f32v y) {
    return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)};
}
INTSERVE_INLINE f32v operator/(f32v x, f32v y) {
    return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)};
}

INTSERVE_INLINE f32v load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
INTSERVE_INLINE void store(float* p, f32v v) {
    _mm256_storeu_ps(p, v.a);
    _mm256_storeu_ps(p + 8, v.b);
}
INTSERVE_INLINE __m256i mask8(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
INTSERVE_INLINE f32v load_first(const float* p, int n) {
    return {_mm256_maskload_ps(p, mask8(n)), _mm256_maskload_ps(p + 8, mask8(n - 8))};
}
INTSERVE_INLINE void store_first(float* p, f32v v, int n) {
    _mm256_maskstore_ps(p, mask8(n), v.a);
    _mm256_maskstore_ps(p + 8, mask8(n - 8), v.b);
}
INTSERVE_INLINE f32v splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
INTSERVE_INLINE f32v fma(f32v x, f32v y, f32v z) {
    return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
INTSERVE_INLINE f32v max(f32v x, f32v y) {
    return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)};
}
INTSERVE_INLINE f32v min(f32v x, f32v y) {
    return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)};
}
INTSERVE_INLINE f32v less_then(f32v x, f32v y, f32v yes, f32v no) {
    return {_mm256_blendv_ps(no.a, yes.a, _mm256_cmp_ps(x.a, y.a, _CMP_LT_OQ)),
            _mm256_blendv_ps(no.b, yes.b, _mm256_cmp_ps(x.b, y.b, _CMP_LT_OQ))};
}

INTSERVE_INLINE i32v loadi(const void* p) {
    const __m256i* q = static_cast<const __m256i*>(p);
    return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
}
INTSERVE_INLINE void storei(void* p, i32v v) {
    __m256i* q = static_cast<__m256i*>(p);
    _mm256_storeu_si256(q, v.a);
    _mm256_storeu_si256(q + 1, v.b);
}
INTSERVE_INLINE i32v splati(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
#define INTSERVE_BINARY(NAME, INTRINSIC) \
    INTSERVE_INLINE i32v NAME(i32v x, i32v y) { return {INTRINSIC(x.a, y.a), INTRINSIC(x.b, y.b)}; }
INTSERVE_BINARY(add, _mm256_add_epi32)
INTSERVE_BINARY(sub, _mm256_sub_epi32)
INTSERVE_BINARY(bit_and, _mm256_and_si256)
INTSERVE_BINARY(bit_or, _mm256_or_si256)
INTSERVE_BINARY(bit_xor, _mm256_xor_si256)
INTSERVE_BINARY(max, _mm256_max_epi32)
INTSERVE_BINARY(min, _mm256_min_epi32)
#undef INTSERVE_BINARY
template <int N> INTSERVE_INLINE i32v shift_left(i32v x) {
    return {_mm256_slli_epi32(x.a, N), _mm256_slli_epi32(x.b, N)};
}
template <int N> INTSERVE_INLINE i32v shift_right(i32v x) {
    return {_mm256_srli_epi32(x.a, N), _mm256_srli_epi32(x.b, N)};
}
template <int N> INTSERVE_INLINE i32v shift_right_signed(i32v x) {
    return {_mm256_srai_epi32(x.a, N), _mm256_srai_epi32(x.b, N)};
}

INTSERVE_INLINE f32v to_float(i32v x) {
    return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)};
}
INTSERVE_INLINE i32v to_nearest(f32v x) {
    return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)};
}
INTSERVE_INLINE f32v as_float(i32v x) {
    return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)};
}
INTSERVE_INLINE i32v as_int(f32v x) {
    return {_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)};
}

INTSERVE_INLINE i32v load_u8(const uint8_t* p) {
    const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_cvtepu8_epi32(v), _mm256_cvtepu8_epi32(_mm_srli_si128(v, 8))};
}
INTSERVE_INLINE i32v load_s8(const int8_t* p) {
    const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_cvtepi8_epi32(v), _mm256_cvtepi8_epi32(_mm_srli_si128(v, 8))};
}
INTSERVE_INLINE i32v load_u16(const uint16_t* p) {
    const __m128i* q = reinterpret_cast<const __m128i*>(p);
    return {_mm256_cvtepu16_epi32(_mm_loadu_si128(q)), _mm256_cvtepu16_epi32(_mm_loadu_si128(q + 1))};
}
// The low 16 bits of each lane, in order.
INTSERVE_INLINE __m256i low16(i32v v) {
    const __m256i mask = _mm256_set1_epi32(0xFFFF);
    const __m256i packed =
        _mm256_packus_epi32(_mm256_and_si256(v.a, mask), _mm256_and_si256(v.b, mask));
    return _mm256_permute4x64_epi64(packed, 0xD8);
}
INTSERVE_INLINE void store_low16(uint16_t* p, i32v v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), low16(v));
}
INTSERVE_INLINE void store_low8(void* p, i32v v) {
    const __m256i words = _mm256_and_si256(low16(v), _mm256_set1_epi16(0xFF));
    const __m128i bytes =
        _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128(static_cast<__m128i*>(p), bytes);
}

INTSERVE_INLINE __m256i even_s8(__m256i x) { return _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8); }
INTSERVE_INLINE s8v as_s8(i32v x) {
    return {even_s8(x.a), _mm256_srai_epi16(x.a, 8), even_s8(x.b), _mm256_srai_epi16(x.b, 8)};
}
INTSERVE_INLINE s8v splat_s8(const int8_t* p) {
    int32_t x;
    std::memcpy(&x, p, 4);
    const __m256i v = _mm256_set1_epi32(x), even = even_s8(v), odd = _mm256_srai_epi16(v, 8);
    return {even, odd, even, odd};
}
INTSERVE_INLINE __m256i dot8(__m256i acc, __m256i u8, __m256i even, __m256i odd) {
    const __m256i low = _mm256_and_si256(u8, _mm256_set1_epi16(0xFF));
    const __m256i sum =
        _mm256_add_epi32(_mm256_madd_epi16(low, even), _mm256_madd_epi16(_mm256_srli_epi16(u8, 8), odd));
    return _mm256_add_epi32(acc, sum);
}
INTSERVE_INLINE i32v dot_u8s8(i32v acc, i32v u8, s8v s8) {
    return {dot8(acc.a, u8.a, s8.even_a, s8.odd_a), dot8(acc.b, u8.b, s8.even_b, s8.odd_b)};
}

#else  // portable

typedef float f32v __attribute__((vector_size(64)));
typedef int32_t i32v __attribute__((vector_size(64)));
typedef uint32_t u32v __attribute__((vector_size(64)));
using s8v = i32v;

INTSERVE_INLINE f32v load(const float* p) {
    f32v v;
    std::memcpy(&v, p, 64);
    return v;
}
INTSERVE_INLINE void store(float* p, f32v v) { std::memcpy(p, &v, 64); }
INTSERVE_INLINE f32v load_first(const float* p, int n) {
    f32v v = {};
    for (int i = 0; i < kLanes; ++i)
        if (i < n) v[i] = p[i];
    return v;
}
INTSERVE_INLINE void store_first(float* p, f32v v, int n) {
    for (int i = 0; i < kLanes; ++i)
        if (i < n) p[i] = v[i];
}
INTSERVE_INLINE f32v splat(float x) { return f32v{} + x; }
INTSERVE_INLINE f32v fma(f32v a, f32v b, f32v c) { return a * b + c; }
INTSERVE_INLINE f32v max(f32v a, f32v b) { return a > b ? a : b; }
INTSERVE_INLINE f32v min(f32v a, f32v b) { return a < b ? a : b; }
INTSERVE_INLINE f32v less_then(f32v a, f32v b, f32v yes, f32v no) { return a < b ? yes : no; }

INTSERVE_INLINE i32v loadi(const void* p) {
    i32v v;
    std::memcpy(&v, p, 64);
    return v;
}
INTSERVE_INLINE void storei(void* p, i32v v) { std::memcpy(p, &v, 64); }
INTSERVE_INLINE i32v splati(int32_t x) { return i32v{} + x; }
// Sums wrap around, as the instructions' do.
INTSERVE_INLINE i32v add(i32v a, i32v b) { return (i32v)((u32v)a + (u32v)b); }
INTSERVE_INLINE i32v sub(i32v a, i32v b) { return (i32v)((u32v)a - (u32v)b); }
INTSERVE_INLINE i32v bit_and(i32v a, i32v b) { return a & b; }
INTSERVE_INLINE i32v bit_or(i32v a, i32v b) { return a | b; }
INTSERVE_INLINE i32v bit_xor(i32v a, i32v b) { return a ^ b; }
template <int N> INTSERVE_INLINE i32v shift_left(i32v a) { return (i32v)((u32v)a << N); }
template <int N> INTSERVE_INLINE i32v shift_right(i32v a) { return (i32v)((u32v)a >> N); }
template <int N> INTSERVE_INLINE i32v shift_right_signed(i32v a) { return a >> N; }
INTSERVE_INLINE i32v max(i32v a, i32v b) { return a > b ? a : b; }
INTSERVE_INLINE i32v min(i32v a, i32v b) { return a < b ? a : b; }

INTSERVE_INLINE f32v to_float(i32v a) { return __builtin_convertvector(a, f32v); }
INTSERVE_INLINE f32v as_float(i32v a) { return (f32v)a; }
INTSERVE_INLINE i32v as_int(f32v a) { return (i32v)a; }
// Adding and subtracting 1.5 * 2^23 rounds to the nearest even integer, below 2^22.
INTSERVE_INLINE i32v to_nearest(f32v a) {
    return __builtin_convertvector((a + 12582912.0f) - 12582912.0f, i32v);
}

template <class T> INTSERVE_INLINE i32v load_lanes(const T* p) {
    i32v v;
    for (int i = 0; i < kLanes; ++i) v[i] = p[i];
    return v;
}
INTSERVE_INLINE i32v load_u8(const uint8_t* p) { return load_lanes(p); }
INTSERVE_INLINE i32v load_s8(const int8_t* p) { return load_lanes(p); }
INTSERVE_INLINE i32v load_u16(const uint16_t* p) { return load_lanes(p); }
INTSERVE_INLINE void store_low8(void* p, i32v v) {
    for (int i = 0; i < kLanes; ++i) static_cast<uint8_t*>(p)[i] = static_cast<uint8_t>(v[i]);
}
INTSERVE_INLINE void store_low16(uint16_t* p, i32v v) {
    for (int i = 0; i < kLanes; ++i) p[i] = static_cast<uint16_t>(v[i]);
}

INTSERVE_INLINE s8v as_s8(i32v a) { return a; }
INTSERVE_INLINE s8v splat_s8(const int8_t* p) {
    int32_t x;
    std::memcpy(&x, p, 4);
    return splati(x);
}
template <int J> INTSERVE_INLINE i32v product_of_bytes(i32v u8, i32v s8) {
    return (shift_right<8 * J>(u8) & 0xFF) * shift_right_signed<24>(shift_left<24 - 8 * J>(s8));
}
INTSERVE_INLINE i32v dot_u8s8(i32v acc, i32v u8, s8v s8) {
    const i32v sum = product_of_bytes<0>(u8, s8) + product_of_bytes<1>(u8, s8) +
                     product_of_bytes<2>(u8, s8) + product_of_bytes<3>(u8, s8);
    return add(acc, sum);
}

#endif

INTSERVE_INLINE f32v zero() { return splat(0.0f); }
INTSERVE_INLINE i32v zeroi() { return splati(0); }
INTSERVE_INLINE f32v abs(f32v a) { return as_float(bit_and(as_int(a), splati(0x7FFFFFFF))); }
INTSERVE_INLINE f32v negate(f32v a) { return as_float(bit_xor(as_int(a), splati(INT32_MIN))); }

// BF16 ---------------------------------------------------------------------------------------

// 16 BF16 values, exactly.
INTSERVE_INLINE f32v load_bf16(const uint16_t* p) { return as_float(shift_left<16>(load_u16(p))); }

// The bits of each lane rounded to BF16, to nearest even, as torch rounds: subnormal numbers are
// kept, and NaN becomes 0x7FC0. In the low 16 bits of a lane.
INTSERVE_INLINE i32v bf16_bits(f32v a) {
    const i32v bits = as_int(a);
    const i32v odd = bit_and(shift_right<16>(bits), splati(1));
    const i32v rounded = shift_right<16>(add(add(bits, splati(0x7FFF)), odd));
    // In every bit of a lane that holds NaN: the magnitude is above infinity's.
    const i32v nan =
        shift_right_signed<31>(sub(splati(0x7F800000), bit_and(bits, splati(0x7FFFFFFF))));
    return bit_or(bit_and(bit_xor(nan, splati(-1)), rounded), bit_and(nan, splati(0x7FC0)));
}
INTSERVE_INLINE void store_bf16(uint16_t* p, f32v a) { store_low16(p, bf16_bits(a)); }
INTSERVE_INLINE f32v round_bf16(f32v a) { return as_float(shift_left<16>(bf16_bits(a))); }

// Pairs of BF16 in each lane: acc + even * even + odd * odd, in FP32.
#if INTSERVE_ISA_LEVEL == 3
using bf16v = __m512i;
INTSERVE_INLINE bf16v as_bf16(i32v a) { return a; }
INTSERVE_INLINE bf16v splat_bf16(const uint16_t* p) {
    int32_t x;
    std::memcpy(&x, p, 4);
    return _mm512_set1_epi32(x);
}
INTSERVE_INLINE f32v dot_bf16(f32v acc, bf16v x, bf16v y) {
    return _mm512_dpbf16_ps(acc, (__m512bh)x, (__m512bh)y);
}
#else
struct bf16v {
    f32v even, odd;
};
INTSERVE_INLINE bf16v as_bf16(i32v a) {
    return {as_float(shift_left<16>(a)), as_float(bit_and(a, splati(static_cast<int32_t>(0xFFFF0000))))};
}
INTSERVE_INLINE bf16v splat_bf16(const uint16_t* p) {
    const uint32_t even = static_cast<uint32_t>(p[0]) << 16, odd = static_cast<uint32_t>(p[1]) << 16;
    float x, y;
    std::memcpy(&x, &even, 4);
    std::memcpy(&y, &odd, 4);
    return {splat(x), splat(y)};
}
INTSERVE_INLINE f32v dot_bf16(f32v acc, bf16v x, bf16v y) {
    return fma(x.odd, y.odd, fma(x.even, y.even, acc));
}
#endif

// Lanes together -----------------------------------------------------------------------------

// Sums of floats add the upper half of the lanes to the lower half, again and again, everywhere.
#if INTSERVE_ISA_LEVEL >= 2
INTSERVE_INLINE float sum(f32v a) { return _mm512_reduce_add_ps(a); }
INTSERVE_INLINE int32_t sum(i32v a) { return _mm512_reduce_add_epi32(a); }
INTSERVE_INLINE float largest(f32v a) { return _mm512_reduce_max_ps(a); }
INTSERVE_INLINE int32_t largest(i32v a) { return _mm512_reduce_max_epi32(a); }
#else
INTSERVE_INLINE float sum(f32v a) {
    float lanes[kLanes];
    store(lanes, a);
    for (int half = kLanes / 2; half; half /= 2)
        for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    return lanes[0];
}
INTSERVE_INLINE int32_t sum(i32v a) {
    uint32_t lanes[kLanes], total = 0;
    storei(lanes, a);
    for (int i = 0; i < kLanes; ++i) total += lanes[i];
    return static_cast<int32_t>(total);
}
INTSERVE_INLINE int32_t largest(i32v a) {
    int32_t lanes[kLanes];
    storei(lanes, a);
    int32_t found = lanes[0];
    for (int i = 1; i < kLanes; ++i) found = lanes[i] > found ? lanes[i] : found;
    return found;
}
INTSERVE_INLINE float largest(f32v a) {
    float lanes[kLanes];
    store(lanes, a);
    float found = lanes[0];
    for (int i = 1; i < kLanes; ++i) found = lanes[i] > found ? lanes[i] : found;
    return found;
}
#endif

// Elementary functions -----------------------------------------------------------------------

// e^a within 2 units in the last place; 0 below the smallest normal result, infinity above the
// largest, NaN for NaN. a = n ln 2 + r with |r| <= ln 2 / 2; e^r is its Taylor series to r^7, whose
// error is below 2^-27; 2^n multiplies in two steps, because 2^128 is no float.
INTSERVE_INLINE f32v exp(f32v a) {
    const f32v low = splat(-87.336544f), high = splat(88.8f);
    // `max` and `min` return their second argument where one is NaN.
    const f32v x = min(high, max(low, a));
    const i32v n = to_nearest(x * splat(1.44269504f));
    const f32v nf = to_float(n);
    f32v r = fma(nf, splat(-0.693359375f), x);
    r = fma(nf, splat(2.12194440e-4f), r);
    f32v p = splat(1.0f / 5040);
    p = fma(p, r, splat(1.0f / 720));
    p = fma(p, r, splat(1.0f / 120));
    p = fma(p, r, splat(1.0f / 24));
    p = fma(p, r, splat(1.0f / 6));
    p = fma(p, r, splat(0.5f));
    p = fma(p, r, splat(1.0f));
    p = fma(p, r, splat(1.0f));
    const i32v half = shift_right_signed<1>(n);
    const f32v first = as_float(shift_left<23>(add(half, splati(127))));
    const f32v second = as_float(shift_left<23>(add(sub(n, half), splati(127))));
    return less_then(a, low, zero(), p * first * second);
}

// a / (1 + e^-a).
INTSERVE_INLINE f32v silu(f32v a) { return a / (splat(1.0f) + exp(negate(a))); }

}  // namespace intserve::INTSERVE_ISA
