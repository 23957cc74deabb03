// Linears: y = x W^T for every weight format, and the rounding of their inputs.
//
// Weights lie as deepseek/engine/native_layout.py packs them: blocks of 16 outputs, one output per
// lane; N is padded to whole blocks.
//
//     bf16        BF16 [N/16][K/2][16][2]
//     int8, int8_asym, int8_a8
//                 u8 = code + 128 [N/16][K/4][16][4], K padded to 4; scale f32 [N]; zero point s8 [N]
//     int8_block  as int8, K padded to 128; scale f32 [N/16][K/128][16]
//     int4, int4_a8, int4_fp8
//                 u4 = code + 8 [N/16][K/8][16][4]: byte j of a lane holds input 8b + j in its low
//                 bits and 8b + 4 + j in its high bits; scale BF16 [N/16][K/g][16]; zero point
//                 u8 = zero point + 8, the same shape, or none
//
// Inputs are rounded once for all linears that read them (`Encoding`), by `encode`. Then
// tasks compute one rectangle of outputs each, and the tasks of several products (experts) can be
// one phase (`run_gemms`).
//
// The order of additions of an output is fixed, so its bits depend on its row and its weights only:
// not on the number of rows, the shape of a task or the thread.
#pragma once

#include <cstdint>

#include "cpu.h"
#include "team.h"

namespace intserve {

enum class Format : int { bf16, int8, int8_asym, int8_a8, int8_block, int4, int4_a8, int4_fp8 };

// How an input is rounded: to BF16; to INT8 with a scale per token, or per token and 128 channels;
// to e4m3 with the linear's static scale (the codes are held as BF16).
enum class Encoding : int { bf16, int8, int8_tiles, fp8 };

struct Linear {
    Format format;
    int64_t outputs, inputs;  // N, K
    int64_t group;            // g of int4, else 0
    const uint8_t* codes;
    const uint8_t* scale;     // null for bf16
    const uint8_t* zero;      // null where there are no zero points
    float input_scale;        // of int4_fp8

    Encoding encoding() const;
    int64_t blocks() const { return (outputs + 15) / 16; }
    int64_t block_bytes() const;  // of codes
};

// Rows of one input, rounded. Rows are padded to whole tiles of 128 inputs with zeros.
struct Encoded {
    Encoding encoding;
    int64_t inputs, padded;
    uint8_t* data;   // int8 or BF16 [rows, padded]
    float* scale;    // int8: [rows]; int8_tiles: [rows, padded / 128]; else null
    uint8_t* sums;   // sums of 32 codes each, int32 (of BF16 values: f32) [rows, padded / 32]
    uint8_t* total;  // their sum, int32 or f32 [rows]

    // How much memory `rows` rows need, a multiple of 64 bytes, and the parts of such memory.
    static int64_t bytes(Encoding encoding, int64_t rows, int64_t inputs);
    static Encoded place(Encoding encoding, int64_t rows, int64_t inputs, void* memory);

    int64_t row_bytes() const {
        return padded * (encoding == Encoding::int8 || encoding == Encoding::int8_tiles ? 1 : 2);
    }
};

// out [rows, N] = the rows of the input times the weight.
struct Gemm {
    const Linear* weight;
    Encoded input;
    int64_t rows;
    float* out;
    int64_t out_stride;  // in floats
};

// Several products, in memory that all threads see.
struct GemmList {
    Gemm* gemms;
    int64_t count;
    int64_t* first_task;   // [count]; this and what follows is set by `count_tasks`
    int64_t tasks, width;  // of a tile of few rows, in blocks of 16 outputs
};

// The functions below, for code that is compiled once (model.cpp), and for the bindings a whole call
// of `threads` threads each: f32 [rows, inputs] to its encoding, and products of what is encoded.
struct EncodeKernels {
    void (*row)(const float* x, const Encoded& to, int64_t row, float input_scale);
    void (*encode)(int threads, const float* x, int64_t rows, float input_scale, const Encoded& to);
};
struct LinearKernels {
    void (*run_gemm)(Worker& worker, const Gemm& gemm);
    void (*count_tasks)(GemmList& list, int threads);
    void (*run_gemms)(Worker& worker, const GemmList& list);
    void (*gemms)(int threads, GemmList& list);
};

}  // namespace intserve

INTSERVE_KERNEL_TABLES(EncodeKernels, encode_kernels)
INTSERVE_KERNEL_TABLES(LinearKernels, linear_kernels)

#ifdef INTSERVE_ISA
namespace intserve::INTSERVE_ISA {

// Round one row, f32 [inputs]. `input_scale` is read for Encoding::fp8 only.
void encode_row(const float* x, const Encoded& to, int64_t row, float input_scale);

// One phase: rows x[0 .. rows) at a distance of `stride` floats.
void encode(Worker& worker, const float* x, int64_t stride, int64_t rows, float input_scale,
            const Encoded& to);

// One phase: one product. `gemm` may lie on each thread's own stack.
void run_gemm(Worker& worker, const Gemm& gemm);

// Prepare `list.gemms[0 .. list.count)` to run: one thread does so, in the phase that made them.
void count_tasks(GemmList& list, int threads);

// One phase: all products of the list. They may not depend on each other.
void run_gemms(Worker& worker, const GemmList& list);

}  // namespace intserve::INTSERVE_ISA
#endif
