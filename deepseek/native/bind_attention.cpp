// Bindings of attention (attention.h). Addresses are of tensors that the caller checked and keeps.
#include <nanobind/stl/string.h>

#include <stdexcept>

#include "attention.h"
#include "bindings.h"

namespace nb = nanobind;

namespace intserve {

namespace {

Layout layout_of(const std::string& name) {
    if (name == "bf16") return Layout::bf16;
    if (name == "int8") return Layout::int8;
    if (name == "fp8-tiles") return Layout::fp8_tiles;
    if (name == "fp8-tensor") return Layout::fp8_tensor;
    if (name == "fp32") return Layout::fp32;
    throw std::invalid_argument("there is no cache layout " + name);
}

// spans: int64 [count][3]: first row, rows, start; tables: int32 [count][table_width].
void attention(const CacheView& cache, int layer, int heads, uintptr_t spans, uintptr_t tables,
               int64_t count, int64_t table_width, uintptr_t queries, uintptr_t latents,
               uintptr_t keys, uintptr_t output, int threads) {
    const int64_t* const numbers = reinterpret_cast<const int64_t*>(spans);
    const int32_t* const pages = reinterpret_cast<const int32_t*>(tables);
    std::vector<AttentionSpan> list;
    for (int64_t i = 0; i < count; ++i)
        list.push_back({numbers[3 * i], numbers[3 * i + 1], numbers[3 * i + 2], pages + i * table_width});
    AttentionData data{};
    data.queries = reinterpret_cast<const float*>(queries);
    data.latents = reinterpret_cast<const float*>(latents);
    data.keys = reinterpret_cast<const float*>(keys);
    data.output = reinterpret_cast<float*>(output);
    data.query_stride = int64_t{heads} * cache.width();
    data.latent_stride = cache.latent;
    data.key_stride = cache.rope;
    data.output_stride = int64_t{heads} * cache.latent;
    static thread_local GrowingMemory memory;
    const AttentionPlan plan(cache, heads, std::move(list), threads, memory);
    const CacheView view = cache.of_layer(layer);
    run_team(threads, AttentionPlan::kPhases,
             [&](Worker& worker) { attention_phases(worker, plan, view, data); });
}

}  // namespace

void bind_attention(nb::module_& m) {
    nb::class_<CacheView>(m, "CacheView")
        .def(
            "__init__",
            [](CacheView* view, const std::string& layout, int64_t pages, int64_t page_tokens, int latent,
               int rope, uintptr_t values, uintptr_t scales, uintptr_t keys) {
                new (view) CacheView{layout_of(layout), pages, page_tokens, latent, rope,
                                     reinterpret_cast<uint8_t*>(values), reinterpret_cast<float*>(scales),
                                     reinterpret_cast<uint16_t*>(keys)};
            },
            nb::arg("layout"), nb::arg("pages"), nb::arg("page_tokens"), nb::arg("latent"),
            nb::arg("rope"), nb::arg("values"), nb::arg("scales"), nb::arg("keys"),
            "The tensors of a LatentCache by their addresses; 0 where the layout has none.");
    m.def("attention", &attention, nb::arg("cache"), nb::arg("layer"), nb::arg("heads"), nb::arg("spans"),
          nb::arg("tables"), nb::arg("count"), nb::arg("table_width"), nb::arg("queries"),
          nb::arg("latents"), nb::arg("keys"), nb::arg("output"), nb::arg("threads"),
          nb::call_guard<nb::gil_scoped_release>(), "One layer's attention; attention.h says of what.");
}

}  // namespace intserve
