#include <metal_stdlib>
using namespace metal;
#include "matrix.h"
#include "normed.h"
#include "sums.h"
#include "plain_rows.h"

// metal/linears.metal for a few rows of bfloat16, as a router has: the same formula and arguments, but for
//
// groups    threadgroups of all matrices; where normed is kept, KEEPERS more write it
//
// Rows of x start on 16 bytes, and have whole eights of columns, at most ROW_STRIPS * ROW_STRIP.
//
// Threads: grid (groups or groups + KEEPERS, T), PLAIN_SIMDGROUPS simdgroups, each with a row (plain_rows.h). Bound by
// latency. Reference: rms_norm, linears. Test: test_metal_matrices.py.

constant constexpr uint PLAIN_SIMDGROUPS = 4;
constant constexpr uint KEEPERS = 4;
constant constexpr uint KEPT = 2;  // quads of normed that a thread writes: KEEPERS threadgroups have all columns

struct LinearsShape {
  uint count;
  uint columns;
  uint groups;
  uint x_stride;
  uint out_stride;
  uint is_normed;
  uint keeps_normed;
  uint accumulates;
  float eps;
};

// Part `keeper` of rms_norm(x), which every keeper reads whole.
inline void keep_part(thread const RowInputs& inputs, float eps, uint keeper, uint index, uint simdgroup, uint lane,
    threadgroup float* partial, device float* normed) {
  const uint columns = inputs.columns, threads = PLAIN_SIMDGROUPS * 32;
  float4 norms[KEPT], own[KEPT];
#pragma unroll
  for (uint k = 0; k < KEPT; k++) {
    norms[k] = load_quad(inputs.norm, ((k * KEEPERS + keeper) * threads + index) * 4, columns);
  }
  wait_for_last();
#pragma unroll
  for (uint k = 0; k < KEPT; k++) {
    own[k] = load_quad(inputs.x, ((k * KEEPERS + keeper) * threads + index) * 4, columns);
  }
  float squares = 0.0f;
#pragma unroll
  for (uint k = 0; k < KEPT * KEEPERS; k++) {
    squares = add_squares(load_quad(inputs.x, (k * threads + index) * 4, columns), squares);
  }
  const float sum = threadgroup_sum(squares, partial, simdgroup, PLAIN_SIMDGROUPS, lane);
  const float factor = rsqrt(sum / float(columns) + eps);
#pragma unroll
  for (uint k = 0; k < KEPT; k++) {
    const uint quad = (k * KEEPERS + keeper) * threads + index;
    if (quad * 4 < columns) {
      ((device float4*)normed)[quad % QUADS * count_units(columns) + quad / QUADS] = apply_norm(own[k], norms[k], factor);
    }
  }
}

[[kernel, max_total_threads_per_threadgroup(128)]] void linears(device const uchar* weights [[buffer(0)]],
    constant MatrixForm* matrices [[buffer(1)]], device const float* x [[buffer(2)]],
    device const float* norm [[buffer(3)]], device float* normed [[buffer(4)]], device float* out [[buffer(5)]],
    constant LinearsShape& shape [[buffer(6)]], uint3 group [[threadgroup_position_in_grid]],
    uint index [[thread_index_in_threadgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  threadgroup float partial[32];
  launch_next();
  const uint columns = shape.columns;
  const RowInputs inputs = {x + ulong(group.y) * shape.x_stride, norm, columns, true, shape.is_normed != 0, 0.0f};
  if (group.x >= shape.groups) {
    device float* kept = normed + ulong(group.y) * count_units(columns) * UNIT;
    keep_part(inputs, shape.eps, group.x - shape.groups, index, simdgroup, lane, partial, kept);
    return;
  }
  uint which = 0;
  while (which + 1 < shape.count && matrices[which + 1].first_group <= group.x) which++;
  const Weights w = weights_at(weights, matrices[which]);
  const uint row = (group.x - matrices[which].first_group) * PLAIN_SIMDGROUPS + simdgroup;
  const float2 result = multiply_plain_row(w, row, inputs, lane);
  const float squares = simd_sum(result.y);
  if (lane > 0 || row >= w.rows) return;
  const float factor = shape.is_normed ? rsqrt(squares / float(columns) + shape.eps) : 1.0f;
  const ulong at = ulong(group.y) * shape.out_stride + matrices[which].first_out + row;
  out[at] = shape.accumulates ? fma(result.x, factor, out[at]) : result.x * factor;
}
