#if defined(__aarch64__)
#include <arm_neon.h>

#include <cmath>
#include <cstring>

#include "kernels.h"
#include "scratch.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("dotprod"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("+dotprod")
#endif

namespace moepack {
namespace neon {

constexpr const char* ISA_NAME = "neon";
#include "vec.h"
#include "int8_neon.h"
#include "isa_body.inl"

}  // namespace neon
}  // namespace moepack

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
