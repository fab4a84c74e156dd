// The Metal Shading Language on CUDA: a simdgroup is a warp. For NVRTC, which has no headers of its own.
#pragma once
#ifndef INFINITY
#define INFINITY __int_as_float(0x7f800000)
#endif

#define MSL_FUNCTION __device__ __forceinline__
#define MSL_NOINLINE __device__ __noinline__
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

MSL_FUNCTION uint simd_max(uint value) { return __reduce_max_sync(ALL_LANES, value); }
MSL_FUNCTION uint simd_min(uint value) { return __reduce_min_sync(ALL_LANES, value); }

MSL_FUNCTION void threadgroup_barrier(mem_flags) { __syncthreads(); }  // orders all memory of the threadgroup
MSL_FUNCTION void simdgroup_barrier(mem_flags) { __syncwarp(); }

MSL_FUNCTION uint msl_lane() { return threadIdx.x % 32; }

// The next kernel's threadgroups may start when all of this one's have come here. They find nothing of what this one
// or, if it has not waited yet, the one before it writes.
MSL_FUNCTION void launch_next() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Returns when the kernel before has ended and all that it wrote can be seen.
MSL_FUNCTION void wait_for_last() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// What a kernel reads once, and nobody writes while it runs: past the L1, and all of its line to the L2.
MSL_FUNCTION uint2 load_once(const uint2* from) {
  uint2 two;
  asm("ld.global.nc.L1::no_allocate.L2::128B.v2.u32 {%0, %1}, [%2];" : "=r"(two.x), "=r"(two.y) : "l"(from));
  return two;
}
MSL_FUNCTION uint4 load_once(const uint4* from) {
  uint4 four;
  asm("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(four.x), "=r"(four.y), "=r"(four.z), "=r"(four.w)
      : "l"(from));
  return four;
}

// The same, requested before wait_for_last where it stands before it: the compiler may put the other behind it.
MSL_FUNCTION uint4 load_early(const uint4* from) {
  uint4 four;
  asm volatile("ld.global.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(four.x), "=r"(four.y), "=r"(four.z), "=r"(four.w)
               : "l"(from)
               : "memory");
  return four;
}

MSL_FUNCTION float max_magnitude(float a, float b) { return fmaxf(a, fabsf(b)); }  // of a >= 0; a NaN is passed over

// Bytes of a (0 to 3) and b (4 to 7), by the selector's digits, the lowest first.
MSL_FUNCTION uint permute_bytes(uint a, uint b, uint selector) { return __byte_perm(a, b, selector); }

// Begin to copy eight bytes of the device's memory to the threadgroup's; wait_for_copies: this lane's have come.
MSL_FUNCTION void copy_eight(void* to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"((uint)__cvta_generic_to_shared(to)), "l"(from) : "memory");
}
MSL_FUNCTION void copy_four(void* to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"((uint)__cvta_generic_to_shared(to)), "l"(from) : "memory");
}
MSL_FUNCTION void copy_sixteen(void* to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 16;" ::"r"((uint)__cvta_generic_to_shared(to)), "l"(from) : "memory");
}
MSL_FUNCTION void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// sums += weights [16, 32], unsigned bytes, times digits [32, 8], signed bytes, on the matrix units. Lane 4 g + t holds
// bytes 4 t to 4 t + 3 and 16 + 4 t to 16 + 4 t + 3 of rows g and g + 8 (a: g, g + 8, g, g + 8) and of column g, and sums
// 2 t and 2 t + 1 of both rows.
MSL_FUNCTION void simdgroup_multiply_bytes(int* sums, const uint* a, const uint* b) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Two halves in a word, the first one below.
MSL_FUNCTION uint pack_halves(float first, float second) {
  uint both;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
  return both;
}
MSL_FUNCTION float first_half(uint both) {
  float first;
  asm("{.reg .f16 a, b; mov.b32 {a, b}, %1; cvt.f32.f16 %0, a;}" : "=f"(first) : "r"(both));
  return first;
}
MSL_FUNCTION float second_half(uint both) { return first_half(both >> 16); }

// sums += a [16, 16] times b [16, 8], halves. Lane 4 g + t holds numbers 2 t, 2 t + 1 and 8 more of rows g and g + 8 (a:
// g, g + 8, g, g + 8) and of column g, and sums 2 t and 2 t + 1 of both rows.
MSL_FUNCTION void simdgroup_multiply_halves(float* sums, const uint* a, const uint* b) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// sums += a [16, 8] times b [8, 8], of floats only the upper 19 bits. Lane 4 g + t holds numbers t and t + 4 of rows g and
// g + 8 (a: g, g + 8, g, g + 8) and of column g, sums as above.
MSL_FUNCTION void simdgroup_multiply_tf32(float* sums, const uint* a, const uint* b) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace metal

#include "simdgroup_matrix.h"

namespace metal {

// A float as two of the matrix units' own, which have eleven bits each; together they keep 22 of its 24.
MSL_FUNCTION void split_float(float value, uint& high, uint& low) {
  high = as_type<uint>(value) & 0xffffe000u;
  low = as_type<uint>(value - as_type<float>(high));
}

// sums += a b for a [16, 8], of which the lower half is zero, and b [8, 8], on the matrix units.
MSL_FUNCTION void multiply_tf32(float* sums, const uint* a, const uint* b) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %8, %5, %8}, {%6, %7}, {%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(b[0]), "r"(b[1]), "r"(0u));
}

// Three products of parts give one in nearly float32: what is lost of a product is 2^-22 of it. The units' sum starts
// at zero each time, because they cut off what does not fit, where an addition outside rounds. A unit wants columns c
// and c + 4 of a in lane c % 4, which here has 2 c and 2 c + 1: any order of the eight will do, if b has it too.
MSL_FUNCTION void simdgroup_multiply_accumulate(
    simdgroup_float8x8& to, const simdgroup_float8x8& a, const simdgroup_float8x8& b, const simdgroup_float8x8& c) {
  const uint lane = msl_lane(), from = lane % 4 * 8 + lane / 8;
  uint a_high[2], a_low[2], b_high[2], b_low[2];
  for (int i = 0; i < 2; i++) {
    const float even = simd_shuffle(b.elements[0], from + 4 * i), odd = simd_shuffle(b.elements[1], from + 4 * i);
    split_float(a.elements[i], a_high[i], a_low[i]);
    split_float(lane / 4 % 2 ? odd : even, b_high[i], b_low[i]);
  }
  float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  multiply_tf32(sums, a_low, b_high);
  multiply_tf32(sums, a_high, b_low);
  multiply_tf32(sums, a_high, b_high);
  to.elements[0] = c.elements[0] + sums[0];
  to.elements[1] = c.elements[1] + sums[1];
}

}  // namespace metal

#include "names.h"
