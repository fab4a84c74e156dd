#include <metal_stdlib>
using namespace metal;
#include "matrix.h"
#include "sums.h"
#include "half_numbers.h"
#include "halves.h"

// metal/experts_prefill.metal on NVIDIA's matrix units for halves: experts of a prompt, each for those tokens that chose
// it.
//
//   hidden[p, i] = silu(gate[i] . x[tokens[p]]) * (up[i] . x[tokens[p]])       experts_gate_up_rows
//   rows[p, n] = down[n] . hidden[p]                                           experts_down_rows
//
// bank0 ...  memories that may hold experts, as in experts.metal;   forms   ExpertForm [any]
// segments   Segment [n]: an expert's place, the first of its pairs and their number, at most TILE_TOKENS, or none: an
//            expert of more tokens has several. Its matrices are packed, gate and up alike
// tokens     int [pairs]
// halves, sums, factors   x [T, D], then hidden [pairs, out_stride], as split_rows.cu leaves them
// hidden     float [pairs, out_stride], zero beyond the rows of a smaller expert;   rows   float [pairs, out_stride]
//
// Threads: grid (rows of an expert / PAIR_ROWS or TILE_ROWS, segments), four simdgroups, tiles as in halves.h. Bound by
// arithmetic, with few tokens by the weights. Reference: add_expert. Test: test_metal_prefill.py.

struct ExpertHalvesShape {
  uint blocks;  // of 32 columns, in a row of the parts
  uint out_stride;
};

constant constexpr uint PAIR_ROWS = 128;  // of gate and of up in a threadgroup

[[kernel, max_total_threads_per_threadgroup(128)]] void experts_gate_up_rows(device const uchar* bank0 [[buffer(0)]],
    device const uchar* bank1 [[buffer(1)]], device const uchar* bank2 [[buffer(2)]],
    constant ExpertForm* forms [[buffer(3)]], constant Segment* segments [[buffer(4)]],
    device const int* tokens [[buffer(5)]], device const uint* halves [[buffer(6)]],
    device const float* sums [[buffer(7)]], device const float* factors [[buffer(8)]],
    device float* hidden [[buffer(9)]], constant ExpertHalvesShape& shape [[buffer(10)]],
    uint3 group [[threadgroup_position_in_grid]], uint index [[thread_index_in_threadgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  threadgroup uint4 memory[HALVES_QUADS];
  constant Segment& segment = segments[group.y];
  constant ExpertForm& form = forms[segment.place.form];
  device const uchar* expert = expert_at(bank0, bank1, bank2, form.bank, segment.place.offset);
  const uint row = group.x * PAIR_ROWS, count = segment.count, padded = (count + 7) / 8 * 8;
  if (count == 0) return;
  const RowTile tile = tile_of_two(weights_at(expert, form.gate), weights_at(expert, form.up), row);
  device float* out = hidden + ulong(segment.first) * shape.out_stride;
  if (row >= tile.w.rows) {  // of a smaller expert, all lanes alike
    const uint width = min(shape.out_stride - row, PAIR_ROWS);
    for (uint i = index; i < count * width; i += HALVES_THREADS) {
      out[ulong(i / width) * shape.out_stride + row + i % width] = 0.0f;
    }
    return;
  }
  const Parts parts = {(device const uint4*)halves, sums, factors, shape.blocks};
  const HalvesMemory at = halves_memory(memory);
  if (index < padded) put_token(parts, at, index, uint(tokens[segment.first + min(index, count - 1)]));
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float results[TOKEN_EIGHTS * ROW_TILES * 4];
  multiply_tile(tile, parts, at, padded, index, simdgroup, lane, results);
#pragma unroll
  for (uint i = 0; i < TOKEN_EIGHTS * ROW_TILES * 4; i++) {
    if (i / 4 % 4 >= 2) continue;  // the tiles of up
    const uint t = i / 16 * 8 + lane % 4 * 2 + i % 2;
    const uint n = row + simdgroup * (SIMD_ROWS / 2) + i / 4 % 4 * 16 + i / 2 % 2 * 8 + lane / 4;
    if (t < count && n < shape.out_stride) {
      const float factor = at.factors[t], value = silu(results[i] * factor) * (results[i + 8] * factor);
      out[ulong(t) * shape.out_stride + n] = n < tile.w.rows ? value : 0.0f;
    }
  }
}

[[kernel, max_total_threads_per_threadgroup(128)]] void experts_down_rows(device const uchar* bank0 [[buffer(0)]],
    device const uchar* bank1 [[buffer(1)]], device const uchar* bank2 [[buffer(2)]],
    constant ExpertForm* forms [[buffer(3)]], constant Segment* segments [[buffer(4)]],
    device const uint* halves [[buffer(5)]], device const float* sums [[buffer(6)]],
    device const float* factors [[buffer(7)]], device float* rows_out [[buffer(8)]],
    constant ExpertHalvesShape& shape [[buffer(9)]], uint3 group [[threadgroup_position_in_grid]],
    uint index [[thread_index_in_threadgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  threadgroup uint4 memory[HALVES_QUADS];
  constant Segment& segment = segments[group.y];
  constant ExpertForm& form = forms[segment.place.form];
  const Weights down = weights_at(expert_at(bank0, bank1, bank2, form.bank, segment.place.offset), form.down);
  const RowTile tile = tile_of_one(down, group.x * TILE_ROWS);
  const uint first = segment.first, count = segment.count, padded = (count + 7) / 8 * 8;
  if (count == 0) return;
  const Parts parts = {(device const uint4*)halves, sums, factors, shape.blocks};
  const HalvesMemory at = halves_memory(memory);
  if (index < padded) put_token(parts, at, index, first + min(index, count - 1));
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float results[TOKEN_EIGHTS * ROW_TILES * 4];
  multiply_tile(tile, parts, at, padded, index, simdgroup, lane, results);
#pragma unroll
  for (uint i = 0; i < TOKEN_EIGHTS * ROW_TILES * 4; i++) {
    const uint t = i / 16 * 8 + lane % 4 * 2 + i % 2;
    const uint n = tile.first + simdgroup * SIMD_ROWS + i / 4 % 4 * 16 + i / 2 % 2 * 8 + lane / 4;
    if (t < count && n < down.rows) rows_out[ulong(first + t) * shape.out_stride + n] = results[i] * at.factors[t];
  }
}
