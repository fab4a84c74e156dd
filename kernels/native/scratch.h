// Memory that a thread keeps between calls, so that no operation allocates after its first use.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace moepack {

// A buffer aligned to a cache line that only grows.
class Scratch {
  public:
    Scratch() = default;
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    ~Scratch() { free(memory_); }

    template <class T> T* get(int64_t count) {
        const size_t wanted = (size_t(count) * sizeof(T) + 63) / 64 * 64;
        if (wanted > size_bytes_) {
            free(memory_);
            memory_ = aligned_alloc(64, wanted);
            if (!memory_) abort();  // as the allocator of the caller would: nothing here can go on
            size_bytes_ = wanted;
        }
        return static_cast<T*>(memory_);
    }

  private:
    void* memory_ = nullptr;
    size_t size_bytes_ = 0;
};

}  // namespace moepack
