// What each file of bindings adds to the module.
#pragma once

#include <nanobind/nanobind.h>

namespace intserve {

void bind_linears(nanobind::module_& m);  // bind_linears.cpp
void bind_attention(nanobind::module_& m);  // bind_attention.cpp
void bind_model(nanobind::module_& m);  // bind_model.cpp

}  // namespace intserve
