// Absorbed MLA over the paged latent cache: what the step calls, and the tables of its kernels.
//
// All heads of a token attend over one latent (width R) and one rotary key (width r) per cached
// token, so a query row is one head of one token, and rows of a sequence share every cached token
// that is loaded. A vector's 16 lanes are 16 query rows; a cached token is the operand that is
// broadcast, straight from its page. Context is read in attention blocks of 256 tokens:
//
//   scores   dot products of the packed queries with the tokens' rows
//   softmax  maximum and sum per lane, weights e^(score - maximum)
//   values   dot products of the weights with the tokens, interleaved by channel
//
// A block's partial result (maximum, sum, weighted latents) is computed from nothing; partials of
// four consecutive blocks are merged in order, and so are these. What is merged when depends on the
// position alone, hence a row's bits do not depend on the batch, on chunks, or on threads.
//
// Arithmetic, by layout of the cache (deepseek/engine/kv_cache.py):
//   fp32        FP32 throughout
//   bf16, fp8   queries and weights rounded to BF16, sums in FP32. e4m3 codes are widened to BF16,
//               exactly, once per block; a tile's scale multiplies scores and weights
//   int8        queries as integers of 16 bits, weights (probability times the token's scale) of 15,
//               each with a scale per row; sums of products with the codes are exact in 32 bits. The
//               rotary key as in bf16. With VNNI an integer is two bytes, which share the codes
#pragma once

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "cpu.h"
#include "team.h"

namespace intserve {

constexpr int kBlockTokens = 256;  // pages.BLOCK_TOKENS
constexpr int kBlocksPerRun = 4;   // blocks whose partials are merged before others are
constexpr int kRowLanes = 16;      // query rows of a vector
constexpr int kTile = 128;         // kv_layout.KV_TILE
constexpr int kMaxWidth = 2048;    // of R + r
constexpr int kMaxVectors = 8;     // of a row group
constexpr int kSplitChannels = 64; // of a task of the last phase

enum class Layout { bf16, int8, fp8_tiles, fp8_tensor, fp32 };

// The tensors of LatentCache, row-major [layers][pages][page tokens][width].
struct CacheView {
    Layout layout;
    int64_t pages;  // the zero page included
    int64_t page_tokens;
    int latent, rope;   // R and r
    uint8_t* values;    // codes or values; with the rotary key where `keys` is not used
    float* scales;      // int8: one per token; fp8_tiles: one per tile of 128
    uint16_t* keys;     // BF16; int8 and fp8_tiles

    int width() const { return latent + rope; }
    bool has_keys() const { return layout == Layout::int8 || layout == Layout::fp8_tiles; }
    int tiles() const { return layout == Layout::fp8_tiles ? (latent + kTile - 1) / kTile : 1; }
    int value_bytes() const {  // of a token in `values`
        if (layout == Layout::bf16) return 2 * width();
        if (layout == Layout::fp32) return 4 * width();
        return layout == Layout::fp8_tensor ? width() : latent;
    }
    CacheView of_layer(int layer) const;  // the view of one layer, which the kernels take
};

// Consecutive tokens of one sequence: rows [first_row, first_row + num_rows) of the step, the first
// at position `start`. `pages` has an entry for each page up to the last token.
struct AttentionSpan {
    int64_t first_row, num_rows, start;
    const int32_t* pages;
};

// What one layer reads and writes. Strides are in floats, per token. queries: scaled, [T][H][R + r];
// latents [T][R] and keys [T][r]: normed and rotated, to be stored; output: [T][H][R].
struct AttentionData {
    const float* queries;
    const float* latents;
    const float* keys;
    float* output;
    int64_t query_stride, latent_stride, key_stride, output_stride;
};

// Query rows [first, first + 16 * vectors) of a span, over some of its blocks.
struct RowGroup {
    const AttentionSpan* span;
    int heads;
    int64_t first;  // row * heads + head, of the first lane
    int vectors;
    // Position of the token of lane `lane`; lanes past the last row have its.
    int64_t position(int64_t lane) const {
        const int64_t row = (first + lane) / heads;
        return span->start + (row < span->num_rows ? row : span->num_rows - 1);
    }
    int64_t end() const { return position(int64_t{kRowLanes} * vectors - 1) + 1; }
    int lanes(int vector) const {
        const int64_t left = span->num_rows * heads - first - int64_t{kRowLanes} * vector;
        return left < kRowLanes ? static_cast<int>(left) : kRowLanes;
    }
};

// A partial: maxima [16], sums [16], weighted latents [R][16].
inline int64_t partial_floats(int latent) { return int64_t{kRowLanes} * (latent + 2); }

struct AttentionKernels {
    // Quantize one token into slot page * page tokens + offset, as LatentCache.write does.
    void (*write_token)(const CacheView&, int64_t slot, const float* latent, const float* key);
    int64_t (*packed_words)(const CacheView&);  // of 16 packed queries
    // `count` query rows of f32 [R + r] (at most 16; missing ones are zeros) -> packed.
    void (*pack_queries)(const CacheView&, const float* const* rows, int count, int32_t* packed);
    int64_t (*scratch_bytes)(const CacheView&, int vectors);
    // Partials of the row group, one per vector, over blocks [first, last) of one run.
    void (*attend)(const CacheView&, const RowGroup&, const int32_t* packed, int64_t first,
                   int64_t last, float* partials, void* scratch);
    // Merge the partial `from` into the partial before it.
    void (*merge)(float* into, const float* from, int latent);
    // Weighted latents over their sums, of `count` lanes: a partial -> rows of f32 [R].
    void (*finish)(const float* partial, int latent, float* const* rows, int count);
    // The same of `slots` partials in order, for channels [first, last), at most kSplitChannels:
    // merged in runs of `unit` slots, then the runs.
    void (*finish_split)(const float* partials, int64_t slots, int64_t unit, int latent, int first,
                         int last, float* const* rows, int count);
};

// Memory at an address that is a multiple of 64; it grows, and keeps nothing when it does.
class GrowingMemory {
public:
    void* at_least(int64_t bytes) {
        if (bytes > bytes_) {
            memory_.reset();
            memory_.reset(static_cast<char*>(::operator new(bytes, std::align_val_t{64})));
            bytes_ = bytes;
        }
        return memory_.get();
    }

private:
    struct Delete {
        void operator()(char* p) const { ::operator delete(p, std::align_val_t{64}); }
    };
    std::unique_ptr<char, Delete> memory_;
    int64_t bytes_ = 0;
};

// How the spans of a step are cut into tasks, with memory for them; the same for all layers.
// Bits do not depend on it. The page tables and the memory, which it shares with no other plan that
// is in use, must outlive it.
class AttentionPlan {
public:
    // Throws std::invalid_argument for widths that the kernels do not take.
    AttentionPlan(const CacheView& cache, int heads, std::vector<AttentionSpan> spans, int threads,
                  GrowingMemory& memory);
    AttentionPlan(const AttentionPlan&) = delete;  // tasks point to its spans

    static constexpr int kPhases = 3;  // of `attention_phases`

private:
    friend void attention_phases(Worker&, const AttentionPlan&, const CacheView&,
                                 const AttentionData&);
    struct Task {
        RowGroup rows;
        int64_t first_block, last_block;
        int64_t split;  // index of `splits_`; -1 where the task has all of the rows' context
        int64_t work;
    };
    struct Split {  // a row group whose context several tasks share
        RowGroup rows;
        int64_t packed;    // its packed queries, in `packed_`
        int64_t partials;  // its partials [vectors][slots], in `partials_`
        int64_t slots;     // a slot is the partial of `unit` blocks: 1, or a run
        int64_t unit;
    };
    void cut(const AttentionSpan& span, int64_t total_work);
    void run(const Task& task, const CacheView& cache, const AttentionData& data, int thread) const;

    CacheView shape_;  // without memory
    int heads_, threads_;
    const AttentionKernels& kernels_;
    std::vector<AttentionSpan> spans_;
    std::vector<Task> tasks_;
    std::vector<Split> splits_;
    // A task of the first phase packs one vector of queries, one of the last finishes some channels
    // of one vector.
    std::vector<std::pair<int32_t, int32_t>> vectors_;  // split, vector
    int64_t packed_words_, tokens_ = 0;
    int32_t* packed_;
    float* partials_;
    char* own_;  // memory of each thread: [threads][own_bytes_], parts at these offsets
    int64_t own_partials_, own_scratch_, own_bytes_;
};

// Store the step's latents and attend: kPhases phases. `cache` is of one layer, and like the plan's
// in all but memory.
void attention_phases(Worker& worker, const AttentionPlan& plan, const CacheView& cache,
                      const AttentionData& data);

}  // namespace intserve

INTSERVE_KERNEL_TABLES(AttentionKernels, attention_kernels)
