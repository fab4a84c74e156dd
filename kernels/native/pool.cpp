#include "pool.h"

#include <pthread.h>

#include <system_error>

namespace moepack {

namespace {

constexpr int SPINS_BEFORE_SLEEP = 20000;  // about 0.3 ms: the longest pause between two operations of a token
constexpr int SPINS_BEFORE_YIELD = 2000;

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("isb");
#endif
}

// Spin until ready() holds, letting others run when it takes long.
template <class Ready> void spin_until(const Ready& ready) {
    for (int spins = 0; !ready(); ++spins) {
        if (spins < SPINS_BEFORE_YIELD) pause();
        else std::this_thread::yield();
    }
}

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
        for (int thread = 1; thread < threads_; ++thread) workers_.emplace_back(&Pool::work_loop, this, thread, round_.load());
    } catch (const std::system_error&) {  // the system gives no more: go on with those that there are
        threads_ = int(workers_.size()) + 1;
    }
}

void Pool::stop() {
    stopping_ = true;
    {
        std::lock_guard<std::mutex> lock(sleeping_);
        round_.fetch_add(1);
        wake_.notify_all();
    }
    for (std::thread& worker : workers_) worker.join();
    workers_.clear();
    stopping_ = false;
}

void Pool::run_erased(Erased work, const void* context) {
    std::lock_guard<std::mutex> lock(callers_);
    if (threads_ == 1) {
        work(context, 0, 1);
        return;
    }
    work_ = work;
    context_ = context;
    unfinished_.store(threads_ - 1);
    round_.fetch_add(1);
    if (sleepers_.load() > 0) {
        std::lock_guard<std::mutex> sleeping(sleeping_);
        wake_.notify_all();
    }
    work(context, 0, threads_);
    spin_until([this] { return unfinished_.load(std::memory_order_acquire) == 0; });
}

void Pool::work_loop(int thread, uint32_t seen) {
    for (;;) {
        for (int spins = 0; round_.load(std::memory_order_acquire) == seen; ++spins) {
            if (spins < SPINS_BEFORE_SLEEP) {
                pause();
                continue;
            }
            std::unique_lock<std::mutex> lock(sleeping_);
            sleepers_.fetch_add(1);
            wake_.wait(lock, [&] { return round_.load() != seen; });
            sleepers_.fetch_sub(1);
        }
        ++seen;
        if (stopping_.load()) return;
        work_(context_, thread, threads_);
        unfinished_.fetch_sub(1, std::memory_order_release);
    }
}

void Pool::barrier() {
    if (threads_ == 1) return;
    const uint32_t round = barrier_round_.load();
    if (arrived_.fetch_add(1) + 1 == threads_) {
        arrived_.store(0);
        barrier_round_.fetch_add(1);
        return;
    }
    spin_until([&] { return barrier_round_.load(std::memory_order_acquire) != round; });
}

}  // namespace moepack
