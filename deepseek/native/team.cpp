// Waiting, failing and starting of a team (team.h).
#include "team.h"

#include <sched.h>

#include <stdexcept>

namespace intserve {

namespace {

// About a few microseconds: the length of a short phase. Longer waits mean that the thread that
// holds the work may need this core.
constexpr int kSpins = 256;

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

}  // namespace

Phase& Team::phase(int index) {
    if (index >= max_phases_)
        throw std::logic_error("a native call has more phases than it announced");
    return phases_[index];
}

void Team::fail(std::exception_ptr error) noexcept {
    if (!kept_.exchange(true)) error_ = error;
    failed_.store(true, std::memory_order_release);
}

void Team::rethrow() const {
    if (kept_.load()) std::rethrow_exception(error_);
}

void Worker::wait(const Phase& phase, int64_t limit) {
    for (int spin = 0; spin < kSpins; ++spin) {
        if (phase.done.load(std::memory_order_acquire) == limit) return;
        pause();
    }
    while (phase.done.load(std::memory_order_acquire) != limit) sched_yield();
}

void run_team(int threads, int max_phases, void (*function)(Worker&, void*), void* context) {
    if (threads < 1) throw std::invalid_argument("a team needs at least one thread");
    Team team(max_phases);
    int next_thread = 0;
#pragma omp parallel num_threads(threads) default(none) shared(team, next_thread) \
    firstprivate(function, context, threads)
    {
        int thread;
#pragma omp atomic capture
        thread = next_thread++;
        try {
            Worker worker(team, thread, threads);
            function(worker, context);
        } catch (...) {
            team.fail(std::current_exception());
        }
    }
    team.rethrow();
}

}  // namespace intserve
