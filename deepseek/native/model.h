// The whole model: one call computes one step. Python (deepseek/engine/native.py) builds it layer by
// layer from addresses of tensors that it keeps alive, and has checked.
//
// T tokens · D hidden · H heads · n, v widths of query without position and of value · R latent ·
// r rope · I expert width · K experts per token
#pragma once

#include <array>
#include <cstdint>
#include <iterator>
#include <memory>
#include <vector>

#include "attention.h"

#include "linear.h"
#include "router.h"

namespace intserve {

// Linears that share their input, outputs side by side: one, or two where their schemes differ.
struct Projection {
    std::vector<Linear> parts;
    int64_t outputs() const;
};

struct Mlp {
    Projection gate_up, down;
    int64_t width() const { return gate_up.outputs() / 2; }
};

struct Layer {
    const float *input_norm, *output_norm, *query_norm, *latent_norm;  // query_norm: or null
    Projection qkv_a, q_b, output;      // q_b: empty where there is no query latent
    std::vector<Linear> w_uk, w_uv;     // per head, [R, n] and [v, R], with BF16 inputs
    const float* key_scale;             // [H, n], of the inputs of w_uk, or null: 1
    const float *router, *bias;         // [E, D] and [E]; null for a dense layer
    std::vector<Mlp> experts;
    Mlp mlp;                            // dense, or the shared expert
};

struct Shape {
    int64_t hidden, vocabulary, heads, query_rank, latent, nope, rope, value;
    RouterShape router;
    float eps, softmax_scale, amplitude;
    const float* frequencies;  // [r / 2], radians per position
};

// One step: T tokens of S spans, which follow each other in rows. A span is `count` tokens of one
// sequence, the first at position `start`; its pages are the row of `pages` [S, table_width].
struct Step {
    const int64_t* tokens;
    const int32_t* spans;  // [S, 2]: count, start
    const int32_t* pages;
    int64_t num_tokens, num_spans, table_width;
    CacheView cache;
};

// Parts of a step by what they do. `rows` is what is computed token by token: embedding, norms,
// residual stream, rotation. `projections` are those of attention but the absorbed ones; `experts`
// are all feed-forward products. Rounding an input counts with the part in which it happens.
enum class Part : int { rows, projections, absorbed, attention, router, experts, head };
constexpr const char* kPartNames[] = {"rows",   "projections", "absorbed", "attention",
                                      "router", "experts",     "head"};
constexpr int kParts = static_cast<int>(std::size(kPartNames));

struct Scratch;

// Not for two threads at a time.
class Model {
public:
    explicit Model(const Shape& shape);
    ~Model();
    void set_embedding(const void* table, bool is_bf16) {
        embedding_ = table;
        is_bf16_ = is_bf16;
    }
    void set_norm(const float* norm) { norm_ = norm; }
    void set_head(const Linear& head) { head_.parts = {head}; }
    void add_layer(Layer layer) { layers_.push_back(std::move(layer)); }
    const Shape& shape() const { return shape_; }

    // -> final hidden states, normed, [T, D]
    void forward(const Step& step, float* hidden, int threads);
    // Hidden states [rows, D] -> logits [rows, vocabulary]
    void logits(const float* hidden, int64_t rows, float* logits, int threads);
    // Seconds of all calls so far, by part.
    const std::array<double, kParts>& seconds() const { return seconds_; }

private:
    class Run;
    class Clock;

    Shape shape_;
    const void* embedding_ = nullptr;
    bool is_bf16_ = true;
    const float* norm_ = nullptr;
    Projection head_;
    std::vector<Layer> layers_;
    std::unique_ptr<Scratch> scratch_;
    std::array<double, kParts> seconds_{};
};

}  // namespace intserve
