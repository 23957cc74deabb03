// One token of the latent cache: quantizing it as LatentCache.write does, bit for bit (NaN may have
// another payload), and widening what the products cannot take as it is stored.
#pragma once

#include "attention.h"
#include "isa.h"

namespace intserve::INTSERVE_ISA {

// The smallest scale, as deepseek/formats/scales.py has it.
constexpr float kSmallestScale = 0x1p-126f;

// 16 values from x + first on; zeros from `count` on.
INTSERVE_INLINE f32v load_some(const float* x, int first, int count) {
    const int left = count - first;
    return left >= kLanes ? load(x + first) : load_first(x + first, left);
}

// The largest magnitude, as an integer: so NaN is above infinity, and is not lost.
INTSERVE_INLINE float amax(const float* x, int count) {
    i32v peak = zeroi();
    for (int k = 0; k < count; k += kLanes) peak = max(peak, as_int(abs(load_some(x, k, count))));
    const int32_t bits = largest(peak);
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

INTSERVE_INLINE float at_least_smallest(float scale) {
    return scale < kSmallestScale ? kSmallestScale : scale;
}

// f32 rounded to e4m3, to nearest even, saturating at 448: the codes, in the low byte of each lane.
INTSERVE_INLINE i32v e4m3_bits(f32v x) {
    const f32v magnitude = abs(x);
    const f32v capped = min(splat(448.0f), magnitude);  // NaN stays
    const i32v bits = as_int(capped);
    const i32v odd = bit_and(shift_right<20>(bits), splati(1));
    const i32v normal = sub(shift_right<20>(add(add(bits, splati(0x7FFFF)), odd)), splati(120 << 3));
    // Below 2^-6 codes count steps of 2^-9.
    const f32v steps = min(splat(8.0f), magnitude * splat(0x1p9f));
    const f32v code = less_then(magnitude, splat(0x1p-6f), as_float(to_nearest(steps)), as_float(normal));
    const f32v number = less_then(capped, splat(449.0f), code, as_float(splati(0x7F)));
    return bit_or(as_int(number), bit_and(shift_right<24>(as_int(x)), splati(0x80)));
}

// 16 e4m3 codes -> their values as BF16 bits, exactly, in the low half of each lane.
INTSERVE_INLINE i32v bf16_of_e4m3(const uint8_t* codes) {
    const i32v code = load_u8(codes);
    const i32v magnitude = bit_and(code, splati(0x7F));
    // Shifted into the place of a float's exponent and mantissa it is a number 2^120 times smaller
    // (below 2^-6, a subnormal one).
    const f32v value = as_float(shift_left<20>(magnitude)) * splat(0x1p120f);
    const f32v checked = less_then(value, splat(480.0f), value, as_float(splati(0x7FC00000)));
    const i32v sign = shift_left<8>(bit_and(code, splati(0x80)));
    return bit_or(shift_right<16>(as_int(checked)), sign);
}

// Store the low bytes of the first `count` lanes.
INTSERVE_INLINE void store_bytes(uint8_t* p, i32v v, int count) {
    if (count >= kLanes) return store_low8(p, v);
    uint8_t lanes[kLanes];
    store_low8(lanes, v);
    std::memcpy(p, lanes, static_cast<size_t>(count));
}
INTSERVE_INLINE void store_halves(uint16_t* p, i32v v, int count) {
    if (count >= kLanes) return store_low16(p, v);
    uint16_t lanes[kLanes];
    store_low16(lanes, v);
    std::memcpy(p, lanes, 2 * static_cast<size_t>(count));
}

INTSERVE_INLINE void write_bf16(uint16_t* to, const float* x, int count) {
    for (int k = 0; k < count; k += kLanes)
        store_halves(to + k, bf16_bits(load_some(x, k, count)), count - k);
}
INTSERVE_INLINE void write_e4m3(uint8_t* to, const float* x, int count, float scale) {
    for (int k = 0; k < count; k += kLanes)
        store_bytes(to + k, e4m3_bits(load_some(x, k, count) / splat(scale)), count - k);
}

inline void write_token(const CacheView& cache, int64_t slot, const float* latent, const float* key) {
    const int rank = cache.latent, rope = cache.rope;
    uint8_t* const values = cache.values + slot * cache.value_bytes();
    if (cache.has_keys()) write_bf16(cache.keys + slot * rope, key, rope);
    switch (cache.layout) {
        case Layout::fp32:
            std::memcpy(values, latent, 4 * static_cast<size_t>(rank));
            std::memcpy(values + 4 * rank, key, 4 * static_cast<size_t>(rope));
            break;
        case Layout::bf16:
            write_bf16(reinterpret_cast<uint16_t*>(values), latent, rank);
            write_bf16(reinterpret_cast<uint16_t*>(values) + rank, key, rope);
            break;
        case Layout::fp8_tensor:
            write_e4m3(values, latent, rank, 1.0f);
            write_e4m3(values + rank, key, rope, 1.0f);
            break;
        case Layout::fp8_tiles:
            for (int tile = 0; tile < cache.tiles(); ++tile) {
                const float* x = latent + tile * kTile;
                const int count = rank - tile * kTile < kTile ? rank - tile * kTile : kTile;
                const float scale = at_least_smallest(amax(x, count) / 448.0f);
                cache.scales[slot * cache.tiles() + tile] = scale;
                write_e4m3(values + tile * kTile, x, count, scale);
            }
            break;
        case Layout::int8:
            const float scale = at_least_smallest(amax(latent, rank) / 127.0f);
            cache.scales[slot] = scale;
            for (int k = 0; k < rank; k += kLanes)
                store_bytes(values + k, to_nearest(load_some(latent, k, rank) / splat(scale)), rank - k);
            break;
    }
}

}  // namespace intserve::INTSERVE_ISA
