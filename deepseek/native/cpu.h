// Which instruction set the kernels of this process use.
#pragma once

#include <string>
#include <vector>

namespace intserve {

// In ascending order: each CPU has all up to its best. The names are those of the namespaces.
enum class Isa { portable, avx2, avx512, avx512bf16 };

// The names of what this CPU has, ascending.
std::vector<std::string> available_isas();

// The one in use: the best that this CPU has, or what the environment's INTSERVE_ISA names.
// Throws std::invalid_argument for a value that is unknown or that this CPU does not have.
Isa isa();
std::string isa_name();

// Use another one from now on, "" for the default. Throws as `isa` does. Not while a call runs.
void use_isa(const std::string& name);

}  // namespace intserve

// Declare the tables of kernels `NAME` of type `TABLE`, one in the namespace of each instruction
// set, and `TABLE NAME()` of namespace intserve, which returns the one in use. To be used outside
// of any namespace; the kernel's source defines `extern const TABLE NAME = {...};` in
// `intserve::INTSERVE_ISA`.
#if defined(__x86_64__)
#define INTSERVE_KERNEL_TABLES(TABLE, NAME)                        \
    namespace intserve::portable { extern const TABLE NAME; }      \
    namespace intserve::avx2 { extern const TABLE NAME; }          \
    namespace intserve::avx512 { extern const TABLE NAME; }        \
    namespace intserve::avx512bf16 { extern const TABLE NAME; }    \
    namespace intserve {                                           \
    inline const TABLE& NAME() {                                   \
        switch (isa()) {                                           \
            case Isa::avx512bf16: return avx512bf16::NAME;         \
            case Isa::avx512: return avx512::NAME;                 \
            case Isa::avx2: return avx2::NAME;                     \
            default: return portable::NAME;                        \
        }                                                          \
    }                                                              \
    }
#else
#define INTSERVE_KERNEL_TABLES(TABLE, NAME)                   \
    namespace intserve::portable { extern const TABLE NAME; } \
    namespace intserve {                                      \
    inline const TABLE& NAME() { return portable::NAME; }     \
    }
#endif
