// The threads of the arithmetic: started once, spinning briefly between two pieces of work.
//
//     Pool::get().split(rows, 32, [&](int64_t begin, int64_t end) { ... });
//
// Work is cut into parts, and whichever thread is free takes the next one. Nobody waits for a thread that has not come:
// one that the system has put aside, or a slower core, costs its own share and no more. So that this changes no answer,
// what a part computes must not depend on how the work is cut.
//
// A model's operations follow each other within microseconds, which is less than it takes to wake a thread, so a worker
// spins for a moment before it sleeps: long enough for the next operation, short enough that a wait for the disk leaves
// the core to others.
#pragma once
#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace moepack {

constexpr int SPINS_BEFORE_YIELD = 2000;

inline void spin_once() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("isb");
#endif
}

// Spin until ready() holds, letting others run when it takes long.
template <class Ready> void spin_until(const Ready& ready) {
    for (int spins = 0; !ready(); ++spins) {
        if (spins < SPINS_BEFORE_YIELD) spin_once();
        else std::this_thread::yield();
    }
}

class Pool {
  public:
    static Pool& get();

    // Takes effect at once; not to be called while work runs. At least 1.
    void resize(int threads);
    int size() const { return threads_; }

    // body(begin, end) for parts of [0, count), each of whole grains: large ones first, so that memory is read in long
    // runs, small ones last, so that all threads end together. Small counts stay on the caller. Must not throw.
    template <class Body> void split(int64_t count, int64_t grain, const Body& body) {
        if (threads_ == 1 || count <= grain) return body(int64_t(0), count);
        std::atomic<int64_t> next{0};
        run([&] {
            for (int64_t begin = next.load(); begin < count;) {
                const int64_t grains = std::max((count - begin) / ((threads_ + 1) * grain), int64_t(1));
                const int64_t end = std::min(begin + grains * grain, count);
                if (!next.compare_exchange_weak(begin, end)) continue;
                body(begin, end);
                begin = next.load();
            }
        });
    }

    // task(i) for i in [0, count), begun in this order.
    template <class Task> void each(int64_t count, const Task& task) {
        std::atomic<int64_t> next{0};
        run([&] {
            for (int64_t i; (i = next.fetch_add(1)) < count;) task(i);
        });
    }

  private:
    using Erased = void (*)(const void*);
    Pool() = default;

    // Run work() on the caller and on every worker that comes before the caller is done; ends when all of them are.
    template <class Work> void run(const Work& work) {
        run_erased([](const void* context) { (*static_cast<const Work*>(context))(); }, &work);
    }
    void run_erased(Erased work, const void* context);
    void work_loop(uint64_t seen);
    void start();
    void stop();

    int threads_ = 1;
    std::vector<std::thread> workers_;
    std::mutex callers_;  // one piece of work at a time, whoever asks
    std::mutex sleeping_;
    std::condition_variable wake_;
    std::atomic<int> sleepers_{0};
    // The piece of work: its number, whether a worker may still come to it, how many are at it.
    std::atomic<uint64_t> gate_{0};
    std::atomic<bool> stopping_{false};  // a worker that comes late to a piece of work may look while it is set
    Erased work_ = nullptr;
    const void* context_ = nullptr;
};

}  // namespace moepack
