// The threads of the arithmetic: started once, given one piece of work at a time, spinning briefly between two.
//
//     Pool::get().run([&](int thread, int threads) { ... });
//
// The caller is thread 0. A model's operations follow each other within microseconds, which is less than it takes to
// wake a thread, so a worker spins for a moment before it sleeps: long enough for the next operation, short enough
// that a wait for the disk leaves the core to others.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace moepack {

class Pool {
  public:
    static Pool& get();

    // Takes effect at once; not to be called while work runs. At least 1.
    void resize(int threads);
    int size() const { return threads_; }

    // Run work(thread, threads) on every thread; returns when all are done. Work must not throw.
    template <class Work> void run(const Work& work) {
        run_erased([](const void* context, int thread, int threads) { (*static_cast<const Work*>(context))(thread, threads); },
                   &work);
    }

    // Run body(begin, end) over [0, count), cut into one run of whole grains per thread; small counts stay on the caller.
    template <class Body> void split(int64_t count, int64_t grain, const Body& body) {
        if (threads_ == 1 || count <= grain) {
            body(int64_t(0), count);
            return;
        }
        run([&](int thread, int threads) {
            const int64_t begin = share(count, grain, thread, threads), end = share(count, grain, thread + 1, threads);
            if (begin < end) body(begin, end);
        });
    }

    // Inside work: wait until every thread is here.
    void barrier();

    // Where a thread's share of count items begins, in whole grains.
    static int64_t share(int64_t count, int64_t grain, int thread, int threads) {
        const int64_t grains = (count + grain - 1) / grain, begin = grains * thread / threads * grain;
        return begin < count ? begin : count;
    }

  private:
    using Erased = void (*)(const void*, int, int);
    Pool() = default;
    void run_erased(Erased work, const void* context);
    void work_loop(int thread, uint32_t seen);
    void start();
    void stop();

    int threads_ = 1;
    std::vector<std::thread> workers_;
    std::mutex callers_;  // one piece of work at a time, whoever asks
    std::mutex sleeping_;
    std::condition_variable wake_;
    std::atomic<uint32_t> round_{0};  // counts pieces of work
    std::atomic<int> sleepers_{0};
    std::atomic<int> unfinished_{0};
    std::atomic<int> arrived_{0};  // at the barrier
    std::atomic<uint32_t> barrier_round_{0};
    std::atomic<bool> stopping_{false};
    Erased work_ = nullptr;
    const void* context_ = nullptr;
};

}  // namespace moepack
