#include <metal_stdlib>
using namespace metal;
#include "matrix.h"

// Several matrices times one vector, the vector normed first if asked: what shares an input is one dispatch.
//
//   out[t, m.first_out + n] (+)= sum over k of m[n, k] * y[t, k]      y = x, or rms_norm(x, norm)
//
// weights   the memory that holds the matrices
// matrices  MatrixForm [count], of one number of columns K; their threadgroups follow each other
// x         float [T, x_stride], of which the first K columns are read
// norm      float [K], centred on zero; any buffer if not normed
// normed    float [T, K], rms_norm(x): written if keeps_normed, else any buffer
// out       float [T, out_stride]
//
// Threads: grid (threadgroups of all matrices, T), SIMDGROUPS simdgroups; a team of lanes computes ROWS rows
// (matrix.h). The norm needs no pass of its own: the factor 1 / rms comes out of the product, and each team sees all of
// x anyway. Bound by the bytes of the weights. Reference: rms_norm, linears. Test: test_metal_matrices.py.

struct LinearsShape {
  uint count;
  uint columns;
  uint lanes;
  uint x_stride;
  uint out_stride;
  uint is_normed;
  uint keeps_normed;
  uint accumulates;
  float eps;
};

[[kernel, max_total_threads_per_threadgroup(128)]] void linears(device const uchar* weights [[buffer(0)]],
    constant MatrixForm* matrices [[buffer(1)]], device const float* x [[buffer(2)]],
    device const float* norm [[buffer(3)]], device float* normed [[buffer(4)]], device float* out [[buffer(5)]],
    constant LinearsShape& shape [[buffer(6)]], uint3 group [[threadgroup_position_in_grid]],
    uint simdgroup [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  uint which = 0;
  while (which + 1 < shape.count && matrices[which + 1].first_group <= group.x) which++;
  const Weights w = weights_at(weights, matrices[which]);
  const uint lanes = shape.lanes, columns = shape.columns;
  const uint in_group = SIMDGROUPS * 32 / lanes * ROWS;
  const uint row = (group.x - matrices[which].first_group) * in_group + team_row(simdgroup, lane, lanes);
  device const float* input = x + ulong(group.y) * shape.x_stride;
  float sums[ROWS];
  Norm normer = {norm, shape.is_normed != 0, 0.0f};
  row_products<1>(&w, row, lane, lanes, input, normer, sums);
  const float factor = shape.is_normed ? rsqrt(team_sum(normer.squares, lanes) / float(columns) + shape.eps) : 1.0f;
  for (uint r = 0; r < ROWS; r++) {
    const float sum = team_sum(sums[r], lanes) * factor;
    if (lane % lanes == 0 && row + r < w.rows) {
      const ulong at = ulong(group.y) * shape.out_stride + matrices[which].first_out + row + r;
      out[at] = shape.accumulates ? out[at] + sum : sum;
    }
  }
  if (shape.keeps_normed && group.x == 0 && simdgroup == 0) {
    for (uint i = lane; i < columns; i += 32) {
      normed[ulong(group.y) * columns + i] = input[i] * factor * (1.0f + norm[i]);
    }
  }
}
