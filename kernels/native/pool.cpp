#include "pool.h"

#include <pthread.h>

#include <system_error>

namespace moepack {

namespace {

constexpr int SPINS_BEFORE_SLEEP = 20000;  // about 0.3 ms: the longest pause between two operations of a token

constexpr uint64_t ROUND = uint64_t(1) << 32, OPEN = uint64_t(1) << 31;  // of the gate; below: the workers inside

uint64_t round_of(uint64_t gate) { return gate / ROUND; }

Pool* instance = nullptr;

}  // namespace

Pool& Pool::get() {
    static std::once_flag once;
    std::call_once(once, [] {
        instance = new Pool;  // never destroyed: workers may outlive static destructors
        // A forked child has no workers: it starts anew, with one thread until it asks for more.
        pthread_atfork(nullptr, nullptr, [] { instance = new Pool; });
    });
    return *instance;
}

void Pool::resize(int threads) {
    std::lock_guard<std::mutex> lock(callers_);
    if (threads == threads_) return;
    stop();
    threads_ = threads < 1 ? 1 : threads;
    start();
}

void Pool::start() {
    try {
        for (int worker = 1; worker < threads_; ++worker) workers_.emplace_back(&Pool::work_loop, this, round_of(gate_.load()));
    } catch (const std::system_error&) {  // the system gives no more: go on with those that there are
        threads_ = int(workers_.size()) + 1;
    }
}

void Pool::stop() {
    stopping_ = true;
    {
        std::lock_guard<std::mutex> lock(sleeping_);
        gate_.fetch_add(ROUND);
        wake_.notify_all();
    }
    for (std::thread& worker : workers_) worker.join();
    workers_.clear();
    stopping_ = false;
}

void Pool::run_erased(Erased work, const void* context) {
    std::lock_guard<std::mutex> lock(callers_);
    if (threads_ == 1) return work(context);
    work_ = work;
    context_ = context;
    gate_.fetch_add(ROUND | OPEN);
    if (sleepers_.load() > 0) {
        std::lock_guard<std::mutex> sleeping(sleeping_);
        wake_.notify_all();
    }
    work(context);
    gate_.fetch_sub(OPEN);
    spin_until([this] { return gate_.load() % OPEN == 0; });
}

void Pool::work_loop(uint64_t seen) {
    for (;;) {
        for (int spins = 0; round_of(gate_.load()) == seen; ++spins) {
            if (spins < SPINS_BEFORE_SLEEP) {
                spin_once();
                continue;
            }
            std::unique_lock<std::mutex> lock(sleeping_);
            sleepers_.fetch_add(1);
            wake_.wait(lock, [&] { return round_of(gate_.load()) != seen; });
            sleepers_.fetch_sub(1);
        }
        uint64_t gate = gate_.load();
        seen = round_of(gate);
        if (stopping_) return;
        bool entered = false;
        while (!entered && (gate & OPEN) && round_of(gate) == seen) entered = gate_.compare_exchange_weak(gate, gate + 1);
        if (!entered) continue;
        work_(context_);
        gate_.fetch_sub(1);
    }
}

}  // namespace moepack
