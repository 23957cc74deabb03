// Elementwise kernels (rows.h), once per instruction set. Values past the end of a row are zeros in
// the lanes that have none, so that a row's tail follows the same formula.
#include "rows.h"

#include "isa.h"

namespace intserve::INTSERVE_ISA {

namespace {

INTSERVE_INLINE f32v read(const float* x, int64_t n) {
    return n >= kLanes ? load(x) : load_first(x, static_cast<int>(n));
}
INTSERVE_INLINE void write(float* y, f32v v, int64_t n) {
    if (n >= kLanes)
        store(y, v);
    else
        store_first(y, v, static_cast<int>(n));
}

void add_row(float* total, const float* update, int64_t n) {
    for (int64_t i = 0; i < n; i += kLanes)
        write(total + i, read(total + i, n - i) + read(update + i, n - i), n - i);
}

void norm_row(const float* x, const float* weight, float eps, float* y, int64_t n) {
    f32v squares[4] = {zero(), zero(), zero(), zero()};
    for (int64_t i = 0; i < n; i += kLanes) {
        const f32v v = read(x + i, n - i);
        f32v& total = squares[i / kLanes % 4];
        total = fma(v, v, total);
    }
    const float total = sum((squares[0] + squares[1]) + (squares[2] + squares[3]));
    const f32v factor = splat(1.0f / __builtin_sqrtf(total / static_cast<float>(n) + eps));
    for (int64_t i = 0; i < n; i += kLanes)
        write(y + i, read(x + i, n - i) * factor * read(weight + i, n - i), n - i);
}

void swiglu_row(const float* gate_up, float* y, int64_t n) {
    for (int64_t i = 0; i < n; i += kLanes)
        write(y + i, silu(read(gate_up + i, n - i)) * read(gate_up + n + i, n - i), n - i);
}

template <int ROWS, int OUTPUTS>
INTSERVE_INLINE void product_tile(const float* x, int64_t ldx, const float* w, int64_t n, float* y,
                                  int64_t ldy) {
    f32v sums[ROWS][OUTPUTS];
    for (int r = 0; r < ROWS; ++r)
        for (int o = 0; o < OUTPUTS; ++o) sums[r][o] = zero();
    for (int64_t i = 0; i < n; i += kLanes) {
        f32v weights[OUTPUTS];
        for (int o = 0; o < OUTPUTS; ++o) weights[o] = read(w + o * n + i, n - i);
        for (int r = 0; r < ROWS; ++r) {
            const f32v v = read(x + r * ldx + i, n - i);
            for (int o = 0; o < OUTPUTS; ++o) sums[r][o] = fma(v, weights[o], sums[r][o]);
        }
    }
    for (int r = 0; r < ROWS; ++r)
        for (int o = 0; o < OUTPUTS; ++o) y[r * ldy + o] = sum(sums[r][o]);
}

void product_rows(const float* x, int64_t ldx, int64_t rows, const float* w, int64_t outputs,
                  int64_t n, float* y, int64_t ldy) {
    int64_t o = 0;
    for (; o + 4 <= outputs; o += 4) {
        int64_t r = 0;
        for (; r + 4 <= rows; r += 4)
            product_tile<4, 4>(x + r * ldx, ldx, w + o * n, n, y + r * ldy + o, ldy);
        for (; r < rows; ++r)
            product_tile<1, 4>(x + r * ldx, ldx, w + o * n, n, y + r * ldy + o, ldy);
    }
    for (; o < outputs; ++o)
        for (int64_t r = 0; r < rows; ++r)
            product_tile<1, 1>(x + r * ldx, ldx, w + o * n, n, y + r * ldy + o, ldy);
}

void sigmoid_row(const float* x, float* y, int64_t n) {
    const f32v one = splat(1.0f);
    for (int64_t i = 0; i < n; i += kLanes)
        write(y + i, one / (one + exp(negate(read(x + i, n - i)))), n - i);
}

void weighted_sum(const float* x, const int32_t* rows, const float* weights, int64_t count,
                  const float* last, float* y, int64_t n) {
    for (int64_t i = 0; i < n; i += kLanes) {
        f32v total = zero();
        for (int64_t c = 0; c < count; ++c)
            total = fma(read(x + rows[c] * n + i, n - i), splat(weights[c]), total);
        write(y + i, total + read(last + i, n - i), n - i);
    }
}

void scale_row(const float* x, float factor, const float* weight, float* y, int64_t n) {
    for (int64_t i = 0; i < n; i += kLanes) {
        f32v v = read(x + i, n - i) * splat(factor);
        if (weight != nullptr) v = v * read(weight + i, n - i);
        write(y + i, v, n - i);
    }
}

// The compiler finds the shuffles of this loop.
void rotate_row(const float* x, const float* angles, float factor, float* __restrict__ y,
                int64_t half) {
    const float *cosines = angles, *sines = angles + half;
    for (int64_t i = 0; i < half; ++i) {
        const float first = x[2 * i], second = x[2 * i + 1];
        y[i] = (first * cosines[i] - second * sines[i]) * factor;
        y[half + i] = (second * cosines[i] + first * sines[i]) * factor;
    }
}

}  // namespace

extern const RowKernels row_kernels = {add_row,     norm_row,     swiglu_row, product_rows,
                                       sigmoid_row, weighted_sum, scale_row,  rotate_row};

}  // namespace intserve::INTSERVE_ISA
