#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstring>

#include "kernels.h"
#include "scratch.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,bmi2,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi2,f16c")
#endif

namespace moepack {
namespace avx2 {

constexpr const char* ISA_NAME = "avx2";
#include "vec.h"
#include "int8_avx2.h"
#include "isa_body.inl"

}  // namespace avx2
}  // namespace moepack

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
