// See router.h.
#include "router.h"

#include <algorithm>
#include <limits>

namespace intserve {

namespace {

constexpr float kTaken = -std::numeric_limits<float>::infinity();

// NaN is above everything, so an expert whose score is NaN is chosen, and the token's output is not
// finite instead of quietly wrong.
bool is_above(float a, float b) { return a > b || (a != a && b == b); }

// Index of the largest of n values, the lowest index among equals; the value is then taken out.
int64_t take_best(float* values, int64_t n) {
    int64_t best = 0;
    for (int64_t i = 1; i < n; ++i)
        if (is_above(values[i], values[best])) best = i;
    values[best] = kTaken;
    return best;
}

// Sum of the two largest of n values.
float two_best(const float* values, int64_t n) {
    if (n == 1) return values[0];
    float first = kTaken, second = kTaken;
    for (int64_t i = 0; i < n; ++i) {
        if (is_above(values[i], first)) {
            second = first;
            first = values[i];
        } else if (is_above(values[i], second)) {
            second = values[i];
        }
    }
    return first + second;
}

}  // namespace

void choose_experts(const RouterShape& shape, const float* scores, const float* bias,
                    float* scratch, int32_t* experts, float* weights) {
    const int64_t width = shape.experts / shape.groups;
    float *biased = scratch, *open = scratch + shape.experts, *ranks = open + shape.experts;
    for (int64_t e = 0; e < shape.experts; ++e) {
        biased[e] = scores[e] + bias[e];
        open[e] = kTaken;
    }
    for (int64_t g = 0; g < shape.groups; ++g) ranks[g] = two_best(biased + g * width, width);
    for (int64_t c = 0; c < shape.chosen_groups; ++c) {
        const int64_t first = take_best(ranks, shape.groups) * width;
        std::copy_n(biased + first, width, open + first);
    }
    float total = 0;
    for (int64_t c = 0; c < shape.chosen; ++c) {
        experts[c] = static_cast<int32_t>(take_best(open, shape.experts));
        weights[c] = scores[experts[c]];
        total += weights[c];
    }
    for (int64_t c = 0; c < shape.chosen; ++c) {
        if (shape.normalizes) weights[c] /= total + 1e-20f;
        weights[c] *= shape.routed_scale;
    }
}

void Routing::build(const int32_t* experts, int64_t places, int64_t chosen,
                    int64_t num_experts) {
    next_.assign(num_experts, 0);
    for (int64_t p = 0; p < places; ++p) ++next_[experts[p]];
    runs.clear();
    int64_t first = 0;
    for (int64_t e = 0; e < num_experts; ++e) {
        const int64_t rows = next_[e];
        next_[e] = first;
        if (rows) runs.push_back({e, first, rows});
        first += rows;
    }
    row.resize(places);
    token.resize(places);
    expert.resize(places);
    for (int64_t p = 0; p < places; ++p) {
        const int64_t r = next_[experts[p]]++;
        row[p] = static_cast<int32_t>(r);
        token[r] = static_cast<int32_t>(p / chosen);
        expert[r] = experts[p];
    }
}

}  // namespace intserve
