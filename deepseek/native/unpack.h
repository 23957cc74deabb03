// 64 bytes of codes (16 lanes of 4 bytes) -> pairs of BF16 values per lane, in the order of inputs.
#pragma once

#include "isa.h"

namespace intserve::INTSERVE_ISA {

#if INTSERVE_ISA_LEVEL == 3

// Bytes 0 and 1 (2 and 3) of each lane, widened to 16 bits.
INTSERVE_INLINE i32v low_words(i32v a) {
    return _mm512_shuffle_epi8(a, _mm512_set4_epi32(0x800D800C, 0x80098008, 0x80058004, 0x80018000));
}
INTSERVE_INLINE i32v high_words(i32v a) {
    return _mm512_shuffle_epi8(a, _mm512_set4_epi32(0x800F800E, 0x800B800A, 0x80078006, 0x80038002));
}

// u4 = code + 8 -> the codes of inputs (0, 1), (2, 3), (4, 5), (6, 7). The BF16 values are looked up
// by the low five bits of a word, of which the fifth is the next code's.
INTSERVE_INLINE void unpack_int4(i32v a, bf16v pairs[4]) {
    // -8 .. 7, twice: 0xC100 is -8, 0x40E0 is 7.
    const i32v half = _mm512_castsi256_si512(_mm256_set_epi16(
        0x40E0, 0x40C0, 0x40A0, 0x4080, 0x4040, 0x4000, 0x3F80, 0, static_cast<short>(0xBF80),
        static_cast<short>(0xC000), static_cast<short>(0xC040), static_cast<short>(0xC080),
        static_cast<short>(0xC0A0), static_cast<short>(0xC0C0), static_cast<short>(0xC0E0),
        static_cast<short>(0xC100)));
    const i32v table = _mm512_shuffle_i64x2(half, half, 0x44);
    const i32v low = low_words(a), high = high_words(a);
    pairs[0] = _mm512_permutexvar_epi16(low, table);
    pairs[1] = _mm512_permutexvar_epi16(high, table);
    pairs[2] = _mm512_permutexvar_epi16(_mm512_srli_epi16(low, 4), table);
    pairs[3] = _mm512_permutexvar_epi16(_mm512_srli_epi16(high, 4), table);
}

// u8 = code + 128 -> the codes of inputs (0, 1) and (2, 3) over kInt8Unit, which BF16 holds exactly:
// the upper half of their FP32 form. A code becomes the top byte of its lane, with its sign, which
// takes one instruction where extending the sign would take three.
constexpr float kInt8Unit = 0x1p-24f;
template <int J> INTSERVE_INLINE i32v float_of_byte(i32v a) {
    const i32v top = _mm512_set4_epi32((12 + J) << 24 | 0x808080, (8 + J) << 24 | 0x808080,
                                       (4 + J) << 24 | 0x808080, J << 24 | 0x808080);
    return as_int(to_float(_mm512_shuffle_epi8(a, top)));
}
INTSERVE_INLINE i32v pair_of(i32v even, i32v odd) { return bit_or(shift_right<16>(even), odd); }
INTSERVE_INLINE void unpack_int8(i32v a, bf16v pairs[2]) {
    a = _mm512_xor_si512(a, splati(static_cast<int32_t>(0x80808080)));
    pairs[0] = pair_of(float_of_byte<0>(a), float_of_byte<1>(a));
    pairs[1] = pair_of(float_of_byte<2>(a), float_of_byte<3>(a));
}

#else

template <int Shift, int Mask, int Offset> INTSERVE_INLINE f32v code(i32v a) {
    return to_float(sub(bit_and(shift_right<Shift>(a), splati(Mask)), splati(Offset)));
}
INTSERVE_INLINE void unpack_int4(i32v a, bf16v pairs[4]) {
    pairs[0] = {code<0, 15, 8>(a), code<8, 15, 8>(a)};
    pairs[1] = {code<16, 15, 8>(a), code<24, 15, 8>(a)};
    pairs[2] = {code<4, 15, 8>(a), code<12, 15, 8>(a)};
    pairs[3] = {code<20, 15, 8>(a), code<28, 15, 8>(a)};
}
constexpr float kInt8Unit = 1.0f;
INTSERVE_INLINE void unpack_int8(i32v a, bf16v pairs[2]) {
    pairs[0] = {code<0, 255, 128>(a), code<8, 255, 128>(a)};
    pairs[1] = {code<16, 255, 128>(a), code<24, 255, 128>(a)};
}

#endif

}  // namespace intserve::INTSERVE_ISA
