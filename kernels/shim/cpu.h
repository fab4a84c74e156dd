// The Metal Shading Language on the executor of simt.h.
#pragma once
#include <math.h>
#include <string.h>

#include "simt.h"

#define MSL_FUNCTION inline __attribute__((always_inline))
#define MSL_NOINLINE __attribute__((noinline))
#include "types.h"

namespace metal {

template <class T>
MSL_FUNCTION uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= 8, "simdgroup operations take values of up to 8 bytes");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <class T>
MSL_FUNCTION T from_bits(uint64_t bits) {
  T value;
  memcpy(&value, &bits, sizeof(T));
  return value;
}

template <class T>
__attribute__((noinline)) SIMT_UNCHECKED T simd_shuffle(T value, ushort lane) {
  return from_bits<T>(simt_exchange(to_bits(value), SIMT_SHUFFLE)[lane % SIMT_LANES]);
}

template <class T>
T simd_shuffle_xor(T value, ushort mask) {
  return simd_shuffle(value, ushort(simt_here().lane ^ mask));
}

// All lanes' values joined two by two, as butterfly shuffles join them: the same bits in every lane.
template <class T, class Join>
__attribute__((noinline)) SIMT_UNCHECKED T simd_reduce(T value, simt_operation operation, Join join) {
  const uint64_t* bits = simt_exchange(to_bits(value), operation);
  T values[SIMT_LANES];
  for (int i = 0; i < SIMT_LANES; i++) values[i] = from_bits<T>(bits[i]);
  for (int half = SIMT_LANES / 2; half; half /= 2) {
    for (int i = 0; i < half; i++) values[i] = join(values[i], values[i + half]);
  }
  return values[0];
}

template <class T>
T simd_sum(T value) {
  return simd_reduce(value, SIMT_SUM, [](T a, T b) { return a + b; });
}

template <class T>
T simd_max(T value) {
  return simd_reduce(value, SIMT_MAX, [](T a, T b) { return max(a, b); });
}

template <class T>
T simd_min(T value) {
  return simd_reduce(value, SIMT_MIN, [](T a, T b) { return min(a, b); });
}

inline void threadgroup_barrier(mem_flags flags) { simt_wait(SIMT_BARRIER, flags != mem_flags::mem_none); }
inline void simdgroup_barrier(mem_flags flags) { simt_wait(SIMT_SIMD_BARRIER, flags != mem_flags::mem_none); }

// What shim/cuda.h has for the kernels of cuda/: one launch follows the other here.
inline void launch_next() {}
inline void wait_for_last() {}
inline void perform(const simt_copy& copy) {
  for (uint word = 0; word < copy.words; word++) ((uint*)copy.to)[word] = ((const uint*)copy.from)[word];
}
MSL_FUNCTION void begin_copy(void* to, const void* from, uint size_bytes) {
  if ((size_t(to) | size_t(from)) % size_bytes) __builtin_trap();  // the instruction wants them so
  const simt_copy copy = {to, from, size_bytes / 4};
  if (simt_begin_copy(copy)) perform(copy);
}
MSL_FUNCTION void copy_four(void* to, const void* from) { begin_copy(to, from, 4); }
MSL_FUNCTION void copy_eight(void* to, const void* from) { begin_copy(to, from, 8); }
MSL_FUNCTION void copy_sixteen(void* to, const void* from) { begin_copy(to, from, 16); }
inline void wait_for_copies() {
  const simt_copy* copies;
  const uint count = simt_take_copies(&copies);
  for (uint i = 0; i < count; i++) perform(copies[i]);
}
template <class T>
T load_once(const T* from) {
  return *from;
}
inline uint4 load_early(const uint4* from) { return *from; }
inline float max_magnitude(float a, float b) { return fmaxf(a, fabsf(b)); }
inline uint permute_bytes(uint a, uint b, uint selector) {
  const uint64_t bytes = uint64_t(b) << 32 | a;
  uint result = 0;
  for (int i = 0; i < 4; i++) result |= uint(bytes >> (selector >> 4 * i & 7u) * 8 & 0xffu) << 8 * i;
  return result;
}
MSL_FUNCTION void simdgroup_multiply_bytes(int* sums, const uint* a, const uint* b) { simt_multiply_bytes(sums, a, b); }

MSL_FUNCTION void simdgroup_multiply_halves(float* sums, const uint* a, const uint* b) { simt_multiply_halves(sums, a, b); }
MSL_FUNCTION void simdgroup_multiply_tf32(float* sums, const uint* a, const uint* b) { simt_multiply_tf32(sums, a, b); }

// To the nearest half, of two as near the even one.
inline uint round_to_half(float value) {
  const uint bits = as_type<uint>(value), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return sign | 0x7fffu;
  if (magnitude >= 0x477ff000u) return sign | 0x7c00u;
  if (magnitude < 0x38800000u) return sign | uint(lrintf(as_type<float>(magnitude) * 0x1p24f));  // below 2^-14
  return sign | (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
}
inline uint pack_halves(float first, float second) { return round_to_half(second) << 16 | round_to_half(first); }
inline float first_half(uint both) { return as_type<half>(ushort(both)); }
inline float second_half(uint both) { return as_type<half>(ushort(both >> 16)); }

MSL_FUNCTION unsigned msl_lane() { return simt_here().lane; }

}  // namespace metal

#include "simdgroup_matrix.h"

namespace metal {

MSL_FUNCTION void simdgroup_multiply_accumulate(simdgroup_float8x8& to, const simdgroup_float8x8& a,
    const simdgroup_float8x8& b, const simdgroup_float8x8& c) {
  const simdgroup_float8x8 left = a, right = b, sum = c;  // to may be one of them
  simt_multiply(to.elements, left.elements, right.elements, sum.elements);
}

}  // namespace metal

#include "names.h"
