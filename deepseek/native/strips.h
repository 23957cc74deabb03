// The inner loops of the linears: R rows by B blocks of 16 outputs, over some inputs, added to a
// state in memory. One struct per weight format. Each output is added up in the order of its inputs
// whatever R, B and the cut into chunks, so these change no bit of it.
#pragma once

#include "isa.h"
#include "linear.h"
#include "unpack.h"

namespace intserve::INTSERVE_ISA {

#if INTSERVE_ISA_LEVEL >= 2
constexpr int kMaxRows = 6, kMaxBlocks = 4;  // 24 sums, 4 weights, 1 broadcast value: 29 of 32 zmm
#else
constexpr int kMaxRows = 2, kMaxBlocks = 2;
#endif

// Weights and inputs from the first input of a chunk on. Strides lead to the next block.
struct Strip {
    const uint8_t* codes;
    const uint8_t* scale;
    const uint8_t* zero;
    int64_t codes_stride, scale_stride, zero_stride;  // bytes
    const uint8_t* x[kMaxRows];
    const float* x_scale[kMaxRows];   // of int8_tiles
    const uint8_t* x_sums[kMaxRows];  // int32 or f32, of 32 inputs each
    int64_t inputs;                   // of the chunk
    int64_t group;
    float* state;                     // [R][.. B][16]: f32 or, for int8_a8, int32
    int64_t state_stride;             // to the next row
    int64_t prefetch;                 // bytes ahead of the codes in use
};

#define INTSERVE_UNROLL _Pragma("GCC unroll 8")

// The weights of one step: 64 bytes of each of B blocks.
template <int B>
INTSERVE_INLINE void load_codes(const Strip& strip, int64_t offset, i32v codes[B]) {
    INTSERVE_UNROLL for (int b = 0; b < B; ++b) {
        const uint8_t* p = strip.codes + b * strip.codes_stride + offset;
        __builtin_prefetch(p + strip.prefetch);
        codes[b] = loadi(p);
    }
}

template <int R, int B> INTSERVE_INLINE void load_state(const Strip& strip, f32v state[R][B]) {
    INTSERVE_UNROLL for (int r = 0; r < R; ++r)
        INTSERVE_UNROLL for (int b = 0; b < B; ++b)
            state[r][b] = load(strip.state + r * strip.state_stride + b * kLanes);
}
template <int R, int B> INTSERVE_INLINE void store_state(const Strip& strip, f32v state[R][B]) {
    INTSERVE_UNROLL for (int r = 0; r < R; ++r)
        INTSERVE_UNROLL for (int b = 0; b < B; ++b)
            store(strip.state + r * strip.state_stride + b * kLanes, state[r][b]);
}

template <class T> INTSERVE_INLINE T sum_of(const uint8_t* sums, int64_t first, int64_t count) {
    T total = 0;
    for (int64_t i = first; i < first + count; ++i) total += reinterpret_cast<const T*>(sums)[i];
    return total;
}

// INT8 codes by INT8 codes, one scale per output: sums of integers.
struct Int8A8Strip {
    static constexpr int kMostBlocks = kMaxBlocks;

    template <int R, int B> static void run(const Strip& strip) {
        i32v sums[R][B];
        INTSERVE_UNROLL for (int r = 0; r < R; ++r)
            INTSERVE_UNROLL for (int b = 0; b < B; ++b)
                sums[r][b] = loadi(strip.state + r * strip.state_stride + b * kLanes);
        int64_t k = 0;
        if constexpr (R * B == 1) {
            // One sum would wait for each product; integers may be added up in any order.
            i32v parts[4] = {sums[0][0], zeroi(), zeroi(), zeroi()};
            for (; k + 16 <= strip.inputs; k += 16) INTSERVE_UNROLL for (int i = 0; i < 4; ++i) {
                i32v codes[1];
                load_codes<1>(strip, (k + 4 * i) * 16, codes);
                const s8v x = splat_s8(reinterpret_cast<const int8_t*>(strip.x[0] + k + 4 * i));
                parts[i] = dot_u8s8(parts[i], codes[0], x);
            }
            sums[0][0] = add(add(parts[0], parts[1]), add(parts[2], parts[3]));
        }
        for (; k < strip.inputs; k += 4) {
            i32v codes[B];
            load_codes<B>(strip, k * 16, codes);
            INTSERVE_UNROLL for (int r = 0; r < R; ++r) {
                const s8v x = splat_s8(reinterpret_cast<const int8_t*>(strip.x[r] + k));
                INTSERVE_UNROLL for (int b = 0; b < B; ++b)
                    sums[r][b] = dot_u8s8(sums[r][b], codes[b], x);
            }
        }
        INTSERVE_UNROLL for (int r = 0; r < R; ++r)
            INTSERVE_UNROLL for (int b = 0; b < B; ++b)
                storei(strip.state + r * strip.state_stride + b * kLanes, sums[r][b]);
    }
};

// INT8 codes by INT8 codes in tiles of 128 inputs: each tile's sum times the input's scale and the
// weight's, added up in FP32.
struct Int8BlockStrip {
    static constexpr int kMostBlocks = kMaxBlocks / 2;

    template <int R, int B> static void run(const Strip& strip) {
        f32v state[R][B];
        load_state<R, B>(strip, state);
        for (int64_t tile = 0; tile < strip.inputs / 128; ++tile) {
            i32v sums[R][B];
            INTSERVE_UNROLL for (int r = 0; r < R; ++r) {
                const i32v offset = splati(-128 * sum_of<int32_t>(strip.x_sums[r], tile * 4, 4));
                INTSERVE_UNROLL for (int b = 0; b < B; ++b) sums[r][b] = offset;
            }
            for (int64_t k = tile * 128; k < tile * 128 + 128; k += 4) {
                i32v codes[B];
                load_codes<B>(strip, k * 16, codes);
                INTSERVE_UNROLL for (int r = 0; r < R; ++r) {
                    const s8v x = splat_s8(reinterpret_cast<const int8_t*>(strip.x[r] + k));
                    INTSERVE_UNROLL for (int b = 0; b < B; ++b)
                        sums[r][b] = dot_u8s8(sums[r][b], codes[b], x);
                }
            }
            INTSERVE_UNROLL for (int b = 0; b < B; ++b) {
                const f32v scale = load(reinterpret_cast<const float*>(
                    strip.scale + b * strip.scale_stride + tile * 64));
                INTSERVE_UNROLL for (int r = 0; r < R; ++r)
                    state[r][b] = state[r][b] +
                                  to_float(sums[r][b]) * splat(strip.x_scale[r][tile]) * scale;
            }
        }
        store_state<R, B>(strip, state);
    }
};

// INT4 codes by INT8 codes, one scale per group. u4 = code + 8; `Zeros`: u8 = zero point + 8. Sums of
// a group, also that of u4 before the offset is taken off, are integers below 2^24.
template <bool Zeros> struct Int4A8Strip {
    static constexpr int kMostBlocks = kMaxBlocks / 2;

    template <int R, int B> static void run(const Strip& strip) {
        const i32v nibble = splati(0x0F0F0F0F);
        const int64_t group = strip.group, parts = group / 32;
        f32v state[R][B];
        load_state<R, B>(strip, state);
        for (int64_t g = 0; g < strip.inputs / group; ++g) {
            int32_t input_sum[R];
            i32v sums[R][B];
            INTSERVE_UNROLL for (int r = 0; r < R; ++r) {
                input_sum[r] = sum_of<int32_t>(strip.x_sums[r], g * parts, parts);
                const i32v offset = Zeros ? zeroi() : splati(-8 * input_sum[r]);
                INTSERVE_UNROLL for (int b = 0; b < B; ++b) sums[r][b] = offset;
            }
            for (int64_t k = g * group; k < (g + 1) * group; k += 8) {
                i32v codes[B], high[B];
                load_codes<B>(strip, k * 8, codes);
                INTSERVE_UNROLL for (int b = 0; b < B; ++b) {
                    high[b] = bit_and(shift_right<4>(codes[b]), nibble);
                    codes[b] = bit_and(codes[b], nibble);
                }
                INTSERVE_UNROLL for (int r = 0; r < R; ++r) {
                    const int8_t* p = reinterpret_cast<const int8_t*>(strip.x[r] + k);
                    const s8v x = splat_s8(p), y = splat_s8(p + 4);
                    INTSERVE_UNROLL for (int b = 0; b < B; ++b)
                        sums[r][b] = dot_u8s8(dot_u8s8(sums[r][b], codes[b], x), high[b], y);
                }
            }
            INTSERVE_UNROLL for (int b = 0; b < B; ++b) {
                const f32v scale = load_bf16(reinterpret_cast<const uint16_t*>(
                    strip.scale + b * strip.scale_stride + g * 32));
                f32v zero_point;
                if (Zeros)
                    zero_point = to_float(load_u8(strip.zero + b * strip.zero_stride + g * 16));
                INTSERVE_UNROLL for (int r = 0; r < R; ++r) {
                    f32v sum = to_float(sums[r][b]);
                    if (Zeros)
                        sum = sum - zero_point * splat(static_cast<float>(input_sum[r]));
                    state[r][b] = fma(sum, scale, state[r][b]);
                }
            }
        }
        store_state<R, B>(strip, state);
    }
};

// BF16 by BF16.
struct Bf16Strip {
    static constexpr int kMostBlocks = kMaxBlocks;

    template <int R, int B> static void run(const Strip& strip) {
        f32v state[R][B];
        load_state<R, B>(strip, state);
        for (int64_t k = 0; k < strip.inputs; k += 2) {
            i32v codes[B];
            load_codes<B>(strip, k * 32, codes);
            INTSERVE_UNROLL for (int r = 0; r < R; ++r) {
                const bf16v x = splat_bf16(reinterpret_cast<const uint16_t*>(strip.x[r]) + k);
                INTSERVE_UNROLL for (int b = 0; b < B; ++b)
                    state[r][b] = dot_bf16(state[r][b], as_bf16(codes[b]), x);
            }
        }
        store_state<R, B>(strip, state);
    }
};

// INT8 codes by BF16: the state is the sum of code times input, over kInt8Unit.
struct Int8Strip {
    static constexpr int kMostBlocks = kMaxBlocks;

    template <int R, int B> static void run(const Strip& strip) {
        f32v state[R][B];
        load_state<R, B>(strip, state);
        for (int64_t k = 0; k < strip.inputs; k += 4) {
            i32v codes[B];
            load_codes<B>(strip, k * 16, codes);
            bf16v x[R][2];
            INTSERVE_UNROLL for (int b = 0; b < B; ++b) {
                bf16v pairs[2];
                unpack_int8(codes[b], pairs);
                INTSERVE_UNROLL for (int r = 0; r < R; ++r) {
                    const uint16_t* p = reinterpret_cast<const uint16_t*>(strip.x[r]) + k;
                    if (b == 0) INTSERVE_UNROLL for (int j = 0; j < 2; ++j)
                        x[r][j] = splat_bf16(p + 2 * j);
                    INTSERVE_UNROLL for (int j = 0; j < 2; ++j)
                        state[r][b] = dot_bf16(state[r][b], pairs[j], x[r][j]);
                }
            }
        }
        store_state<R, B>(strip, state);
    }
};

// INT4 codes by BF16, one scale per group.
template <bool Zeros> struct Int4Strip {
    static constexpr int kMostBlocks = kMaxBlocks / 2;

    template <int R, int B> static void run(const Strip& strip) {
        const int64_t group = strip.group, parts = group / 32;
        f32v state[R][B];
        load_state<R, B>(strip, state);
        for (int64_t g = 0; g < strip.inputs / group; ++g) {
            f32v sums[R][B];
            INTSERVE_UNROLL for (int r = 0; r < R; ++r)
                INTSERVE_UNROLL for (int b = 0; b < B; ++b) sums[r][b] = zero();
            for (int64_t k = g * group; k < (g + 1) * group; k += 8) {
                i32v codes[B];
                load_codes<B>(strip, k * 8, codes);
                INTSERVE_UNROLL for (int b = 0; b < B; ++b) {
                    bf16v pairs[4];
                    unpack_int4(codes[b], pairs);
                    INTSERVE_UNROLL for (int j = 0; j < 4; ++j)
                        INTSERVE_UNROLL for (int r = 0; r < R; ++r) {
                            const uint16_t* p = reinterpret_cast<const uint16_t*>(strip.x[r]) + k;
                            sums[r][b] = dot_bf16(sums[r][b], pairs[j], splat_bf16(p + 2 * j));
                        }
                }
            }
            INTSERVE_UNROLL for (int b = 0; b < B; ++b) {
                const f32v scale = load_bf16(reinterpret_cast<const uint16_t*>(
                    strip.scale + b * strip.scale_stride + g * 32));
                f32v zero_point;
                if (Zeros)
                    zero_point = to_float(sub(
                        load_u8(strip.zero + b * strip.zero_stride + g * 16), splati(8)));
                INTSERVE_UNROLL for (int r = 0; r < R; ++r) {
                    f32v sum = sums[r][b];
                    if (Zeros) {
                        const float inputs = sum_of<float>(strip.x_sums[r], g * parts, parts);
                        sum = sum - zero_point * splat(inputs);
                    }
                    state[r][b] = fma(sum, scale, state[r][b]);
                }
            }
        }
        store_state<R, B>(strip, state);
    }
};

}  // namespace intserve::INTSERVE_ISA
