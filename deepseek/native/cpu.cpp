// Asking the CPU, and the environment (cpu.h).
#include "cpu.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace intserve {

namespace {

const char* const kNames[] = {"portable", "avx2", "avx512", "avx512bf16"};

Isa best() {
#if defined(__x86_64__)
    // These ask the operating system too, whether it keeps the wide registers.
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") ||
        !__builtin_cpu_supports("f16c"))
        return Isa::portable;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl") ||
        !__builtin_cpu_supports("avx512vnni"))
        return Isa::avx2;
    return __builtin_cpu_supports("avx512bf16") ? Isa::avx512bf16 : Isa::avx512;
#else
    return Isa::portable;
#endif
}

Isa by_name(const std::string& name, const std::string& source) {
    std::string known;
    for (int i = 0; i <= static_cast<int>(best()); ++i) {
        if (name == kNames[i]) return static_cast<Isa>(i);
        known += (i ? ", " : "") + std::string(kNames[i]);
    }
    throw std::invalid_argument(source + " is '" + name + "'; this CPU has " + known);
}

Isa from_environment() {
    const char* name = std::getenv("INTSERVE_ISA");
    return name && *name ? by_name(name, "INTSERVE_ISA") : best();
}

std::atomic<int> chosen{-1};

}  // namespace

std::vector<std::string> available_isas() {
    return {kNames, kNames + static_cast<int>(best()) + 1};
}

Isa isa() {
    int now = chosen.load(std::memory_order_relaxed);
    if (now < 0) chosen.store(now = static_cast<int>(from_environment()));
    return static_cast<Isa>(now);
}

std::string isa_name() { return kNames[static_cast<int>(isa())]; }

void use_isa(const std::string& name) {
    chosen.store(static_cast<int>(name.empty() ? from_environment() : by_name(name, "the name")));
}

}  // namespace intserve
