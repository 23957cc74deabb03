// Rounding of inputs (linear.h), with the bits of deepseek/formats.
#include "isa.h"
#include "linear.h"

namespace intserve::INTSERVE_ISA {

namespace {

constexpr int kTile = 128;  // channels of a scale of Encoding::int8_tiles
constexpr int kPart = 32;   // inputs of a sum
// The smallest scale, as deepseek/formats/scales.py has it.
constexpr float kSmallestScale = 0x1p-126f;

// The 16 values from `first` on, zeros beyond the row.
INTSERVE_INLINE f32v load_row(const float* x, int64_t first, int64_t inputs) {
    const int64_t left = inputs - first;
    if (left >= kLanes) return load(x + first);
    return left > 0 ? load_first(x + first, static_cast<int>(left)) : zero();
}

// amax / 127 of the values [first, last). Magnitudes are compared as integers, in which NaN is
// above infinity, so a row with NaN gets the scale NaN.
INTSERVE_INLINE float int8_scale(const float* x, int64_t first, int64_t last, int64_t inputs) {
    i32v peak = zeroi();
    for (int64_t k = first; k < last; k += kLanes)
        peak = max(peak, as_int(abs(load_row(x, k, inputs))));
    const int32_t bits = largest(peak);
    float amax;
    std::memcpy(&amax, &bits, 4);
    const float scale = amax / 127.0f;
    return scale < kSmallestScale ? kSmallestScale : scale;
}

// Round the values [first, last), a multiple of 32, and return the sum of their codes.
INTSERVE_INLINE int32_t round_int8(const float* x, int64_t first, int64_t last, int64_t inputs,
                                   float scale, int8_t* codes, int32_t* sums) {
    const f32v divisor = splat(scale);
    int32_t total = 0;
    for (int64_t k = first; k < last; k += kPart) {
        const i32v low = to_nearest(load_row(x, k, inputs) / divisor);
        const i32v high = to_nearest(load_row(x, k + kLanes, inputs) / divisor);
        store_low8(codes + k, low);
        store_low8(codes + k + kLanes, high);
        total += sums[k / kPart] = sum(add(low, high));
    }
    return total;
}

// To e4m3 and back, ties to even, saturating at 448; NaN stays NaN.
INTSERVE_INLINE f32v round_e4m3(f32v steps) {
    const f32v x = min(splat(448.0f), max(splat(-448.0f), steps));
    const i32v bits = as_int(x);
    const i32v odd = bit_and(shift_right<20>(bits), splati(1));
    const i32v kept = bit_and(add(add(bits, splati(0x7FFFF)), odd), splati(~0xFFFFF));
    // Below 2^-6 the codes are multiples of 2^-9, which is the last place of numbers near 1.5 * 2^14.
    const f32v small = (x + splat(0x1.8p14f)) - splat(0x1.8p14f);
    return less_then(abs(x), splat(0x1p-6f), small, as_float(kept));
}

template <bool Fp8>
void round_to_bf16(const float* x, const Encoded& to, int64_t row, float input_scale) {
    uint16_t* data = reinterpret_cast<uint16_t*>(to.data + row * to.row_bytes());
    float* sums = reinterpret_cast<float*>(to.sums) + row * (to.padded / kPart);
    float total = 0.0f;
    for (int64_t k = 0; k < to.padded; k += kPart) {
        f32v halves[2];
        for (int i = 0; i < 2; ++i) {
            f32v value = load_row(x, k + i * kLanes, to.inputs);
            if (Fp8) value = round_e4m3(value / splat(input_scale));
            const i32v bits = bf16_bits(value);
            store_low16(data + k + i * kLanes, bits);
            halves[i] = as_float(shift_left<16>(bits));
        }
        total += sums[k / kPart] = sum(halves[0] + halves[1]);
    }
    reinterpret_cast<float*>(to.total)[row] = total;
}

void encode_rows(int threads, const float* x, int64_t rows, float input_scale, const Encoded& to) {
    run_team(threads, 1, [&](Worker& worker) {
        encode(worker, x, to.inputs, rows, input_scale, to);
    });
}

}  // namespace

void encode_row(const float* x, const Encoded& to, int64_t row, float input_scale) {
    if (to.encoding == Encoding::bf16) return round_to_bf16<false>(x, to, row, input_scale);
    if (to.encoding == Encoding::fp8) return round_to_bf16<true>(x, to, row, input_scale);
    int8_t* data = reinterpret_cast<int8_t*>(to.data + row * to.row_bytes());
    int32_t* sums = reinterpret_cast<int32_t*>(to.sums) + row * (to.padded / kPart);
    int32_t total = 0;
    if (to.encoding == Encoding::int8) {
        to.scale[row] = int8_scale(x, 0, to.inputs, to.inputs);
        total = round_int8(x, 0, to.padded, to.inputs, to.scale[row], data, sums);
    } else {
        float* scale = to.scale + row * (to.padded / kTile);
        for (int64_t first = 0; first < to.padded; first += kTile) {
            scale[first / kTile] = int8_scale(x, first, first + kTile, to.inputs);
            total += round_int8(x, first, first + kTile, to.inputs, scale[first / kTile], data, sums);
        }
    }
    reinterpret_cast<int32_t*>(to.total)[row] = total;
}

void encode(Worker& worker, const float* x, int64_t stride, int64_t rows, float input_scale,
            const Encoded& to) {
    // A few microseconds of work at a time.
    const int64_t some = to.padded >= 8192 ? 1 : 8192 / to.padded;
    worker.for_each((rows + some - 1) / some, [&](int64_t part) {
        const int64_t last = rows < (part + 1) * some ? rows : (part + 1) * some;
        for (int64_t row = part * some; row < last; ++row)
            encode_row(x + row * stride, to, row, input_scale);
    });
}

extern const EncodeKernels encode_kernels = {encode_row, encode_rows};

}  // namespace intserve::INTSERVE_ISA
