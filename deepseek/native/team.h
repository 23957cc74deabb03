// A team of threads that works through one native call.
//
// All threads run the same function (SPMD) inside one OpenMP region and share the work of a phase
// by claiming indices. A phase ends when its work is done, not when every thread has arrived: a
// thread that the operating system holds back finds the phases that it missed finished and goes on,
// and nobody waits for a thread that holds no work.
//
// Rules for the function that a team runs:
// - Every thread calls `for_each` equally often and in the same order. How often may depend on the
//   arguments of the call, never on memory that a phase writes.
// - The count of a phase may depend on memory that an earlier phase wrote. The first thread that
//   arrives fixes it; a late thread may compute another count from memory that has been reused
//   since, and it claims nothing. It may read such memory, so scratch lives until the call ends.
// - Within a phase no index reads what another index of it writes. Code of a single thread is
//   `for_each(1, ...)`.
// - No result depends on which thread ran an index, nor on the number of threads.
// - A body may throw. The rest of the call is skipped, and `run_team` throws the first exception.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <memory>
#include <type_traits>

namespace intserve {

// One phase of a call; a cache line of its own.
struct alignas(64) Phase {
    std::atomic<int64_t> next{0};    // the first index that nobody has claimed
    std::atomic<int64_t> done{0};    // how many indices are done
    std::atomic<int64_t> limit{-1};  // the phase's count, set once
};

// What the threads of one call share.
class Team {
public:
    explicit Team(int max_phases) : phases_(new Phase[max_phases]), max_phases_(max_phases) {}

    Phase& phase(int index);            // throws std::logic_error past `max_phases`
    void fail(std::exception_ptr error) noexcept;
    bool failed() const { return failed_.load(std::memory_order_relaxed); }
    void rethrow() const;               // after the region: throws what `fail` kept

private:
    std::unique_ptr<Phase[]> phases_;
    int max_phases_;
    std::atomic<bool> failed_{false}, kept_{false};
    std::exception_ptr error_;
};

// One thread of a team. `thread` is 0 .. threads - 1, an index for scratch of its own.
class Worker {
public:
    Worker(Team& team, int thread, int threads) : thread(thread), threads(threads), team_(team) {}

    // Share `body(0) ... body(count - 1)` among the threads; returns when all of them are done.
    template <class Body>
    void for_each(int64_t count, Body&& body) {
        Phase& phase = team_.phase(next_phase_++);
        // What a count is read from may not have been written. Whoever passed the phase that failed
        // sees so here.
        if (team_.failed()) return;
        int64_t limit = -1;
        if (phase.limit.compare_exchange_strong(limit, count, std::memory_order_acq_rel))
            limit = count;
        int64_t finished = 0;
        for (;;) {
            const int64_t index = phase.next.fetch_add(1, std::memory_order_relaxed);
            if (index >= limit) break;
            if (!team_.failed()) {
                try {
                    body(index);
                } catch (...) {
                    team_.fail(std::current_exception());
                }
            }
            ++finished;
        }
        if (finished) phase.done.fetch_add(finished, std::memory_order_acq_rel);
        if (phase.done.load(std::memory_order_acquire) != limit) wait(phase, limit);
    }

    const int thread;
    const int threads;  // how many the call asked for; the runtime may have given fewer

private:
    static void wait(const Phase& phase, int64_t limit);

    Team& team_;
    int next_phase_ = 0;
};

// Run `function(worker)` on up to `threads` threads; it may use `max_phases` phases.
// Throws what a thread threw.
void run_team(int threads, int max_phases, void (*function)(Worker&, void*), void* context);

template <class Function>
void run_team(int threads, int max_phases, Function&& function) {
    using Callable = std::remove_reference_t<Function>;
    run_team(
        threads, max_phases,
        [](Worker& worker, void* context) { (*static_cast<Callable*>(context))(worker); },
        const_cast<void*>(static_cast<const void*>(&function)));
}

}  // namespace intserve
