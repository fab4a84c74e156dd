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

}  // namespace metal

#include "names.h"
