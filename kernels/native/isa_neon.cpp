#if defined(__aarch64__)
#include <arm_neon.h>

#include <cmath>
#include <cstring>

#include "kernels.h"
#include "scratch.h"

// GCC for arm64 does not give a pragma's target to templates: there, setup.py sets it for this file.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("dotprod"))), apply_to = function)
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
#endif
#endif
