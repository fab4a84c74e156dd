// Picks the instruction set: the best that this processor has, or the one that a test asks for.
#include <atomic>
#include <cstring>
#include <vector>

#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/auxv.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace moepack {

#if defined(__x86_64__)
namespace amx { extern const Kernels KERNELS; }
namespace avx512 { extern const Kernels KERNELS; }
namespace avx2 { extern const Kernels KERNELS; }
#elif defined(__aarch64__)
namespace neon { extern const Kernels KERNELS; }
#endif
namespace portable { extern const Kernels KERNELS; }

namespace {

struct Choice {
    const Kernels* kernels;
    bool available;
};

#if defined(__x86_64__)
// The system must be asked before the first use of a tile: its registers are 8 KiB more of every thread's state.
bool may_use_amx() {
#if defined(__linux__)
    constexpr int REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    unsigned a, b, c, d;
    constexpr unsigned AMX_TILE = 1u << 24, AMX_INT8 = 1u << 25;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (AMX_TILE | AMX_INT8)) != (AMX_TILE | AMX_INT8)) return false;
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
    return false;
#endif
}
#endif

#if defined(__aarch64__)
// Every processor of Apple's has it; of the others, those from ARMv8.2 on.
bool has_dot_product() {
#if defined(__linux__)
    constexpr unsigned long ASIMDDP = 1ul << 20;  // HWCAP_ASIMDDP
    return getauxval(AT_HWCAP) & ASIMDDP;
#else
    return true;
#endif
}
#endif

// Best first.
std::vector<Choice> choices() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni");
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    return {{&amx::KERNELS, avx512 && may_use_amx()}, {&avx512::KERNELS, avx512}, {&avx2::KERNELS, avx2}, {&portable::KERNELS, true}};
#elif defined(__aarch64__)
    return {{&neon::KERNELS, has_dot_product()}, {&portable::KERNELS, true}};
#else
    return {{&portable::KERNELS, true}};
#endif
}

std::atomic<const Kernels*> chosen{nullptr};

}  // namespace

const Kernels& kernels() {
    const Kernels* current = chosen.load(std::memory_order_acquire);
    if (current) return *current;
    for (const Choice& choice : choices()) {
        if (!choice.available) continue;
        chosen.store(choice.kernels, std::memory_order_release);
        return *choice.kernels;
    }
    __builtin_unreachable();  // portable is always available
}

}  // namespace moepack

// The set in use.
API const char* moepack_isa() { return moepack::kernels().name; }

// Use another set from now on; 0 if this processor does not have it, 1 if it is done.
API int moepack_set_isa(const char* name) {
    for (const moepack::Choice& choice : moepack::choices()) {
        if (!choice.available || strcmp(choice.kernels->name, name) != 0) continue;
        moepack::chosen.store(choice.kernels, std::memory_order_release);
        return 1;
    }
    return 0;
}
