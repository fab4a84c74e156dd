// The Metal Shading Language on CUDA: a simdgroup is a warp. For NVRTC, which has no headers of its own.
#pragma once
#ifndef INFINITY
#define INFINITY __int_as_float(0x7f800000)
#endif

#define MSL_FUNCTION __device__ __forceinline__
#include "types.h"

namespace metal {

constexpr uint ALL_LANES = 0xffffffffu;

template <class T>
MSL_FUNCTION T simd_shuffle(T value, ushort lane) {
  return __shfl_sync(ALL_LANES, value, lane);
}

template <class T>
MSL_FUNCTION T simd_shuffle_xor(T value, ushort mask) {
  return __shfl_xor_sync(ALL_LANES, value, mask);
}

template <class T>
MSL_FUNCTION T simd_sum(T value) {
  for (int mask = 16; mask; mask /= 2) value = value + simd_shuffle_xor(value, mask);
  return value;
}

template <class T>
MSL_FUNCTION T simd_max(T value) {
  for (int mask = 16; mask; mask /= 2) value = max(value, simd_shuffle_xor(value, mask));
  return value;
}

template <class T>
MSL_FUNCTION T simd_min(T value) {
  for (int mask = 16; mask; mask /= 2) value = min(value, simd_shuffle_xor(value, mask));
  return value;
}

MSL_FUNCTION void threadgroup_barrier(mem_flags) { __syncthreads(); }  // orders all memory of the threadgroup
MSL_FUNCTION void simdgroup_barrier(mem_flags) { __syncwarp(); }

MSL_FUNCTION uint msl_lane() { return threadIdx.x % 32; }

// What each kernel begins with: the next one may get ready now, and this one waits until the last has ended.
MSL_FUNCTION void msl_take_turn() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace metal

#include "simdgroup_matrix.h"

namespace metal {

// By shuffles, in float32: right, not fast. Matrix units of NVIDIA's have other shapes.
MSL_FUNCTION void simdgroup_multiply_accumulate(
    simdgroup_float8x8& to, const simdgroup_float8x8& a, const simdgroup_float8x8& b, const simdgroup_float8x8& c) {
  const uint lane = msl_lane();
  float first = c.elements[0], second = c.elements[1];
  for (uint k = 0; k < 8; k++) {
    const float even = simd_shuffle(a.elements[0], lane / 4 * 4 + k / 2);
    const float odd = simd_shuffle(a.elements[1], lane / 4 * 4 + k / 2);
    const float left = k % 2 ? odd : even;
    first = fma(left, simd_shuffle(b.elements[0], k * 4 + lane % 4), first);
    second = fma(left, simd_shuffle(b.elements[1], k * 4 + lane % 4), second);
  }
  to.elements[0] = first;
  to.elements[1] = second;
}

}  // namespace metal

#include "names.h"
