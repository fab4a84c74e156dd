#include <metal_stdlib>
using namespace metal;
#include "matrix.h"
#include "normed.h"
#include "sums.h"

// Several matrices times one vector, the vector normed first if asked: what shares an input is one dispatch.
//
//   out[t, m.first_out + n] (+)= sum over k of m[n, k] * y[t, k]      y = x, or rms_norm(x, norm)
//
// weights   the memory that holds the matrices
// matrices  MatrixForm [count], of one number of columns K; their threadgroups follow each other
// x         float [T, x_stride], of which the first K columns are read
// norm      float [K], centred on zero; any buffer if not normed
// normed    float [T, whole units], rms_norm(x) spread (matrix.h): written if keeps_normed, else any buffer
// out       float [T, out_stride]
//
// Threads: grid (threadgroups of all matrices, T), LINEAR_SIMDGROUPS simdgroups; a team of lanes computes LINEAR_ROWS
// rows (matrix.h). The threadgroup first spreads the inputs in its own memory, STAGED columns at a time, multiplied by
// 1 + norm; the factor 1 / rms comes out of the product. Bound by the bytes of the weights. Reference: rms_norm,
// linears. Test: test_metal_matrices.py.

constant constexpr uint LINEAR_ROWS = 2;
constant constexpr uint LINEAR_SIMDGROUPS = 8;
constant constexpr uint STAGED = 4096;
constant constexpr uint STAGED_UNITS = 129;  // of STAGED columns, and one so that neighbours lie in other memory banks
constant constexpr uint STAGED_QUADS = 1032;
constant constexpr uint STAGED_EACH = 4;     // times four columns: those of a thread

struct LinearsShape {
  uint count;
  uint columns;
  uint shift;  // a team has two to the power of it lanes
  uint x_stride;
  uint out_stride;
  uint is_normed;
  uint keeps_normed;
  uint accumulates;
  float eps;
};

[[kernel, max_total_threads_per_threadgroup(256)]] void linears(device const uchar* weights [[buffer(0)]],
    constant MatrixForm* matrices [[buffer(1)]], device const float* x [[buffer(2)]],
    device const float* norm [[buffer(3)]], device float* normed [[buffer(4)]], device float* out [[buffer(5)]],
    constant LinearsShape& shape [[buffer(6)]], uint3 group [[threadgroup_position_in_grid]],
    uint index [[thread_index_in_threadgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  threadgroup float4 staged[STAGED_QUADS];
  threadgroup float partial[32];
  uint which = 0;
  while (which + 1 < shape.count && matrices[which + 1].first_group <= group.x) which++;
  const Weights w = weights_at(weights, matrices[which]);
  const uint lanes = 1u << shape.shift, columns = shape.columns, units = count_units(columns);
  const uint threads = LINEAR_SIMDGROUPS * 32;
  const uint row = (((group.x - matrices[which].first_group) * threads + index) >> shape.shift) * LINEAR_ROWS;
  device const float* input = x + ulong(group.y) * shape.x_stride;
  const bool is_aligned = (columns | shape.x_stride) % 4 == 0;
  float sums[LINEAR_ROWS];
  for (uint r = 0; r < LINEAR_ROWS; r++) sums[r] = 0.0f;
  float squares = 0.0f;
  for (uint start = 0; start < units; start += STAGED / UNIT) {
    const uint end = min(start + STAGED / UNIT, units);
    float4 fours[STAGED_EACH], norms[STAGED_EACH];  // all of them requested before any is used
#pragma unroll
    for (uint k = 0; k < STAGED_EACH; k++) {
      const uint column = (start * QUADS + index + k * threads) * 4, last = min(columns, end * UNIT);
      fours[k] = load_four(input, column, last, is_aligned);
      norms[k] = load_four(norm, column, shape.is_normed ? last : 0, is_aligned);
    }
#pragma unroll
    for (uint k = 0; k < STAGED_EACH; k++) {
      const uint i = start * QUADS + index + k * threads;
      if (i >= end * QUADS) break;
      if (shape.is_normed) {
        squares = add_squares(fours[k], squares);
        fours[k] = apply_norm(fours[k], norms[k], 1.0f);
      }
      staged[i % QUADS * STAGED_UNITS + i / QUADS - start] = fours[k];
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const Walk walk = {start + (lane & (lanes - 1)), end, lanes, start, STAGED_UNITS};
    add_products<1, LINEAR_ROWS>(&w, row, walk, (threadgroup const float4*)staged, sums);
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  float factor = 1.0f;
  if (shape.is_normed) {
    const float sum = threadgroup_sum(squares, partial, simdgroup, LINEAR_SIMDGROUPS, lane);
    factor = rsqrt(sum / float(columns) + shape.eps);
  }
  team_sums<LINEAR_ROWS>(sums, shape.shift);
#pragma unroll
  for (uint r = 0; r < LINEAR_ROWS; r++) {
    if ((lane & (lanes - 1)) == 0 && row + r < w.rows) {
      const ulong at = ulong(group.y) * shape.out_stride + matrices[which].first_out + row + r;
      out[at] = shape.accumulates ? fma(sums[r], factor, out[at]) : sums[r] * factor;
    }
  }
  if (shape.keeps_normed && group.x == 0) {
    device float* kept = normed + ulong(group.y) * units * UNIT;
    keep_normed(input, norm, columns, is_aligned, factor, index, threads, kept);
  }
}
