// The forward pass as phases of one team (team.h). A phase is a parallel loop over tokens, over tasks
// of products, or over heads; what a token needs is computed in an order of its own, so its bits do
// not depend on the other tokens of the step.
#include "model.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>

#include "buffer.h"
#include "rows.h"
#include "team.h"

namespace intserve {

namespace {

// Tokens of one elementwise task, and weights of the router of one task.
constexpr int64_t kTokenBlock = 4, kRouterBlock = 16;
// Phases of a layer beside those of attention, and of a step beside its layers.
constexpr int kLayerPhases = 19, kStepPhases = 2;

int64_t blocks(int64_t count, int64_t size) { return (count + size - 1) / size; }

// The rows from `first` on.
Encoded rows_from(Encoded x, int64_t first) {
    x.data += first * x.row_bytes();
    if (x.scale != nullptr) x.scale += first * (x.encoding == Encoding::int8 ? 1 : x.padded / 128);
    x.sums += first * (x.padded / 32) * 4;
    x.total += first * 4;
    return x;
}

}  // namespace

int64_t Projection::outputs() const {
    int64_t total = 0;
    for (const Linear& part : parts) total += part.outputs;
    return total;
}

// Rows of one input, in the encoding of each part of the projection that reads them. Of experts, each
// reads rows of its own, so every encoding has its own memory, which grows and stays.
class Activations {
public:
    void reserve(int64_t rows, const Projection& reader) {
        rows_ = std::max(rows_, rows);
        for (size_t part = 0; part < reader.parts.size(); ++part) {
            const Linear& linear = reader.parts[part];
            memory(part, linear.encoding())
                .reserve(Encoded::bytes(linear.encoding(), rows_, linear.inputs));
        }
    }
    // The rows as this part of the reader reads them.
    Encoded of(const Projection& reader, size_t part) const {
        const Linear& linear = reader.parts[part];
        return Encoded::place(linear.encoding(), rows_, linear.inputs,
                              memory(part, linear.encoding()).data());
    }
    void encode(const Projection& reader, const float* x, int64_t row) {
        for (size_t part = 0; part < reader.parts.size(); ++part)
            encode_kernels().row(x, of(reader, part), row, reader.parts[part].input_scale);
    }

private:
    const Buffer<uint8_t>& memory(size_t part, Encoding encoding) const {
        return memory_[part][static_cast<int>(encoding)];
    }
    Buffer<uint8_t>& memory(size_t part, Encoding encoding) {
        return memory_[part][static_cast<int>(encoding)];
    }

    Buffer<uint8_t> memory_[2][4];  // of two parts at most, and of each encoding
    int64_t rows_ = 0;
};

// Rows of every head, in BF16.
class HeadActivations {
public:
    void reserve(int64_t rows, const std::vector<Linear>& heads) {
        rows_ = std::max(rows_, rows);
        bytes_ = std::max(bytes_, Encoded::bytes(Encoding::bf16, rows_, heads[0].inputs));
        memory_.reserve(bytes_ * static_cast<int64_t>(heads.size()));
    }
    Encoded of(const std::vector<Linear>& heads, int64_t head) const {
        return Encoded::place(Encoding::bf16, rows_, heads[head].inputs,
                              memory_.data() + head * bytes_);
    }

private:
    Buffer<uint8_t> memory_;
    int64_t rows_ = 0, bytes_ = 0;
};

// Products of one phase, in memory that all threads see: made anew by one of them in a phase before.
class Products {
public:
    void clear() { gemms_.clear(); }
    void add(const Linear& weight, const Encoded& input, int64_t rows, float* out,
             int64_t out_stride) {
        gemms_.push_back({&weight, input, rows, out, out_stride});
    }
    // The rows [first, first + rows) of x, the outputs of all parts side by side in rows of y.
    void add(const Projection& projection, const Activations& x, int64_t first, int64_t rows,
             float* y) {
        for (size_t part = 0; part < projection.parts.size(); ++part) {
            add(projection.parts[part], rows_from(x.of(projection, part), first), rows, y,
                projection.outputs());
            y += projection.parts[part].outputs;
        }
    }
    void finish(int threads) {
        first_task_.resize(gemms_.size() + 1);
        list_ = {gemms_.data(), static_cast<int64_t>(gemms_.size()), first_task_.data(), 0, 0};
        linear_kernels().count_tasks(list_, threads);
    }
    void run(Worker& worker) const { linear_kernels().run_gemms(worker, list_); }

private:
    std::vector<Gemm> gemms_;
    std::vector<int64_t> first_task_;
    GemmList list_{};
};

// What a step needs beside weights and cache.
struct Scratch {
    Buffer<float> residual, normed, joined, queries, absorbed, latents, keys, attended, values,
        update, angles, scores, biased, weights, gate_up, down, shared_gate_up, shared_down;
    Buffer<int32_t> chosen;
    Activations input, query_input, output_input, expert_input, middle, shared_input,
        shared_middle, head_input;
    HeadActivations heads;
    Routing routing;
    Products absorb, unabsorb, gate_ups, downs;
    GrowingMemory attention;
    std::vector<Buffer<float>> hidden;  // of each thread: one row
};

Model::Model(const Shape& shape) : shape_(shape), scratch_(new Scratch) {}
Model::~Model() = default;

// Adds up what the parts of a call take, as its first thread sees them: a phase ends for all threads
// together. Not the time in which a call starts and ends.
class Model::Clock {
public:
    explicit Clock(Model& model) : seconds_(model.seconds_), last_(Time::now()) {}
    void passed(const Worker& worker, Part part) {
        if (worker.thread != 0) return;
        const Time::time_point now = Time::now();
        seconds_[static_cast<int>(part)] += std::chrono::duration<double>(now - last_).count();
        last_ = now;
    }

private:
    using Time = std::chrono::steady_clock;
    std::array<double, kParts>& seconds_;
    Time::time_point last_;
};

// One call of `forward`, as each thread runs it.
class Model::Run {
public:
    Run(Model& model, const Step& step, const AttentionPlan& plan, float* out)
        : model_(model), shape_(model.shape_), m_(*model.scratch_), step_(step), plan_(plan),
          out_(out), num_tokens_(step.num_tokens), clock_(model) {}

    void reserve(int threads);

    void operator()(Worker& worker) {
        embed(worker);
        const Layer* last = nullptr;
        for (size_t i = 0; i < model_.layers_.size(); ++i) {
            const Layer& layer = model_.layers_[i];
            end_layer(worker, last, [&](int64_t t) {
                float* x = row(m_.normed, t);
                row_kernels().norm(residual(t), layer.input_norm, shape_.eps, x, shape_.hidden);
                m_.input.encode(layer.qkv_a, x, t);
            });
            clock_.passed(worker, Part::rows);
            attend(worker, layer, static_cast<int>(i));
            feed_forward(worker, layer);
            clock_.passed(worker, Part::experts);
            last = &layer;
        }
        end_layer(worker, last, [&](int64_t t) {
            row_kernels().norm(residual(t), model_.norm_, shape_.eps, out_ + t * shape_.hidden,
                               shape_.hidden);
        });
        clock_.passed(worker, Part::rows);
    }

private:
    float* row(const Buffer<float>& buffer, int64_t t) const {
        return buffer.data() + t * shape_.hidden;
    }
    float* residual(int64_t t) const { return row(m_.residual, t); }

    // Each of `count` rows once, several to a task where there are many.
    template <class Body>
    static void for_rows(Worker& worker, int64_t count, Body&& body) {
        const int64_t size = count < 8 * kTokenBlock ? 1 : kTokenBlock;
        worker.for_each(blocks(count, size), [&](int64_t block) {
            const int64_t end = std::min(count, (block + 1) * size);
            for (int64_t i = block * size; i < end; ++i) body(i);
        });
    }

    // y [T, outputs] = x W^T, the outputs of all parts side by side: a phase for each part.
    void project(Worker& worker, const Projection& projection, const Activations& x, float* y) {
        const int64_t stride = projection.outputs();
        for (size_t part = 0; part < projection.parts.size(); ++part) {
            const Linear& linear = projection.parts[part];
            const Gemm gemm{&linear, x.of(projection, part), num_tokens_, y, stride};
            linear_kernels().run_gemm(worker, gemm);
            y += linear.outputs;
        }
    }

    // out [T, H, width]: each head's rows times its weight, in the first outputs of each row.
    void prepare_heads(Products& products, const std::vector<Linear>& heads, float* out,
                       int64_t width, int threads) {
        products.clear();
        for (int64_t h = 0; h < shape_.heads; ++h)
            products.add(heads[h], m_.heads.of(heads, h), num_tokens_, out + h * width,
                         shape_.heads * width);
        products.finish(threads);
    }

    void embed(Worker& worker);
    template <class Then>
    void end_layer(Worker& worker, const Layer* last, Then&& then);
    void attend(Worker& worker, const Layer& layer, int number);
    // x [r] and y as RowKernels::rotate takes them.
    void rotate(const float* x, int64_t t, float factor, float* y) const {
        row_kernels().rotate(x, m_.angles.data() + t * shape_.rope, factor, y, shape_.rope / 2);
    }
    void feed_forward(Worker& worker, const Layer& layer);
    void route(Worker& worker, const Layer& layer);

    const Model& model_;
    const Shape& shape_;
    Scratch& m_;
    const Step& step_;
    const AttentionPlan& plan_;
    float* out_;
    const int64_t num_tokens_;
    Clock clock_;  // of thread 0
};

void Model::Run::reserve(int threads) {
    const Shape& s = shape_;
    const int64_t tokens = num_tokens_, places = tokens * s.router.chosen;
    m_.residual.reserve(tokens * s.hidden);
    m_.normed.reserve(tokens * s.hidden);
    m_.update.reserve(tokens * s.hidden);
    m_.shared_down.reserve(tokens * s.hidden);
    m_.queries.reserve(tokens * s.heads * (s.nope + s.rope));
    m_.absorbed.reserve(tokens * s.heads * (s.latent + s.rope));
    m_.latents.reserve(tokens * s.latent);
    m_.keys.reserve(tokens * s.rope);
    m_.attended.reserve(tokens * s.heads * s.latent);
    m_.values.reserve(tokens * s.heads * s.value);
    m_.angles.reserve(tokens * s.rope);
    m_.scores.reserve(tokens * s.router.experts);
    m_.biased.reserve(tokens * (2 * s.router.experts + s.router.groups));
    m_.weights.reserve(places);
    m_.chosen.reserve(places);
    int64_t width = s.nope;  // of a query before it is absorbed, or of a layer's hidden values
    for (const Layer& layer : model_.layers_) {
        m_.joined.reserve(tokens * layer.qkv_a.outputs());
        m_.input.reserve(tokens, layer.qkv_a);
        m_.query_input.reserve(tokens, layer.q_b);
        m_.output_input.reserve(tokens, layer.output);
        m_.heads.reserve(tokens, layer.w_uk);
        m_.heads.reserve(tokens, layer.w_uv);
        m_.shared_input.reserve(tokens, layer.mlp.gate_up);
        m_.shared_middle.reserve(tokens, layer.mlp.down);
        m_.shared_gate_up.reserve(tokens * layer.mlp.gate_up.outputs());
        width = std::max(width, layer.mlp.width());
        for (const Mlp& expert : layer.experts) {
            m_.expert_input.reserve(places, expert.gate_up);
            m_.middle.reserve(places, expert.down);
            m_.gate_up.reserve(places * expert.gate_up.outputs());
            width = std::max(width, expert.width());
        }
        if (!layer.experts.empty()) m_.down.reserve(places * s.hidden);
    }
    if (static_cast<int>(m_.hidden.size()) < threads) m_.hidden.resize(threads);
    for (Buffer<float>& hidden : m_.hidden) hidden.reserve(width);
}

// The residual stream's first values, and the angles of each token's position.
void Model::Run::embed(Worker& worker) {
    const int64_t half = shape_.rope / 2, width = shape_.hidden;
    for_rows(worker, num_tokens_, [&](int64_t t) {
        int64_t position = 0, first = 0;
        for (int64_t s = 0; s < step_.num_spans; ++s) {
            const int64_t count = step_.spans[2 * s], start = step_.spans[2 * s + 1];
            if (t < first + count) {
                position = start + t - first;
                break;
            }
            first += count;
        }
        float* angles = m_.angles.data() + t * shape_.rope;
        for (int64_t i = 0; i < half; ++i) {
            const float angle = static_cast<float>(position) * shape_.frequencies[i];
            angles[i] = std::cos(angle) * shape_.amplitude;
            angles[half + i] = std::sin(angle) * shape_.amplitude;
        }
        const int64_t token = step_.tokens[t];
        if (!model_.is_bf16_) {
            const float* from = static_cast<const float*>(model_.embedding_) + token * width;
            std::memcpy(residual(t), from, width * sizeof(float));
            return;
        }
        const uint16_t* from = static_cast<const uint16_t*>(model_.embedding_) + token * width;
        for (int64_t i = 0; i < width; ++i) {
            const uint32_t bits = static_cast<uint32_t>(from[i]) << 16;
            std::memcpy(residual(t) + i, &bits, sizeof(bits));
        }
    });
}

// Add the last layer's feed-forward output to the residual stream, and go on with each token.
template <class Then>
void Model::Run::end_layer(Worker& worker, const Layer* last, Then&& then) {
    const int64_t chosen = shape_.router.chosen;
    for_rows(worker, num_tokens_, [&](int64_t t) {
        if (last != nullptr && last->experts.empty()) {
            row_kernels().add(residual(t), row(m_.shared_down, t), shape_.hidden);
        } else if (last != nullptr) {
            // In the order in which the router chose them.
            row_kernels().weighted_sum(m_.down.data(), m_.routing.row.data() + t * chosen,
                                       m_.weights.data() + t * chosen, chosen,
                                       row(m_.shared_down, t), row(m_.update, t), shape_.hidden);
            row_kernels().add(residual(t), row(m_.update, t), shape_.hidden);
        }
        then(t);
    });
}

void Model::Run::attend(Worker& worker, const Layer& layer, int number) {
    const Shape& s = shape_;
    const int64_t joined = layer.qkv_a.outputs(), head = s.nope + s.rope;
    const int64_t cached = s.latent + s.rope;
    const bool has_latent = s.query_rank > 0;
    const int64_t before_latent = has_latent ? s.query_rank : s.heads * head;

    project(worker, layer.qkv_a, m_.input, m_.joined.data());
    clock_.passed(worker, Part::projections);
    for_rows(worker, num_tokens_, [&](int64_t t) {
        float* x = m_.joined.data() + t * joined;
        const float* latent = x + before_latent;
        row_kernels().norm(latent, layer.latent_norm, s.eps, m_.latents.data() + t * s.latent,
                           s.latent);
        rotate(latent + s.latent, t, 1.0f, m_.keys.data() + t * s.rope);
        if (!has_latent) return;
        row_kernels().norm(x, layer.query_norm, s.eps, x, s.query_rank);
        m_.query_input.encode(layer.q_b, x, t);
    });
    clock_.passed(worker, Part::rows);
    if (has_latent) project(worker, layer.q_b, m_.query_input, m_.queries.data());
    clock_.passed(worker, Part::projections);
    const float* queries = has_latent ? m_.queries.data() : m_.joined.data();
    const int64_t stride = has_latent ? s.heads * head : joined;

    // Absorb: (q_nope W_UK, rotated q_rope), both scaled for the softmax.
    worker.for_each(num_tokens_ * s.heads, [&](int64_t i) {
        if (i == 0) prepare_heads(m_.absorb, layer.w_uk, m_.absorbed.data(), cached, worker.threads);
        const int64_t t = i / s.heads, h = i % s.heads;
        const float* query = queries + t * stride + h * head;
        float* scaled = m_.hidden[worker.thread].data();
        const float* key_scale =
            layer.key_scale == nullptr ? nullptr : layer.key_scale + h * s.nope;
        row_kernels().scale(query, s.softmax_scale, key_scale, scaled, s.nope);
        encode_kernels().row(scaled, m_.heads.of(layer.w_uk, h), t, 0);
        rotate(query + s.nope, t, s.softmax_scale, m_.absorbed.data() + i * cached + s.latent);
    });
    m_.absorb.run(worker);
    clock_.passed(worker, Part::absorbed);

    const AttentionData data{m_.absorbed.data(), m_.latents.data(),  m_.keys.data(),
                             m_.attended.data(), s.heads * cached,   s.latent,
                             s.rope,             s.heads * s.latent};
    attention_phases(worker, plan_, step_.cache.of_layer(number), data);
    clock_.passed(worker, Part::attention);

    worker.for_each(num_tokens_ * s.heads, [&](int64_t i) {
        if (i == 0)
            prepare_heads(m_.unabsorb, layer.w_uv, m_.values.data(), s.value, worker.threads);
        const int64_t t = i / s.heads, h = i % s.heads;
        encode_kernels().row(m_.attended.data() + i * s.latent, m_.heads.of(layer.w_uv, h),
                                    t, 0);
    });
    m_.unabsorb.run(worker);
    clock_.passed(worker, Part::absorbed);
    for_rows(worker, num_tokens_, [&](int64_t t) {
        m_.output_input.encode(layer.output, m_.values.data() + t * s.heads * s.value, t);
    });
    project(worker, layer.output, m_.output_input, m_.update.data());
    clock_.passed(worker, Part::projections);
}

void Model::Run::feed_forward(Worker& worker, const Layer& layer) {
    const Shape& s = shape_;
    const bool is_moe = !layer.experts.empty();
    for_rows(worker, num_tokens_, [&](int64_t t) {
        row_kernels().add(residual(t), row(m_.update, t), s.hidden);
        float* x = row(m_.normed, t);
        row_kernels().norm(residual(t), layer.output_norm, s.eps, x, s.hidden);
        m_.shared_input.encode(layer.mlp.gate_up, x, t);
    });
    clock_.passed(worker, Part::rows);
    if (is_moe) route(worker, layer);
    clock_.passed(worker, Part::router);
    // The products of all active experts and of the shared one (or of the dense MLP) are one phase.
    worker.for_each(1, [&](int64_t) {
        if (is_moe)
            m_.routing.build(m_.chosen.data(), num_tokens_ * s.router.chosen, s.router.chosen,
                             s.router.experts);
        m_.gate_ups.clear();
        m_.downs.clear();
        if (is_moe) {
            for (const Routing::Run& run : m_.routing.runs) {
                const Mlp& expert = layer.experts[run.expert];
                m_.gate_ups.add(expert.gate_up, m_.expert_input, run.first, run.rows,
                                m_.gate_up.data() + run.first * expert.gate_up.outputs());
                m_.downs.add(expert.down, m_.middle, run.first, run.rows,
                             row(m_.down, run.first));
            }
        }
        m_.gate_ups.add(layer.mlp.gate_up, m_.shared_input, 0, num_tokens_,
                        m_.shared_gate_up.data());
        m_.downs.add(layer.mlp.down, m_.shared_middle, 0, num_tokens_, m_.shared_down.data());
        m_.gate_ups.finish(worker.threads);
        m_.downs.finish(worker.threads);
    });
    if (is_moe) {
        for_rows(worker, num_tokens_ * s.router.chosen, [&](int64_t i) {
            m_.expert_input.encode(layer.experts[m_.routing.expert[i]].gate_up,
                                   row(m_.normed, m_.routing.token[i]), i);
        });
    }
    m_.gate_ups.run(worker);
    const int64_t routed = is_moe ? num_tokens_ * s.router.chosen : 0;
    for_rows(worker, routed + num_tokens_, [&](int64_t i) {
        float* hidden = m_.hidden[worker.thread].data();
        const bool is_routed = i < routed;
        const Mlp& mlp = is_routed ? layer.experts[m_.routing.expert[i]] : layer.mlp;
        const Buffer<float>& gate_up = is_routed ? m_.gate_up : m_.shared_gate_up;
        const int64_t at = is_routed ? i : i - routed, width = mlp.width();
        row_kernels().swiglu(gate_up.data() + 2 * at * width, hidden, width);
        (is_routed ? m_.middle : m_.shared_middle).encode(mlp.down, hidden, at);
    });
    m_.downs.run(worker);
}

// Choose each token's experts.
void Model::Run::route(Worker& worker, const Layer& layer) {
    const Shape& s = shape_;
    const int64_t experts = s.router.experts, chosen = s.router.chosen;
    const int64_t token_blocks = blocks(num_tokens_, kTokenBlock);
    worker.for_each(blocks(experts, kRouterBlock) * token_blocks, [&](int64_t task) {
        const int64_t e = task / token_blocks * kRouterBlock;
        const int64_t t = task % token_blocks * kTokenBlock;
        row_kernels().products(row(m_.normed, t), s.hidden, std::min(kTokenBlock, num_tokens_ - t),
                               layer.router + e * s.hidden, std::min(kRouterBlock, experts - e),
                               s.hidden, m_.scores.data() + t * experts + e, experts);
    });
    for_rows(worker, num_tokens_, [&](int64_t t) {
        float* scores = m_.scores.data() + t * experts;
        row_kernels().sigmoid(scores, scores, experts);
        choose_experts(s.router, scores, layer.bias,
                       m_.biased.data() + t * (2 * experts + s.router.groups),
                       m_.chosen.data() + t * chosen, m_.weights.data() + t * chosen);
    });
}

void Model::forward(const Step& step, float* hidden, int threads) {
    std::vector<AttentionSpan> spans;
    int64_t first_row = 0;
    for (int64_t i = 0; i < step.num_spans; ++i) {
        const int64_t count = step.spans[2 * i], start = step.spans[2 * i + 1];
        spans.push_back({first_row, count, start, step.pages + i * step.table_width});
        first_row += count;
    }
    const AttentionPlan plan(step.cache, static_cast<int>(shape_.heads), std::move(spans), threads,
                             scratch_->attention);
    Run run(*this, step, plan, hidden);
    run.reserve(threads);
    const int phases =
        kStepPhases + static_cast<int>(layers_.size()) * (kLayerPhases + AttentionPlan::kPhases);
    run_team(threads, phases, [&](Worker& worker) { run(worker); });
}

void Model::logits(const float* hidden, int64_t rows, float* logits, int threads) {
    Activations& input = scratch_->head_input;
    input.reserve(rows, head_);
    const Linear& head = head_.parts[0];
    const Gemm gemm{&head, input.of(head_, 0), rows, logits, head.outputs};
    Clock clock(*this);
    run_team(threads, 2, [&](Worker& worker) {
        worker.for_each(rows, [&](int64_t i) {
            input.encode(head_, hidden + i * shape_.hidden, i);
        });
        linear_kernels().run_gemm(worker, gemm);
        clock.passed(worker, Part::head);
    });
}

}  // namespace intserve
