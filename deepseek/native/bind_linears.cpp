// Bindings of the linears (linear.h), for tests and for the model that is built from Python.
// What comes here is checked before: addresses, shapes and types.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>

#include "bindings.h"
#include "linear.h"

namespace nb = nanobind;

namespace intserve {

namespace {

// The format of a scheme's label (deepseek/recipe.py): int8-a8, int4-asym-g128, int4-g32-a8, ...
// Unquantized weights and FP8 tiles are held in BF16.
Format format_of(const std::string& label) {
    const auto ends = [&](const std::string& end) {
        return label.size() >= end.size() &&
               label.compare(label.size() - end.size(), end.size(), end) == 0;
    };
    if (label == "bf16" || label == "fp8-block") return Format::bf16;
    if (label == "int8") return Format::int8;
    if (label == "int8-asym") return Format::int8_asym;
    if (label == "int8-a8") return Format::int8_a8;
    if (label == "int8-block-a8") return Format::int8_block;
    if (label.rfind("int4-", 0) == 0)
        return ends("-afp8") ? Format::int4_fp8 : ends("-a8") ? Format::int4_a8 : Format::int4;
    throw std::invalid_argument("there is no native linear for the scheme '" + label + "'");
}

struct Free {
    void operator()(void* memory) const { std::free(memory); }
};

// The product of all rows of an input.
struct BoundGemm {
    const Linear* weight;
    const Encoded* input;
    int64_t rows;
    uintptr_t out;
};

// Encoded inputs in memory of their own.
struct BoundEncoded : Encoded {
    std::unique_ptr<void, Free> memory;
};

std::unique_ptr<BoundEncoded> encode(const std::string& encoding, uintptr_t x, int64_t rows,
                                     int64_t inputs, float input_scale, int threads) {
    const char* const names[] = {"bf16", "int8", "int8-tiles", "fp8"};
    int index = 0;
    while (index < 4 && encoding != names[index]) ++index;
    if (index == 4) throw std::invalid_argument("there is no encoding '" + encoding + "'");
    const Encoding kind = static_cast<Encoding>(index);
    auto encoded = std::make_unique<BoundEncoded>();
    encoded->memory.reset(std::aligned_alloc(64, Encoded::bytes(kind, rows, inputs) + 64));
    if (!encoded->memory) throw std::bad_alloc();
    static_cast<Encoded&>(*encoded) = Encoded::place(kind, rows, inputs, encoded->memory.get());
    encode_kernels().encode(threads, reinterpret_cast<const float*>(x), rows, input_scale, *encoded);
    return encoded;
}

Gemm gemm_of(const BoundGemm& bound) {
    const Linear& weight = *bound.weight;
    if (bound.input->encoding != weight.encoding() || bound.input->inputs != weight.inputs)
        throw std::invalid_argument("the input is not encoded as the linear reads it");
    return {bound.weight, *bound.input, bound.rows, reinterpret_cast<float*>(bound.out),
            weight.outputs};
}

void run(const std::vector<BoundGemm>& bound, int threads) {
    std::vector<Gemm> gemms;
    for (const BoundGemm& one : bound) gemms.push_back(gemm_of(one));
    std::vector<int64_t> first(gemms.size());
    GemmList list{gemms.data(), static_cast<int64_t>(gemms.size()), first.data(), 0, 0};
    linear_kernels().gemms(threads, list);
}

}  // namespace

void bind_linears(nb::module_& m) {
    nb::class_<Linear>(m, "Linear")
        .def(
            "__init__",
            [](Linear* self, const std::string& format, int64_t outputs, int64_t inputs,
               int64_t group, uintptr_t weight, uintptr_t scale, uintptr_t zero_point, float input_scale) {
                new (self) Linear{format_of(format),
                                  outputs,
                                  inputs,
                                  group,
                                  reinterpret_cast<const uint8_t*>(weight),
                                  reinterpret_cast<const uint8_t*>(scale),
                                  reinterpret_cast<const uint8_t*>(zero_point),
                                  input_scale};
            },
            nb::kw_only(), nb::arg("format"), nb::arg("outputs"), nb::arg("inputs"),
            nb::arg("group"), nb::arg("weight"), nb::arg("scale"), nb::arg("zero_point"),
            nb::arg("input_scale"))
        .def_ro("outputs", &Linear::outputs)
        .def_ro("inputs", &Linear::inputs);
    nb::class_<BoundEncoded>(m, "Encoded")
        .def_prop_ro("data", [](const BoundEncoded& e) { return reinterpret_cast<uintptr_t>(e.data); })
        .def_prop_ro("scale", [](const BoundEncoded& e) { return reinterpret_cast<uintptr_t>(e.scale); })
        .def_prop_ro("sums", [](const BoundEncoded& e) { return reinterpret_cast<uintptr_t>(e.sums); })
        .def_prop_ro("total", [](const BoundEncoded& e) { return reinterpret_cast<uintptr_t>(e.total); })
        .def_ro("padded", &BoundEncoded::padded);
    nb::class_<BoundGemm>(m, "Gemm")
        .def(
            "__init__",
            [](BoundGemm* self, const Linear& weight, const BoundEncoded& input, int64_t rows,
               uintptr_t out) { new (self) BoundGemm{&weight, &input, rows, out}; },
            nb::keep_alive<1, 2>(), nb::keep_alive<1, 3>(), nb::kw_only(), nb::arg("weight"),
            nb::arg("input"), nb::arg("rows"), nb::arg("out"));
    m.def("encode", &encode, nb::arg("encoding"), nb::arg("x"), nb::arg("rows"), nb::arg("inputs"),
          nb::arg("input_scale"), nb::arg("threads"), nb::call_guard<nb::gil_scoped_release>());
    m.def("run_gemms", &run, nb::arg("gemms"), nb::arg("threads"),
          nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace intserve
