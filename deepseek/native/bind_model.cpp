// Bindings of the model (model.h): deepseek/engine/native.py calls them. Addresses come as integers.
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>

#include "bindings.h"
#include "model.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace intserve {

namespace {

using Linears = std::vector<Linear>;

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

Mlp mlp_of(const std::pair<Linears, Linears>& given) {
    return {Projection{given.first}, Projection{given.second}};
}

void add_layer(Model& model, uintptr_t input_norm, uintptr_t output_norm, uintptr_t query_norm,
               uintptr_t latent_norm, Linears qkv_a, Linears q_b, Linears w_uk, Linears w_uv,
               uintptr_t key_scale, Linears output, uintptr_t router, uintptr_t bias,
               const std::vector<std::pair<Linears, Linears>>& experts,
               const std::pair<Linears, Linears>& mlp) {
    Layer layer;
    layer.input_norm = at<const float>(input_norm);
    layer.output_norm = at<const float>(output_norm);
    layer.query_norm = at<const float>(query_norm);
    layer.latent_norm = at<const float>(latent_norm);
    layer.qkv_a = {std::move(qkv_a)};
    layer.q_b = {std::move(q_b)};
    layer.output = {std::move(output)};
    layer.w_uk = std::move(w_uk);
    layer.w_uv = std::move(w_uv);
    layer.key_scale = at<const float>(key_scale);
    layer.router = at<const float>(router);
    layer.bias = at<const float>(bias);
    for (const auto& expert : experts) layer.experts.push_back(mlp_of(expert));
    layer.mlp = mlp_of(mlp);
    model.add_layer(std::move(layer));
}

}  // namespace

void bind_model(nb::module_& m) {
    nb::class_<Model>(m, "Model")
        .def(
            "__init__",
            [](Model* self, int64_t hidden, int64_t vocabulary, int64_t heads, int64_t query_rank,
               int64_t latent, int64_t nope, int64_t rope, int64_t value, int64_t experts,
               int64_t chosen, int64_t groups, int64_t chosen_groups, bool normalizes,
               float routed_scale, float eps, float softmax_scale, float amplitude,
               uintptr_t frequencies) {
                const RouterShape router{experts, groups,     chosen_groups,
                                         chosen,  normalizes, routed_scale};
                new (self) Model({hidden, vocabulary, heads, query_rank, latent, nope, rope, value,
                                  router, eps, softmax_scale, amplitude,
                                  at<const float>(frequencies)});
            },
            nb::kw_only(), "hidden"_a, "vocabulary"_a, "heads"_a, "query_rank"_a, "latent"_a,
            "nope"_a, "rope"_a, "value"_a, "experts"_a, "chosen"_a, "groups"_a, "chosen_groups"_a,
            "normalizes"_a, "routed_scale"_a, "eps"_a, "softmax_scale"_a, "amplitude"_a,
            "frequencies"_a)
        .def("set_embedding",
             [](Model& model, uintptr_t table, bool is_bf16) {
                 model.set_embedding(at<const void>(table), is_bf16);
             })
        .def("set_norm",
             [](Model& model, uintptr_t norm) { model.set_norm(at<const float>(norm)); })
        .def("set_head", &Model::set_head)
        .def_prop_ro("seconds",
                     [](const Model& model) {
                         nb::dict seconds;
                         for (int part = 0; part < kParts; ++part)
                             seconds[kPartNames[part]] = model.seconds()[part];
                         return seconds;
                     })
        .def("add_layer", &add_layer, nb::kw_only(), "input_norm"_a, "output_norm"_a,
             "query_norm"_a, "latent_norm"_a, "qkv_a"_a, "q_b"_a, "w_uk"_a, "w_uv"_a, "key_scale"_a,
             "output"_a, "router"_a, "bias"_a, "experts"_a, "mlp"_a)
        .def(
            "forward",
            [](Model& model, uintptr_t tokens, uintptr_t spans, uintptr_t pages, int64_t num_tokens,
               int64_t num_spans, int64_t table_width, const CacheView& cache, uintptr_t hidden,
               int threads) {
                const Step step{at<const int64_t>(tokens), at<const int32_t>(spans),
                                at<const int32_t>(pages),  num_tokens,
                                num_spans,                 table_width,
                                cache};
                nb::gil_scoped_release release;
                model.forward(step, at<float>(hidden), threads);
            },
            nb::kw_only(), "tokens"_a, "spans"_a, "pages"_a, "num_tokens"_a, "num_spans"_a,
            "table_width"_a, "cache"_a, "hidden"_a, "threads"_a)
        .def(
            "logits",
            [](Model& model, uintptr_t hidden, int64_t rows, uintptr_t logits, int threads) {
                nb::gil_scoped_release release;
                model.logits(at<const float>(hidden), rows, at<float>(logits), threads);
            },
            nb::kw_only(), "hidden"_a, "rows"_a, "logits"_a, "threads"_a);
}

}  // namespace intserve
