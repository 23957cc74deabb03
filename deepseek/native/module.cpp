// The extension module `deepseek._native`. deepseek/engine checks every argument before it comes
// here: pointers are addresses of tensors that the caller keeps alive.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <atomic>
#include <stdexcept>

#include "bindings.h"
#include "cpu.h"
#include "team.h"

namespace nb = nanobind;

namespace {

// For tests of the team: `phases` phases of `count` indices, of which each adds its number to the
// sum; index `failing` of phase `failing_phase` throws, and one thread starts late.
int64_t sum_in_phases(int threads, int phases, int64_t count, int late, int failing_phase,
                      int64_t failing) {
    std::atomic<int64_t> total{0};
    intserve::run_team(threads, phases, [&](intserve::Worker& worker) {
        if (worker.thread == late) {
            volatile int64_t work = 0;
            for (int64_t i = 0; i < 20'000'000; ++i) work = work + i;
        }
        for (int phase = 0; phase < phases; ++phase) {
            worker.for_each(count, [&](int64_t index) {
                if (phase == failing_phase && index == failing)
                    throw std::runtime_error("an index fails, as it was asked to");
                // Uneven work, in an order of its own in each phase.
                volatile int64_t work = 0;
                for (int64_t i = 0; i < (index * 7919 + phase) % 97 * 10; ++i) work = work + i;
                total.fetch_add(phase * count + index, std::memory_order_relaxed);
            });
            // The sum of all phases before must be whole: nobody goes on before they are done.
            const int64_t before = phase + 1;
            const int64_t least = before * count * (before * count - 1) / 2;
            if (total.load() < least) throw std::logic_error("a phase ended before its work");
        }
    });
    return total.load();
}

}  // namespace

NB_MODULE(_native, m) {
    // An engine may live until the process ends; that is no leak to tell a user about.
    nb::set_leak_warnings(false);
    m.def("isa", &intserve::isa_name, "Name of the instruction set in use.");
    m.def("available_isas", &intserve::available_isas, "Names of what this CPU has, ascending.");
    m.def("use_isa", &intserve::use_isa, nb::arg("name"));
    m.def("_sum_in_phases", &sum_in_phases, nb::arg("threads"), nb::arg("phases"), nb::arg("count"),
          nb::arg("late") = -1, nb::arg("failing_phase") = -1, nb::arg("failing") = -1,
          nb::call_guard<nb::gil_scoped_release>());
    intserve::bind_linears(m);
    intserve::bind_attention(m);
    intserve::bind_model(m);
}
