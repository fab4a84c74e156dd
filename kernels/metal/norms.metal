#include <metal_stdlib>
using namespace metal;
#include "sums.h"

// Root mean square norms over rows of W floats.
//
//   rms_norm         out = x / rms(x) * (1 + weight)             the weight is centred on zero
//   gated_rms_norm   out = x / rms(x) * weight * silu(gate)      here it is plain
//
// x, out   float [R, W]; they may be the same
// weight   float [W]
// gate     float: the gate of row t * heads + h starts at t * gate_stride + h * W
//
// Threads: grid (R), up to 1024 threads, each of which takes every so-manieth column.
// Bound by the bytes of x. Reference: rms_norm, gated_rms_norm. Test: test_metal_token.py.

struct NormShape {
  uint width;
  uint heads;
  uint gate_stride;
  float eps;
};

inline float inverse_rms(device const float* x, uint width, float eps, threadgroup float* partial, uint index,
    uint simdgroup, uint simdgroups, uint lane) {
  float squares = 0.0f;
  for (uint i = index; i < width; i += simdgroups * 32) squares = fma(x[i], x[i], squares);
  return rsqrt(threadgroup_sum(squares, partial, simdgroup, simdgroups, lane) / float(width) + eps);
}

[[kernel, max_total_threads_per_threadgroup(1024)]] void rms_norm(device const float* x [[buffer(0)]],
    device const float* weight [[buffer(1)]], device float* out [[buffer(2)]], constant NormShape& shape [[buffer(3)]],
    uint3 group [[threadgroup_position_in_grid]], uint index [[thread_index_in_threadgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]], uint simdgroups [[simdgroups_per_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  threadgroup float partial[32];
  const ulong start = ulong(group.x) * shape.width;
  const float factor = inverse_rms(x + start, shape.width, shape.eps, partial, index, simdgroup, simdgroups, lane);
  for (uint i = index; i < shape.width; i += simdgroups * 32)
    out[start + i] = x[start + i] * factor * (1.0f + weight[i]);
}

[[kernel, max_total_threads_per_threadgroup(1024)]] void gated_rms_norm(device const float* x [[buffer(0)]],
    device const float* gate [[buffer(1)]], device const float* weight [[buffer(2)]], device float* out [[buffer(3)]],
    constant NormShape& shape [[buffer(4)]], uint3 group [[threadgroup_position_in_grid]],
    uint index [[thread_index_in_threadgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint simdgroups [[simdgroups_per_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  threadgroup float partial[32];
  const ulong start = ulong(group.x) * shape.width;
  const ulong gates = ulong(group.x / shape.heads) * shape.gate_stride + group.x % shape.heads * shape.width;
  const float factor = inverse_rms(x + start, shape.width, shape.eps, partial, index, simdgroup, simdgroups, lane);
  for (uint i = index; i < shape.width; i += simdgroups * 32) {
    out[start + i] = x[start + i] * factor * weight[i] * silu(gate[gates + i]);
  }
}
