#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstring>

#include "kernels.h"
#include "scratch.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni,avx2,fma,bmi2,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni,avx2,fma,bmi2,f16c")
#endif

namespace moepack {
namespace avx512 {

constexpr const char* ISA_NAME = "avx512";
#include "vec.h"
#include "int8_avx512.h"

static void dot_tile(const Matrix& m, const Activations& a, float* out, int64_t out_stride, int64_t begin, int64_t end) {
    dot_tile_by(m, a, out, out_stride, begin, end,
                [](const Panel& panel, const Activations& a, int64_t group, int64_t end) { multiply_tokens(panel, a, 0, group, end); });
}

#include "isa_body.inl"

}  // namespace avx512
}  // namespace moepack

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
