#include <metal_stdlib>
using namespace metal;
#include "matrix.h"
#include "half_numbers.h"
#include "halves.h"

// metal/matmul.metal on NVIDIA's matrix units for halves: several matrices times the rows of x, for a prompt.
//
//   out[t, m.first_out + n] = sum over k of m[n, k] * x[t, k]
//
// weights   the memory that holds the matrices
// matrices  MatrixForm [count], packed, of one number of columns K; their threadgroups, TILE_ROWS rows each, follow each
//           other
// halves, sums, factors   x, as split_rows.cu leaves it
// out       float [T, out_stride]
//
// Threads: grid (threadgroups of all matrices, T / TILE_TOKENS), four simdgroups, tiles as in halves.h. Bound by
// arithmetic. Reference: linears. Test: test_metal_prefill.py.

struct MatmulShape {
  uint count;
  uint tokens;
  uint blocks;  // of 32 columns, in a row of the parts
  uint out_stride;
};

[[kernel, max_total_threads_per_threadgroup(128)]] void matmul(device const uchar* weights [[buffer(0)]],
    constant MatrixForm* matrices [[buffer(1)]], device const uint* halves [[buffer(2)]],
    device const float* sums [[buffer(3)]], device const float* factors [[buffer(4)]], device float* out [[buffer(5)]],
    constant MatmulShape& shape [[buffer(6)]], uint3 group [[threadgroup_position_in_grid]],
    uint index [[thread_index_in_threadgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  threadgroup uint4 memory[HALVES_QUADS];
  uint which = 0;
  while (which + 1 < shape.count && matrices[which + 1].first_group <= group.x) which++;
  const Weights w = weights_at(weights, matrices[which]);
  const RowTile tile = tile_of_one(w, (group.x - matrices[which].first_group) * TILE_ROWS);
  const Parts parts = {(device const uint4*)halves, sums, factors, shape.blocks};
  const HalvesMemory at = halves_memory(memory);
  const uint token = group.y * TILE_TOKENS, count = min(shape.tokens - token, TILE_TOKENS), padded = (count + 7) / 8 * 8;
  if (index < padded) put_token(parts, at, index, token + min(index, count - 1));
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float results[TOKEN_EIGHTS * ROW_TILES * 4];
  multiply_tile(tile, parts, at, padded, index, simdgroup, lane, results);
#pragma unroll
  for (uint i = 0; i < TOKEN_EIGHTS * ROW_TILES * 4; i++) {
    const uint t = i / 16 * 8 + lane % 4 * 2 + i % 2, n = simdgroup * SIMD_ROWS + i / 4 % 4 * 16 + i / 2 % 2 * 8 + lane / 4;
    if (t < count && tile.first + n < w.rows) {
      out[ulong(token + t) * shape.out_stride + matrices[which].first_out + tile.first + n] = results[i] * at.factors[t];
    }
  }
}
