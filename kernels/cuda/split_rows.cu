#include <metal_stdlib>
using namespace metal;
#include "matrix.h"
#include "half_numbers.h"

// Rows of x as the products of halves.h take them: every number as two halves, scaled by its row.
//
//   largest(row) * 2^e is in [2^14, 2^15), but e <= 126;   high = half(x * 2^e),   low = half(x * 2^e - high)
//
// x        float [T, x_stride], of which the first K columns are read, whole units of 32
// halves   [T, K / 32, 2, 32]: of each block of 32 columns the high halves, then the low ones, each in the order 0 4 1 5
//          2 6 3 7 of every eight
// sums     float [T, SUMS * each], each = K / 1024, rounded up: of x * 2^e over every 32 columns, then over every 64, then
//          over every 128, with zeros behind each
// factors  float [T]: 2^-e
//
// Threads: grid (T), a thread for eight columns at a time. Bound by memory. Reference: linears, of which it is a part.
// Test: test_metal_prefill.py.

constant constexpr uint SUMMED = 1024;  // both as in halves.h
constant constexpr uint SUMS = 56;

struct SplitShape {
  uint columns;
  uint x_stride;
};

[[kernel, max_total_threads_per_threadgroup(256)]] void split_rows(device const float* x [[buffer(0)]],
    device uint* halves [[buffer(1)]], device float* sums [[buffer(2)]], device float* factors [[buffer(3)]],
    constant SplitShape& shape [[buffer(4)]], uint3 group [[threadgroup_position_in_grid]],
    uint index [[thread_index_in_threadgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint simdgroups [[simdgroups_per_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  threadgroup float partial[8];
  const uint eights = shape.columns / 8, threads = simdgroups * 32;
  device const float4* row = (device const float4*)(x + ulong(group.x) * shape.x_stride);
  float largest = 0.0f;
  for (uint i = index; i < eights; i += threads) {
    const float4 first = row[2 * i], second = row[2 * i + 1];
    largest = max_magnitude(max_magnitude(largest, first.x), first.y);
    largest = max_magnitude(max_magnitude(largest, first.z), first.w);
    largest = max_magnitude(max_magnitude(largest, second.x), second.y);
    largest = max_magnitude(max_magnitude(largest, second.z), second.w);
  }
  largest = simd_max(largest);
  if (lane == 0) partial[simdgroup] = largest;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint i = 0; i < simdgroups; i++) largest = max(largest, partial[i]);
  const Scaling scaling = scaling_of(largest);
  device uint4* out = (device uint4*)halves + ulong(group.x) * eights * 2;
  // All lanes of a simdgroup go round together, for the sums.
  const uint each = (shape.columns + SUMMED - 1) / SUMMED;
  device float* totals = sums + ulong(group.x) * (SUMS * each);
  for (uint start = 0; start < each * SUMMED / 8; start += threads) {
    const uint i = start + index, at = min(i, eights - 1);
    const float4 first = row[2 * at], second = row[2 * at + 1];
    uint high[4], low[4];
    split_eight(first, second, scaling.factor, high, low);
    float total = ((first.x + second.x) + (first.y + second.y)) + ((first.z + second.z) + (first.w + second.w));
    total *= scaling.factor;
    if (i < eights) {
      const uint to = i / 4 * 8 + i % 4;
      out[to] = uint4(high[0], high[1], high[2], high[3]);
      out[to + 4] = uint4(low[0], low[1], low[2], low[3]);
    } else {
      total = 0.0f;
    }
    total += simd_shuffle_xor(total, 1);
    total += simd_shuffle_xor(total, 2);
    const float of_64 = total + simd_shuffle_xor(total, 4), of_128 = of_64 + simd_shuffle_xor(of_64, 8);
    if (i < each * SUMMED / 8) {
      if (i % 4 == 0) totals[i / 4] = total;
      if (i % 8 == 0) totals[each * 32 + i / 8] = of_64;
      if (i % 16 == 0) totals[each * 48 + i / 16] = of_128;
    }
  }
  if (index == 0) factors[group.x] = scaling.worth;
}
