// Cutting a step's attention into tasks, and its phases (attention.h).
#include "attention.h"

#include <algorithm>
#include <stdexcept>

namespace intserve {

namespace {

// Tasks per thread: enough that one that comes late, or is long, leaves few others waiting.
constexpr int64_t kTasksPerThread = 4;
// Beyond this a row group's context is not split, whatever the number of threads.
constexpr int64_t kMaxPartialBytes = int64_t{256} << 20;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t num_vectors(const AttentionSpan& span, int heads) {
    return ceil_div(span.num_rows * heads, kRowLanes);
}

int64_t num_blocks(const AttentionSpan& span) {
    return ceil_div(span.start + span.num_rows, kBlockTokens);
}

int64_t work_of(const AttentionSpan& span, int heads) {
    return num_vectors(span, heads) * num_blocks(span);
}

int64_t round_up(int64_t bytes) { return ceil_div(bytes, 64) * 64; }

// Addresses of up to 16 rows [width] of a vector, of memory [T][H][width] with a stride per token.
template <class T>
void find_rows(const RowGroup& group, int vector, T* base, int64_t stride, int64_t width, T** rows) {
    for (int lane = 0; lane < group.lanes(vector); ++lane) {
        const int64_t index = group.first + vector * kRowLanes + lane;
        const int64_t row = group.span->first_row + index / group.heads;
        rows[lane] = base + row * stride + index % group.heads * width;
    }
}

}  // namespace

CacheView CacheView::of_layer(int layer) const {
    CacheView view = *this;
    const int64_t tokens = pages * page_tokens * layer;
    view.values += tokens * value_bytes();
    if (has_keys()) {
        view.scales += tokens * tiles();
        view.keys += tokens * rope;
    }
    return view;
}

AttentionPlan::AttentionPlan(const CacheView& cache, int heads, std::vector<AttentionSpan> spans,
                             int threads, GrowingMemory& memory)
    : shape_(cache), heads_(heads), threads_(threads), kernels_(attention_kernels()),
      spans_(std::move(spans)) {
    if (cache.latent % 4 || cache.rope % 2 || cache.latent < 4 || cache.width() > kMaxWidth)
        throw std::invalid_argument("native attention takes latent widths that 4 divides and even rotary "
                                    "widths, together at most 2048");
    int64_t total = 0;
    for (const AttentionSpan& span : spans_) {
        total += work_of(span, heads);
        tokens_ += span.num_rows;
    }
    for (const AttentionSpan& span : spans_) cut(span, total);
    // The longest first, so that none is left at the end.
    std::stable_sort(tasks_.begin(), tasks_.end(),
                     [](const Task& a, const Task& b) { return a.work > b.work; });

    packed_words_ = kernels_.packed_words(cache);
    const int64_t partial = partial_floats(cache.latent);
    int64_t partials = 0;
    for (Split& split : splits_) {
        split.packed = static_cast<int64_t>(vectors_.size()) * packed_words_;
        split.partials = partials * partial;
        partials += split.rows.vectors * split.slots;
        for (int vector = 0; vector < split.rows.vectors; ++vector)
            vectors_.emplace_back(static_cast<int32_t>(&split - splits_.data()), vector);
    }
    // Of a thread: a row group's queries, its partials of all runs so far and of one, and scratch.
    own_partials_ = round_up(4 * packed_words_ * kMaxVectors);
    own_scratch_ = own_partials_ + round_up(4 * partial * kMaxVectors) * 2;
    own_bytes_ = own_scratch_ + round_up(kernels_.scratch_bytes(cache, kMaxVectors));
    const int64_t packed_bytes = round_up(4 * packed_words_ * static_cast<int64_t>(vectors_.size()));
    const int64_t partial_bytes = round_up(4 * partial * partials);
    char* const all = static_cast<char*>(
        memory.at_least(packed_bytes + partial_bytes + threads * own_bytes_));
    packed_ = reinterpret_cast<int32_t*>(all);
    partials_ = reinterpret_cast<float*>(all + packed_bytes);
    own_ = all + packed_bytes + partial_bytes;
}

void AttentionPlan::cut(const AttentionSpan& span, int64_t total) {
    const int64_t vectors = num_vectors(span, heads_), blocks = num_blocks(span);
    // Its share of the tasks that all threads together should have.
    const int64_t wanted =
        threads_ == 1 ? 1 : ceil_div(kTasksPerThread * threads_ * vectors * blocks, std::max(total, int64_t{1}));
    int64_t width = std::min<int64_t>(vectors, kMaxVectors);
    int64_t unit = blocks;  // blocks of a slot; all of them: no split
    if (ceil_div(vectors, width) < wanted) {
        unit = ceil_div(vectors, width) * ceil_div(blocks, kBlocksPerRun) >= wanted ? kBlocksPerRun : 1;
        // Fewer rows per task load the context more often: only where threads would idle else.
        const int64_t least = std::min(wanted, int64_t{2} * threads_);
        while (width > 1 && ceil_div(vectors, width) * ceil_div(blocks, unit) < least) width = (width + 1) / 2;
        if (4 * partial_floats(shape_.latent) * vectors * ceil_div(blocks, unit) > kMaxPartialBytes)
            unit = blocks;
    }
    for (int64_t first = 0; first < vectors; first += width) {
        const RowGroup rows{&span, heads_, first * kRowLanes,
                            static_cast<int>(std::min(width, vectors - first))};
        const int64_t visible = ceil_div(rows.end(), kBlockTokens);
        const int64_t slots = ceil_div(visible, unit);
        if (slots <= 1) {
            tasks_.push_back({rows, 0, visible, -1, rows.vectors * visible});
            continue;
        }
        splits_.push_back({rows, 0, 0, slots, unit});
        for (int64_t block = 0; block < visible; block += unit) {
            const int64_t last = std::min(block + unit, visible);
            tasks_.push_back({rows, block, last, static_cast<int64_t>(splits_.size()) - 1,
                              rows.vectors * (last - block)});
        }
    }
}

void AttentionPlan::run(const Task& task, const CacheView& cache, const AttentionData& data,
                        int thread) const {
    char* const own = own_ + thread * own_bytes_;
    void* const scratch = own + own_scratch_;
    float* const partials = reinterpret_cast<float*>(own + own_partials_);
    const int64_t partial = partial_floats(cache.latent);
    const int vectors = task.rows.vectors;
    if (task.split >= 0) {
        const Split& split = splits_[static_cast<size_t>(task.split)];
        kernels_.attend(cache, task.rows, packed_ + split.packed, task.first_block, task.last_block,
                        partials, scratch);
        const int64_t slot = task.first_block / split.unit;
        for (int v = 0; v < vectors; ++v)
            std::copy_n(partials + partial * v, partial,
                        partials_ + split.partials + partial * (v * split.slots + slot));
        return;
    }
    int32_t* const packed = reinterpret_cast<int32_t*>(own);
    for (int v = 0; v < vectors; ++v) {
        const float* rows[kRowLanes];
        find_rows(task.rows, v, data.queries, data.query_stride, cache.width(), rows);
        kernels_.pack_queries(cache, rows, task.rows.lanes(v), packed + packed_words_ * v);
    }
    float* const run = partials + partial * kMaxVectors;
    for (int64_t block = 0; block < task.last_block; block += kBlocksPerRun) {
        const int64_t last = std::min(block + kBlocksPerRun, task.last_block);
        kernels_.attend(cache, task.rows, packed, block, last, block ? run : partials, scratch);
        for (int v = 0; block && v < vectors; ++v)
            kernels_.merge(partials + partial * v, run + partial * v, cache.latent);
    }
    for (int v = 0; v < vectors; ++v) {
        float* rows[kRowLanes];
        find_rows(task.rows, v, data.output, data.output_stride, cache.latent, rows);
        kernels_.finish(partials + partial * v, cache.latent, rows, task.rows.lanes(v));
    }
}

void attention_phases(Worker& worker, const AttentionPlan& plan, const CacheView& cache,
                      const AttentionData& data) {
    // Some tokens at a time: one takes a fraction of a microsecond.
    constexpr int64_t kTokens = 8;
    const int64_t writes = ceil_div(plan.tokens_, kTokens);
    const int64_t vectors = static_cast<int64_t>(plan.vectors_.size());
    worker.for_each(vectors + writes, [&](int64_t index) {
        if (index < vectors) {
            const auto [number, vector] = plan.vectors_[static_cast<size_t>(index)];
            const RowGroup& group = plan.splits_[static_cast<size_t>(number)].rows;
            const float* rows[kRowLanes];
            find_rows(group, vector, data.queries, data.query_stride, cache.width(), rows);
            plan.kernels_.pack_queries(cache, rows, group.lanes(vector),
                                       plan.packed_ + index * plan.packed_words_);
            return;
        }
        int64_t first = (index - vectors) * kTokens, last = first + kTokens;
        for (const AttentionSpan& span : plan.spans_) {  // tokens [first, last) of all spans
            for (int64_t i = first; i < std::min(last, span.num_rows); ++i) {
                const int64_t position = span.start + i, row = span.first_row + i;
                const int64_t slot = span.pages[position / cache.page_tokens] * cache.page_tokens +
                                     position % cache.page_tokens;
                plan.kernels_.write_token(cache, slot, data.latents + row * data.latent_stride,
                                          data.keys + row * data.key_stride);
            }
            first = std::max<int64_t>(first - span.num_rows, 0);
            last -= span.num_rows;
            if (last <= 0) break;
        }
    });

    worker.for_each(static_cast<int64_t>(plan.tasks_.size()), [&](int64_t index) {
        plan.run(plan.tasks_[static_cast<size_t>(index)], cache, data, worker.thread);
    });

    const int64_t parts = ceil_div(cache.latent, kSplitChannels);
    worker.for_each(vectors * parts, [&](int64_t index) {
        const auto [number, vector] = plan.vectors_[static_cast<size_t>(index / parts)];
        const auto& split = plan.splits_[static_cast<size_t>(number)];
        float* rows[kRowLanes];
        find_rows(split.rows, vector, data.output, data.output_stride, cache.latent, rows);
        const int first = static_cast<int>(index % parts) * kSplitChannels;
        plan.kernels_.finish_split(
            plan.partials_ + split.partials + partial_floats(cache.latent) * vector * split.slots,
            split.slots, kBlocksPerRun / split.unit, cache.latent, first,
            std::min(first + kSplitChannels, cache.latent), rows, split.rows.lanes(vector));
    });
}

}  // namespace intserve
