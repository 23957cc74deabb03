// The kernels of attention (attention.h), for one instruction set.
#include "attention_block.h"

namespace intserve::INTSERVE_ISA {

namespace {

// Scores of VECTORS vectors over a block, then e^(score - maximum) in `weights` [256][16] each, and
// the block's maxima and sums.
template <Layout L, int VECTORS>
void score(const CacheView& cache, const RowGroup& group, int vector, int64_t begin,
           const int32_t* packed, const Block& block, bool fetches_next, float* weights,
           float (*peaks)[kLanes], float (*totals)[kLanes]) {
    using E = typename ElementOf<L>::Type;
    const int32_t *values[VECTORS], *keys[VECTORS];
    f32v peak[VECTORS], limit[VECTORS], query_scale[VECTORS];
    bool is_masked = block.count < block.padded;
    for (int v = 0; v < VECTORS; ++v) {
        values[v] = packed + packed_words(cache) * (vector + v);
        keys[v] = values[v] + value_words<L>(cache);
        if (L == Layout::int8) query_scale[v] = as_float(loadi(keys[v] + cache.rope / 2 * kLanes));
        float visible[kLanes];  // tokens of the block
        for (int lane = 0; lane < kLanes; ++lane) {
            const int64_t count = group.position((vector + v) * kLanes + lane) + 1 - begin;
            if (count < block.count) is_masked = true;
            visible[lane] = static_cast<float>(count < block.count ? count : block.count);
        }
        limit[v] = load(visible);
        peak[v] = splat(kLowest);
    }
    for (int t = 0; t < block.padded; t += kAtOnce) {
        if (fetches_next)
            for (int64_t next = begin + kBlockTokens + t; next < begin + kBlockTokens + t + kAtOnce; ++next)
                if (next < group.end()) prefetch(cache, *group.span, next);
        const int32_t *rows[kAtOnce], *key_rows[kAtOnce];
        f32v scores[VECTORS][1][kAtOnce];
        for (int n = 0; n < kAtOnce; ++n) {
            rows[n] = reinterpret_cast<const int32_t*>(block.values[t + n]);
            key_rows[n] = reinterpret_cast<const int32_t*>(block.keys[t + n]);
            for (int v = 0; v < VECTORS; ++v)
                scores[v][0][n] = cache.has_keys() ? splat(block.not_finite[t + n]) : zero();
        }
        if constexpr (L == Layout::int8) {
            multiply<Bf16, VECTORS, 1>(scores, keys, key_rows, cache.rope / 2);
            typename E::Sum sums[VECTORS][E::kTerms][kAtOnce];
            for (auto& of_vector : sums)
                for (auto& of_term : of_vector)
                    for (auto& sum : of_term) sum = E::zero_sum();
            multiply<E, VECTORS, 1>(sums, values, rows, value_dwords<L>(cache));
            for (int v = 0; v < VECTORS; ++v)
                for (int n = 0; n < kAtOnce; ++n) {
                    i32v sum = (i32v)sums[v][0][n];
                    if constexpr (E::kTerms == 2)  // of 256 high + low - 2^15
                        sum = sub(add(shift_left<8>(sum), (i32v)sums[v][1][n]),
                                  shift_left<15>(splati(block.code_sums[t + n])));
                    const f32v scale = query_scale[v] * splat(block.scales[t + n]);
                    scores[v][0][n] = fma(to_float(sum), scale, scores[v][0][n]);
                }
        } else if constexpr (L == Layout::fp8_tiles) {
            multiply<Bf16, VECTORS, 1>(scores, keys, key_rows, cache.rope / 2);
            for (int tile = 0; tile < cache.tiles(); ++tile) {
                const int first = tile * kTile / 2, dwords = cache.latent / 2 - first;
                f32v sums[VECTORS][1][kAtOnce];
                const int32_t *part[VECTORS], *part_rows[kAtOnce];
                for (int v = 0; v < VECTORS; ++v) part[v] = values[v] + first * kLanes;
                for (int n = 0; n < kAtOnce; ++n) {
                    part_rows[n] = rows[n] + first;
                    for (int v = 0; v < VECTORS; ++v) sums[v][0][n] = zero();
                }
                multiply<E, VECTORS, 1>(sums, part, part_rows, dwords < kTile / 2 ? dwords : kTile / 2);
                for (int v = 0; v < VECTORS; ++v)
                    for (int n = 0; n < kAtOnce; ++n)
                        scores[v][0][n] = fma(sums[v][0][n],
                                              splat(block.scales[tile * kBlockTokens + t + n]),
                                              scores[v][0][n]);
            }
        } else {
            multiply<E, VECTORS, 1>(scores, values, rows, value_dwords<L>(cache));
        }
        for (int v = 0; v < VECTORS; ++v)
            for (int n = 0; n < kAtOnce; ++n) {
                f32v s = scores[v][0][n];
                if (is_masked)
                    s = less_then(splat(static_cast<float>(t + n)), limit[v], s, splat(-kInfinity));
                store(weights + v * Scratch::kVector + (t + n) * kLanes, s);
                peak[v] = max(peak[v], s);
            }
    }
    for (int v = 0; v < VECTORS; ++v) {
        float* const w = weights + v * Scratch::kVector;
        f32v total = zero();
        for (int t = 0; t < block.padded; ++t) {
            const f32v weight = exp(load(w + t * kLanes) - peak[v]);
            store(w + t * kLanes, weight);
            total = total + weight;
        }
        store(peaks[v], peak[v]);
        store(totals[v], total);
    }
}

// Two vectors' BF16 values in pairs: the first in the low halves.
INTSERVE_INLINE i32v bf16_pairs(f32v low, f32v high) {
#if INTSERVE_ISA_LEVEL == 3
    const i32v both = (__m512i)_mm512_cvtne2ps_pbh(high, low);
    alignas(64) static constexpr uint16_t kOrder[32] = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5,
        21, 6, 22, 7, 23, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return _mm512_permutexvar_epi16(loadi(kOrder), both);
#else
    return bit_or(bf16_bits(low), shift_left<16>(bf16_bits(high)));
#endif
}

// Weights [256][16] of one vector -> the operand of the weighted sums, and per lane what the sums
// are to be multiplied by.
template <Layout L>
f32v pack_weights(const Block& block, int tile, const float* weights, int32_t* packed) {
    const float* const scales = block.scales + tile * kBlockTokens;
    if constexpr (L == Layout::int8) {
        f32v peak = splat(0x1p-100f);  // so that a lane of zeros divides by something
        for (int t = 0; t < block.padded; ++t)
            peak = max(peak, load(weights + t * kLanes) * splat(scales[t]));
        const f32v factor = splat(static_cast<float>(kWeightLimit)) / peak;
        const auto code = [&](int t) {
            return to_nearest(load(weights + t * kLanes) * splat(scales[t]) * factor);
        };
        for (int t = 0; t < block.padded; t += Int16::kPer, packed += Int16::kTerms * kLanes) {
            if constexpr (Int16::kTerms == 2) {
                const i32v ab = bit_or(code(t), shift_left<16>(code(t + 1)));
                const i32v cd = bit_or(code(t + 2), shift_left<16>(code(t + 3)));
                // Bytes of a and b are in halves 0 and 1; those of one kind come together.
                const i32v mask = splati(0x00FF00FF);
                const auto bytes = [&](i32v x, i32v y) {  // x0 x1 y0 y1 -> x0 | x1 << 8 | ...
                    const i32v pair = bit_or(x, shift_right<8>(x)), other = bit_or(y, shift_right<8>(y));
                    return bit_or(bit_and(pair, splati(0xFFFF)), shift_left<16>(other));
                };
                storei(packed, bytes(bit_and(shift_right<8>(ab), mask), bit_and(shift_right<8>(cd), mask)));
                storei(packed + kLanes, bytes(bit_and(ab, mask), bit_and(cd, mask)));
            } else {
                storei(packed, bit_or(code(t), shift_left<16>(code(t + 1))));
            }
        }
        return peak * splat(1.0f / kWeightLimit);
    } else {
        for (int t = 0; t < block.padded; t += 2, packed += kLanes) {
            f32v low = load(weights + t * kLanes), high = load(weights + (t + 1) * kLanes);
            if (L == Layout::fp8_tiles) low = low * splat(scales[t]), high = high * splat(scales[t + 1]);
            storei(packed, bf16_pairs(low, high));
        }
        return splat(1.0f);
    }
}

// One panel's sums of VECTORS vectors, into the partials' weighted latents.
template <Layout L, int VECTORS>
INTSERVE_INLINE void weigh(const CacheView& cache, const int32_t* const (&weights)[VECTORS],
                           const int32_t* panel, int64_t dwords, int first_channel, int panel_index,
                           const float (*scale)[kLanes], const float* old_factor,
                           const float* new_factor, bool is_first, float* partials) {
    using E = typename ElementOf<L>::Type;
    for (int d = 0; d < kLanes; d += kAtOnce) {
        typename E::Sum sums[VECTORS][E::kTerms][kAtOnce];
        const int32_t* columns[kAtOnce];
        for (int n = 0; n < kAtOnce; ++n) {
            columns[n] = panel + d + n;
            for (int v = 0; v < VECTORS; ++v)
                for (int i = 0; i < E::kTerms; ++i) sums[v][i][n] = E::zero_sum();
        }
        multiply<E, VECTORS, kLanes>(sums, weights, columns, dwords);
        for (int n = 0; n < kAtOnce; ++n) {
            const int channel = first_channel + channel_of<E::kPer>(panel_index, d + n);
            if (channel >= cache.latent) continue;
            for (int v = 0; v < VECTORS; ++v) {
                float* const to = partials + partial_floats(cache.latent) * v + (2 + channel) * kLanes;
                f32v sum;
                if constexpr (L == Layout::int8) {
                    i32v exact = (i32v)sums[v][0][n];
                    if (E::kTerms == 2) exact = add(shift_left<8>(exact), (i32v)sums[v][E::kTerms - 1][n]);
                    sum = to_float(exact) * load(scale[v]);
                } else {
                    sum = sums[v][0][n];
                }
                if (!is_first)
                    sum = fma(load(to), load(old_factor + v * kLanes), sum * load(new_factor + v * kLanes));
                store(to, sum);
            }
        }
    }
}

// Maxima and sums of two partials -> of both, and what each one's weighted latents are multiplied by.
INTSERVE_INLINE void merge_heads(float* into, const float* peak, const float* total, f32v& old_factor,
                                 f32v& new_factor) {
    const f32v together = max(load(into), load(peak));
    old_factor = exp(load(into) - together);
    new_factor = exp(load(peak) - together);
    store(into + kLanes, fma(load(into + kLanes), old_factor, load(total) * new_factor));
    store(into, together);
}

INTSERVE_INLINE void merge_channels(float* into, const float* from, int count, f32v old_factor,
                                    f32v new_factor) {
    for (int c = 0; c < count; ++c, into += kLanes, from += kLanes)
        store(into, fma(load(into), old_factor, load(from) * new_factor));
}

template <int N> struct Count {
    static constexpr int kCount = N;
};
// body(vector, Count<N>) for N vectors at a time, then for single ones.
template <int N, class Body> INTSERVE_INLINE void for_vectors(int first, int last, const Body& body) {
    for (; first + N <= last; first += N) body(first, Count<N>{});
    for (; first < last; ++first) body(first, Count<1>{});
}

template <Layout L>
void attend_block(const CacheView& cache, const RowGroup& group, const int32_t* packed,
                  int64_t begin, int64_t end, bool is_first, bool has_next, float* partials,
                  const Scratch& scratch) {
    using E = typename ElementOf<L>::Type;
    constexpr int kAtATime = kAtOnce * E::kTerms >= 16 || INTSERVE_ISA_LEVEL < 2 ? 1 : 2;
    const int64_t partial = partial_floats(cache.latent);
    int first = 0;  // vectors before it see nothing of the block
    for (; group.position(first * kLanes + kLanes - 1) < begin; ++first) {
        if (!is_first) continue;
        float* const empty = partials + partial * first;
        std::memset(empty, 0, 4 * static_cast<size_t>(partial));
        store(empty, splat(kLowest));
    }
    Block block;
    prepare<L>(cache, group, begin, end, is_first, scratch, block);
    const auto add_scores = [&](int v, auto vectors) {
        constexpr int kVectors = decltype(vectors)::kCount;
        float peaks[kVectors][kLanes], totals[kVectors][kLanes];
        score<L, kVectors>(cache, group, v, begin, packed, block, v == first && has_next,
                           scratch.weights + Scratch::kVector * v, peaks, totals);
        for (int i = 0; i < kVectors; ++i) {
            float* const head = partials + partial * (v + i);
            f32v old_factor = zero(), new_factor = zero();
            if (is_first) {
                store(head, load(peaks[i]));
                store(head + kLanes, load(totals[i]));
            } else {
                merge_heads(head, peaks[i], totals[i], old_factor, new_factor);
            }
            store(scratch.old_factor + (v + i) * kLanes, old_factor);
            store(scratch.new_factor + (v + i) * kLanes, new_factor);
        }
    };
    for_vectors<kAtATime>(first, group.vectors, add_scores);

    const int64_t dwords = block.padded / E::kPer;
    constexpr int kGroup = kGroupBytes * E::kPer / 4;  // channels
    float weight_scale[kMaxVectors][kLanes];
    for (int tile = 0; tile < cache.tiles(); ++tile) {
        const int last = tile + 1 < cache.tiles() ? (tile + 1) * kTile : cache.latent;
        for (int v = first; v < group.vectors && L != Layout::fp32; ++v)
            store(weight_scale[v], pack_weights<L>(block, tile, scratch.weights + Scratch::kVector * v,
                                                   scratch.packed_weights + Scratch::kVector * v));
        const int32_t* const weights = L == Layout::fp32
                                           ? reinterpret_cast<const int32_t*>(scratch.weights)
                                           : scratch.packed_weights;
        for (int channel = tile * kTile; channel < last; channel += kGroup) {
            const int64_t panel_size = dwords * kLanes;
            // Beside the last channels a row may hold others, or end: those are copied.
            const int width = (last - channel < kGroup ? last - channel : kGroup) * 4 / E::kPer;
            alignas(64) uint8_t padded[E::kPer][kGroupBytes] = {};
            for (int64_t d = 0; d < dwords; ++d) {
                const uint8_t* rows[E::kPer];
                for (int i = 0; i < E::kPer; ++i) {
                    rows[i] = block.values[d * E::kPer + i] + channel * 4 / E::kPer;
                    if (width == kGroupBytes) continue;
                    std::memcpy(padded[i], rows[i], static_cast<size_t>(width));
                    rows[i] = padded[i];
                }
                interleave<E::kPer>(rows, panel_size, scratch.panels + d * kLanes);
            }
            const auto add_values = [&](int at, auto vectors) {
                constexpr int kVectors = decltype(vectors)::kCount;
                const int32_t* operands[kVectors];
                for (int i = 0; i < kVectors; ++i) operands[i] = weights + Scratch::kVector * (at + i);
                for (int panel = 0; panel < E::kPer; ++panel)
                    weigh<L, kVectors>(cache, operands, scratch.panels + panel * panel_size, dwords,
                                       channel, panel, weight_scale + at,
                                       scratch.old_factor + at * kLanes, scratch.new_factor + at * kLanes,
                                       is_first, partials + partial * at);
            };
            for_vectors<kAtATime>(first, group.vectors, add_values);
        }
    }
}

template <Layout L>
void attend_blocks(const CacheView& cache, const RowGroup& group, const int32_t* packed,
                   int64_t first, int64_t last, float* partials, void* scratch) {
    const Scratch memory(cache, group.vectors, scratch);
    for (int64_t block = first; block < last; ++block)
        attend_block<L>(cache, group, packed, block * kBlockTokens, group.end(), block == first,
                        block + 1 < last, partials, memory);
}

void attend(const CacheView& cache, const RowGroup& group, const int32_t* packed, int64_t first,
            int64_t last, float* partials, void* scratch) {
    const auto kernel = cache.layout == Layout::fp32         ? attend_blocks<Layout::fp32>
                        : cache.layout == Layout::int8       ? attend_blocks<Layout::int8>
                        : cache.layout == Layout::fp8_tiles  ? attend_blocks<Layout::fp8_tiles>
                        : cache.layout == Layout::fp8_tensor ? attend_blocks<Layout::fp8_tensor>
                                                             : attend_blocks<Layout::bf16>;
    kernel(cache, group, packed, first, last, partials, scratch);
}

void merge(float* into, const float* from, int latent) {
    f32v old_factor, new_factor;
    merge_heads(into, from, from + kLanes, old_factor, new_factor);
    merge_channels(into + 2 * kLanes, from + 2 * kLanes, latent, old_factor, new_factor);
}

// Channels [first, first + count) [count][16], over their lanes' sums -> rows.
INTSERVE_INLINE void store_rows(const float* channels, const float* totals, int first, int count,
                                float* const* rows, int lanes) {
    const f32v factor = splat(1.0f) / load(totals);
    for (int c = 0; c < count; ++c) {
        float values[kLanes];
        store(values, load(channels + c * kLanes) * factor);
        for (int lane = 0; lane < lanes; ++lane) rows[lane][first + c] = values[lane];
    }
}

void finish(const float* partial, int latent, float* const* rows, int count) {
    store_rows(partial + 2 * kLanes, partial + kLanes, 0, latent, rows, count);
}

void finish_split(const float* partials, int64_t slots, int64_t unit, int latent, int first,
                  int last, float* const* rows, int lanes) {
    const int64_t partial = partial_floats(latent);
    const int count = last - first;
    // Maxima, sums and these channels: of a run, and of all runs so far.
    alignas(64) float run[(kSplitChannels + 2) * kLanes], all[(kSplitChannels + 2) * kLanes];
    const auto copy = [&](float* to, const float* from) {
        std::memcpy(to, from, 2 * kLanes * sizeof(float));
        std::memcpy(to + 2 * kLanes, from + (2 + first) * kLanes, sizeof(float) * kLanes * static_cast<size_t>(count));
    };
    for (int64_t slot = 0; slot < slots; slot += unit) {
        copy(run, partials + partial * slot);
        for (int64_t next = slot + 1; next < slot + unit && next < slots; ++next) {
            const float* const from = partials + partial * next;
            f32v old_factor, new_factor;
            merge_heads(run, from, from + kLanes, old_factor, new_factor);
            merge_channels(run + 2 * kLanes, from + (2 + first) * kLanes, count, old_factor, new_factor);
        }
        if (slot == 0)
            std::memcpy(all, run, sizeof run);
        else
            merge(all, run, count);
    }
    store_rows(all + 2 * kLanes, all + kLanes, first, count, rows, lanes);
}

int64_t scratch_bytes(const CacheView& cache, int vectors) { return Scratch::bytes(cache, vectors); }

}  // namespace

extern const AttentionKernels attention_kernels = {
    write_token, packed_words, pack_queries, scratch_bytes, attend, merge, finish, finish_split};

}  // namespace intserve::INTSERVE_ISA
