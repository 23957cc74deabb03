// What the kernels of attention read: packed queries, and an attention block's tokens.
#pragma once

#include "attention_products.h"
#include "attention_rows.h"

namespace intserve::INTSERVE_ISA {

namespace {

// Below every score; the maximum of a lane that sees no token of a block.
constexpr float kLowest = -3e38f;
constexpr float kInfinity = __builtin_inff();
// Largest weight of int8. Sums of 256 products with codes stay below 2^31 by far.
constexpr int kWeightLimit = 32767;
// Stands in for the rows of tokens beyond a sequence's end.
alignas(64) constexpr uint8_t kZeros[4 * kMaxWidth + kGroupBytes] = {};

// Largest query integer of int8: a sum of R products with codes up to 127 stays below 2^31.
INTSERVE_INLINE int query_limit(int latent) {
    const int exact = INT32_MAX / (127 * latent);
    return exact < 32767 ? exact : 32767;
}

// The element of the products with `CacheView::values`.
template <Layout L> struct ElementOf { using Type = Bf16; };
template <> struct ElementOf<Layout::fp32> { using Type = Fp32; };
template <> struct ElementOf<Layout::int8> { using Type = Int16; };

template <Layout L> INTSERVE_INLINE int value_dwords(const CacheView& cache) {
    const bool with_key = L != Layout::int8 && L != Layout::fp8_tiles;
    return (with_key ? cache.width() : cache.latent) / ElementOf<L>::Type::kPer;
}
template <Layout L> INTSERVE_INLINE int64_t value_words(const CacheView& cache) {
    return int64_t{value_dwords<L>(cache)} * ElementOf<L>::Type::kTerms * kLanes;
}

// A packed vector of queries: values, rotary key (BF16) where it is apart, a scale per lane (int8).
int64_t packed_words(const CacheView& cache) {
    const int64_t keys = cache.has_keys() ? cache.rope / 2 * kLanes : 0;
    if (cache.layout == Layout::fp32) return value_words<Layout::fp32>(cache);
    if (cache.layout == Layout::int8) return value_words<Layout::int8>(cache) + keys + kLanes;
    if (cache.layout == Layout::fp8_tiles) return value_words<Layout::fp8_tiles>(cache) + keys;
    return value_words<Layout::bf16>(cache);
}

// Lane `lane` of the operand [dwords][stride of terms].
INTSERVE_INLINE void scatter(int32_t* to, const void* row, int dwords, int stride) {
    const char* from = static_cast<const char*>(row);
    for (int k = 0; k < dwords; ++k) std::memcpy(to + k * stride, from + 4 * k, 4);
}

// One query's latent part as integers -> its scale, NaN where a value is not finite.
INTSERVE_INLINE float pack_integers(const float* query, int latent, int32_t* to) {
    const int limit = query_limit(latent);
    const float peak = amax(query, latent), scale = at_least_smallest(peak / static_cast<float>(limit));
    alignas(64) uint8_t high[kMaxWidth + kLanes], low[kMaxWidth + kLanes];
    alignas(64) uint16_t whole[kMaxWidth + kLanes];
    for (int k = 0; k < latent; k += kLanes) {
        const i32v steps = to_nearest(load_some(query, k, latent) / splat(scale));
        const i32v code = min(splati(limit), max(splati(-limit), steps));
        if (Int16::kTerms == 2) {
            const i32v shifted = add(code, splati(0x8000));
            store_low8(high + k, shift_right<8>(shifted));
            store_low8(low + k, shifted);
        } else {
            store_low16(whole + k, code);
        }
    }
    const int dwords = latent / Int16::kPer;
    if (Int16::kTerms == 2) {
        scatter(to, high, dwords, 2 * kLanes);
        scatter(to + kLanes, low, dwords, 2 * kLanes);
    } else {
        scatter(to, whole, dwords, kLanes);
    }
    return peak < kInfinity ? scale : __builtin_nanf("");
}

void pack_queries(const CacheView& cache, const float* const* rows, int count, int32_t* packed) {
    if (count < kLanes) std::memset(packed, 0, 4 * static_cast<size_t>(packed_words(cache)));
    const int latent = cache.latent, rope = cache.rope;
    alignas(64) uint16_t bf16[kMaxWidth + kLanes];
    for (int lane = 0; lane < count; ++lane) {
        const float* const query = rows[lane];
        int32_t* const to = packed + lane;
        if (cache.layout == Layout::fp32) {
            scatter(to, query, cache.width(), kLanes);
        } else if (cache.layout == Layout::int8) {
            int32_t* const keys = to + value_words<Layout::int8>(cache);
            const float scale = pack_integers(query, latent, to);
            write_bf16(bf16, query + latent, rope);
            scatter(keys, bf16, rope / 2, kLanes);
            std::memcpy(keys + rope / 2 * kLanes, &scale, 4);
        } else {
            write_bf16(bf16, query, cache.width());
            scatter(to, bf16, cache.width() / 2, kLanes);
        }
    }
}

// One attention block of a sequence, as the products read it.
struct Block {
    int count, padded;  // tokens, and these with zeros up to a multiple of kAtOnce
    const uint8_t* values[kBlockTokens];
    const uint16_t* keys[kBlockTokens];
    float* scales;       // [tiles][256]
    float* not_finite;   // 0, or NaN for a token whose scale is not finite
    int32_t* code_sums;  // int8 with VNNI: of a token's codes
};

// Memory of one task. Lanes of 16 are one value per query row.
struct Scratch {
    float *scales, *not_finite, *weights, *widened;
    int32_t *code_sums, *packed_weights, *panels;
    float *old_factor, *new_factor;  // [vectors][16], of the merge of a block's partial

    static constexpr int64_t kVector = int64_t{kBlockTokens} * kLanes;  // weights of a vector
    // Halves of a widened row, with whole groups of channels.
    static int64_t widened_halves(const CacheView& cache) { return (cache.width() + 63) / 64 * 64; }

    static int64_t bytes(const CacheView& cache, int vectors) {
        return 4 * (kBlockTokens * (int64_t{cache.tiles()} + 2) + 2 * kVector * vectors +
                    kGroupBytes / 4 * kBlockTokens + 2 * kLanes * vectors +
                    kBlockTokens * widened_halves(cache) / 2);
    }
    Scratch(const CacheView& cache, int vectors, void* memory) {
        scales = static_cast<float*>(memory);
        not_finite = scales + kBlockTokens * cache.tiles();
        code_sums = reinterpret_cast<int32_t*>(not_finite + kBlockTokens);
        weights = not_finite + 2 * kBlockTokens;
        packed_weights = reinterpret_cast<int32_t*>(weights + kVector * vectors);
        panels = packed_weights + kVector * vectors;
        old_factor = reinterpret_cast<float*>(panels + kGroupBytes / 4 * kBlockTokens);
        new_factor = old_factor + kLanes * vectors;
        widened = new_factor + kLanes * vectors;
    }
};

INTSERVE_INLINE int32_t sum_of_codes(const uint8_t* codes, int count) {
#if INTSERVE_ISA_LEVEL >= 2
    i32v total = zeroi();
    for (int k = 0; k < count; k += 64) {
        const __mmask64 some = count - k >= 64 ? ~0ull : (1ull << (count - k)) - 1;
        total = _mm512_dpbusd_epi32(total, _mm512_set1_epi8(1), _mm512_maskz_loadu_epi8(some, codes + k));
    }
    return _mm512_reduce_add_epi32(total);
#else
    (void)codes, (void)count;  // the products of these instruction sets take signed integers
    return 0;
#endif
}

INTSERVE_INLINE int64_t slot_of(const CacheView& cache, const AttentionSpan& span, int64_t token) {
    const int64_t page = span.pages[token / cache.page_tokens];
    return page * cache.page_tokens + token % cache.page_tokens;
}

// Pages lie anywhere, so the CPU cannot foresee where the next one is.
INTSERVE_INLINE void prefetch(const CacheView& cache, const AttentionSpan& span, int64_t token) {
    const int64_t slot = slot_of(cache, span, token);
    const uint8_t* const values = cache.values + slot * cache.value_bytes();
    for (int byte = 0; byte < cache.value_bytes(); byte += 64) __builtin_prefetch(values + byte, 0, 2);
    if (!cache.has_keys()) return;
    __builtin_prefetch(cache.scales + slot * cache.tiles(), 0, 2);
    const uint8_t* const keys = reinterpret_cast<const uint8_t*>(cache.keys + slot * cache.rope);
    for (int byte = 0; byte < 2 * cache.rope; byte += 64) __builtin_prefetch(keys + byte, 0, 2);
}

// Find the tokens' rows, and widen them where the products do not take them as they are.
template <Layout L>
void prepare(const CacheView& cache, const RowGroup& group, int64_t begin, int64_t end,
             bool is_first, const Scratch& scratch, Block& block) {
    constexpr int kAhead = 16;
    block.count = static_cast<int>(end - begin < kBlockTokens ? end - begin : kBlockTokens);
    block.padded = (block.count + kAtOnce - 1) / kAtOnce * kAtOnce;
    block.scales = scratch.scales;
    block.not_finite = scratch.not_finite;
    block.code_sums = scratch.code_sums;
    const int tiles = cache.tiles();
    const int64_t stride = Scratch::widened_halves(cache);
    for (int t = 0; t < block.padded; ++t) {
        if (t >= block.count) {
            block.values[t] = kZeros;
            block.keys[t] = reinterpret_cast<const uint16_t*>(kZeros);
            for (int tile = 0; tile < tiles; ++tile) block.scales[tile * kBlockTokens + t] = 0.0f;
            block.not_finite[t] = 0.0f;
            block.code_sums[t] = 0;
            continue;
        }
        if (is_first && t + kAhead < block.count) prefetch(cache, *group.span, begin + t + kAhead);
        const int64_t slot = slot_of(cache, *group.span, begin + t);
        const uint8_t* values = cache.values + slot * cache.value_bytes();
        uint16_t* const wide = reinterpret_cast<uint16_t*>(scratch.widened) + t * stride;
        if (L == Layout::fp8_tiles || L == Layout::fp8_tensor) {
            for (int k = 0; k < cache.value_bytes(); k += kLanes) {
                uint8_t some[kLanes] = {};
                const int left = cache.value_bytes() - k;
                if (left < kLanes) std::memcpy(some, values + k, static_cast<size_t>(left));
                store_low16(wide + k, bf16_of_e4m3(left < kLanes ? some : values + k));
            }
            values = reinterpret_cast<const uint8_t*>(wide);
        }
        if (L == Layout::int8) {
            block.code_sums[t] = sum_of_codes(values, cache.latent);
            if (Int16::kPer == 2) {
                for (int k = 0; k < cache.latent; ++k)
                    wide[k] = static_cast<uint16_t>(static_cast<int8_t>(values[k]));
                values = reinterpret_cast<const uint8_t*>(wide);
            }
        }
        block.values[t] = values;
        if (cache.has_keys()) {
            block.keys[t] = cache.keys + slot * cache.rope;
            block.not_finite[t] = 0.0f;
            for (int tile = 0; tile < tiles; ++tile) {
                const float scale = cache.scales[slot * tiles + tile];
                // Such a token makes the rows that see it NaN, through its score, and no others.
                const bool is_finite = scale < kInfinity;
                block.scales[tile * kBlockTokens + t] = is_finite ? scale : 0.0f;
                if (!is_finite) block.not_finite[t] = __builtin_nanf("");
            }
        }
    }
}

}  // namespace

}  // namespace intserve::INTSERVE_ISA
