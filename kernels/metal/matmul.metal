#include <metal_stdlib>
using namespace metal;
#include "matrix.h"
#include "tile.h"

// Several matrices times the rows of x, for a prompt: linears (linears.metal) where each weight is used for many
// tokens.
//
//   out[t, m.first_out + n] (+)= sum over k of m[n, k] * x[t, k]
//
// weights   the memory that holds the matrices
// matrices  MatrixForm [count], of one number of columns K; their threadgroups, TILE rows each, follow each other
// x         float [T, x_stride], of which the first K columns are read
// out       float [T, out_stride]
//
// Threads: grid (threadgroups of all matrices, T / TILE), four simdgroups; a threadgroup computes a tile of TILE tokens
// and TILE rows (tile.h). Bound by arithmetic from some 20 tokens on. Reference: linears. Test: test_metal_prefill.py.

struct MatmulShape {
  uint count;
  uint tokens;
  uint x_stride;
  uint out_stride;
  uint accumulates;
};

[[kernel, max_total_threads_per_threadgroup(128)]] void matmul(device const uchar* weights [[buffer(0)]],
    constant MatrixForm* matrices [[buffer(1)]], device const float* x [[buffer(2)]], device float* out [[buffer(3)]],
    constant MatmulShape& shape [[buffer(4)]], uint3 group [[threadgroup_position_in_grid]],
    uint index [[thread_index_in_threadgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]]) {
  threadgroup float inputs[TILE_FLOATS];
  threadgroup float rows[TILE_FLOATS];
  threadgroup float products[TILE * TILE];
  uint which = 0;
  while (which + 1 < shape.count && matrices[which + 1].first_group <= group.x) which++;
  const Weights w = weights_at(weights, matrices[which]);
  const uint row = (group.x - matrices[which].first_group) * TILE, token = group.y * TILE;
  simdgroup_float8x8 sums[4];
  clear_tile(sums);
  for (uint column = 0; column < w.columns; column += STEP) {
    for (uint i = index; i < TILE * STEP; i += TILE_THREADS) {
      const uint t = token + i / STEP, k = column + i % STEP;
      const bool is_inside = t < shape.tokens && k < w.columns;
      inputs[i / STEP * STRIDE + i % STEP] = is_inside ? x[ulong(t) * shape.x_stride + k] : 0.0f;
    }
    load_rows(w, row, column, rows, index);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    add_tile(inputs, rows, sums, simdgroup);
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  store_tile(sums, products, simdgroup);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint i = index; i < TILE * TILE; i += TILE_THREADS) {
    const uint t = token + i / TILE, n = row + i % TILE;
    if (t < shape.tokens && n < w.rows) {
      const ulong at = ulong(t) * shape.out_stride + matrices[which].first_out + n;
      out[at] = shape.accumulates ? out[at] + products[i] : products[i];
    }
  }
}
