// What each file of bindings adds to the module.
#pragma once

#include <nanobind/nanobind.h>

namespace intserve {

void bind_linears(nanobind::module_& m);  // bind_linears.cpp

}  // namespace intserve
