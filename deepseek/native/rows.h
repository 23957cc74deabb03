// Elementwise work on rows of FP32 values: norms, SwiGLU, the router's products, sums. Each result
// depends on its row alone, and is computed in one order.
#pragma once

#include <cstdint>

#include "cpu.h"

namespace intserve {

struct RowKernels {
    // total [n] += update [n]
    void (*add)(float* total, const float* update, int64_t n);
    // y = x / sqrt(mean(x^2) + eps) * weight; y may be x.
    void (*norm)(const float* x, const float* weight, float eps, float* y, int64_t n);
    // gate_up [2 n] -> silu(first half) * second half, [n]
    void (*swiglu)(const float* gate_up, float* y, int64_t n);
    // y[t, e] = x[t, :] . w[e, :] for `rows` rows and `outputs` weights of width n
    void (*products)(const float* x, int64_t ldx, int64_t rows, const float* w, int64_t outputs,
                     int64_t n, float* y, int64_t ldy);
    // y = 1 / (1 + exp(-x)); NaN stays NaN.
    void (*sigmoid)(const float* x, float* y, int64_t n);
    // y = ((0 + w_0 x_0) + w_1 x_1 + ...) + last, where x_i [n] is row `rows[i]` of x
    void (*weighted_sum)(const float* x, const int32_t* rows, const float* weights, int64_t count,
                         const float* last, float* y, int64_t n);
    // y = x * factor, or x * factor * weight
    void (*scale)(const float* x, float factor, const float* weight, float* y, int64_t n);
    // Interleaved pairs x [2 half] -> rotated by angles (cosines, then sines), de-interleaved
    // (rope.py), times `factor`.
    void (*rotate)(const float* x, const float* angles, float factor, float* y, int64_t half);
};

}  // namespace intserve

INTSERVE_KERNEL_TABLES(intserve::RowKernels, row_kernels)
