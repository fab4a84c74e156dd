#include <metal_stdlib>
using namespace metal;
#include "matrix.h"
#include "sums.h"
#include "tile.h"

// Experts of a prompt: several experts, each for those tokens that chose it, in two dispatches, then their sum.
//
//   hidden[p, i] = silu(gate[i] . x[tokens[p]]) * (up[i] . x[tokens[p]])       experts_gate_up_rows
//   rows[p, n] = down[n] . hidden[p]                                           experts_down_rows
//   out[t, n] += weights[p] * rows[p, n]  for p = order[t, 0], order[t, 1], ...    add_expert_rows
//
// A pair p is a token and an expert that it chose; the pairs of an expert follow each other.
//
// bank0 ...  memories that may hold experts, as in experts.metal;   forms   ExpertForm [any]
// segments   Segment [n]: an expert's place, the first of its pairs and their number
// tokens     int [pairs]
// x          float [T, D], normed;   out   float [T, D]
// hidden     float [pairs, hidden_stride];   rows   float [pairs, D]
// order      int [T, K]: pairs of each token, or -1;   weights   float [pairs]
//
// A token's experts are added one after the other, so that it does not matter which of them come in one call:
// add_expert_rows passes over pairs that have no row.
//
// Threads: grid (rows / TILE, most pairs of a segment / TILE, segments), four simdgroups, tiles as in tile.h;
// add_expert_rows: grid (D / 256, T), one thread for each number. Bound by arithmetic, with few tokens by the weights.
// Reference: add_expert, add_rows. Test: test_metal_prefill.py.

struct ExpertRowsShape {
  uint x_stride;
  uint out_stride;
};

struct AddRowsShape {
  uint width;
  uint most;   // pairs of a token
  uint first;  // pair that has a row
  uint count;  // of rows
};

[[kernel, max_total_threads_per_threadgroup(128)]] void experts_gate_up_rows(device const uchar* bank0 [[buffer(0)]],
    device const uchar* bank1 [[buffer(1)]], device const uchar* bank2 [[buffer(2)]],
    constant ExpertForm* forms [[buffer(3)]], constant Segment* segments [[buffer(4)]],
    device const int* tokens [[buffer(5)]], device const float* x [[buffer(6)]], device float* hidden [[buffer(7)]],
    constant ExpertRowsShape& shape [[buffer(8)]], uint3 group [[threadgroup_position_in_grid]],
    uint index [[thread_index_in_threadgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]]) {
  threadgroup float inputs[TILE_FLOATS];
  threadgroup float rows[TILE_FLOATS];
  threadgroup float gates[TILE * TILE];
  threadgroup float ups[TILE * TILE];
  constant Segment& segment = segments[group.z];
  constant ExpertForm& form = forms[segment.place.form];
  device const uchar* expert = expert_at(bank0, bank1, bank2, form.bank, segment.place.offset);
  const Weights gate = weights_at(expert, form.gate);
  const Weights up = weights_at(expert, form.up);
  const uint row = group.x * TILE, pair = group.y * TILE;
  if (row >= gate.rows || pair >= segment.count) return;  // of a smaller expert, all lanes alike
  simdgroup_float8x8 gate_sums[4];
  simdgroup_float8x8 up_sums[4];
  clear_tile(gate_sums);
  clear_tile(up_sums);
  for (uint column = 0; column < gate.columns; column += STEP) {
    for (uint i = index; i < TILE * STEP; i += TILE_THREADS) {
      const uint p = pair + i / STEP, k = column + i % STEP;
      const bool is_inside = p < segment.count && k < gate.columns;
      const uint place = i / STEP * STRIDE + i % STEP;
      inputs[place] = is_inside ? x[ulong(tokens[segment.first + p]) * shape.x_stride + k] : 0.0f;
    }
    load_rows(gate, row, column, rows, index);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    add_tile(inputs, rows, gate_sums, simdgroup);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    load_rows(up, row, column, rows, index);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    add_tile(inputs, rows, up_sums, simdgroup);
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  store_tile(gate_sums, gates, simdgroup);
  store_tile(up_sums, ups, simdgroup);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint i = index; i < TILE * TILE; i += TILE_THREADS) {
    const uint p = pair + i / TILE, n = row + i % TILE;
    if (p < segment.count && n < gate.rows) {
      hidden[ulong(segment.first + p) * shape.out_stride + n] = silu(gates[i]) * ups[i];
    }
  }
}

[[kernel, max_total_threads_per_threadgroup(128)]] void experts_down_rows(device const uchar* bank0 [[buffer(0)]],
    device const uchar* bank1 [[buffer(1)]], device const uchar* bank2 [[buffer(2)]],
    constant ExpertForm* forms [[buffer(3)]], constant Segment* segments [[buffer(4)]],
    device const float* hidden [[buffer(5)]], device float* rows_out [[buffer(6)]],
    constant ExpertRowsShape& shape [[buffer(7)]], uint3 group [[threadgroup_position_in_grid]],
    uint index [[thread_index_in_threadgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]]) {
  threadgroup float inputs[TILE_FLOATS];
  threadgroup float rows[TILE_FLOATS];
  threadgroup float products[TILE * TILE];
  constant Segment& segment = segments[group.z];
  constant ExpertForm& form = forms[segment.place.form];
  const Weights down = weights_at(expert_at(bank0, bank1, bank2, form.bank, segment.place.offset), form.down);
  const uint row = group.x * TILE, pair = group.y * TILE;
  if (row >= down.rows || pair >= segment.count) return;  // all lanes alike
  simdgroup_float8x8 sums[4];
  clear_tile(sums);
  for (uint column = 0; column < down.columns; column += STEP) {
    for (uint i = index; i < TILE * STEP; i += TILE_THREADS) {
      const uint p = pair + i / STEP, k = column + i % STEP;
      const bool is_inside = p < segment.count && k < down.columns;
      inputs[i / STEP * STRIDE + i % STEP] = is_inside ? hidden[ulong(segment.first + p) * shape.x_stride + k] : 0.0f;
    }
    load_rows(down, row, column, rows, index);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    add_tile(inputs, rows, sums, simdgroup);
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  store_tile(sums, products, simdgroup);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint i = index; i < TILE * TILE; i += TILE_THREADS) {
    const uint p = pair + i / TILE, n = row + i % TILE;
    if (p < segment.count && n < down.rows) {
      rows_out[ulong(segment.first + p) * shape.out_stride + n] = products[i];
    }
  }
}

[[kernel, max_total_threads_per_threadgroup(256)]] void add_expert_rows(device const float* rows [[buffer(0)]],
    device const int* order [[buffer(1)]], device const float* weights [[buffer(2)]], device float* out [[buffer(3)]],
    constant AddRowsShape& shape [[buffer(4)]], uint3 group [[threadgroup_position_in_grid]],
    uint index [[thread_index_in_threadgroup]]) {
  const uint n = group.x * 256 + index, t = group.y;
  if (n >= shape.width) return;
  float sum = out[ulong(t) * shape.width + n];
  for (uint k = 0; k < shape.most; k++) {
    const uint pair = uint(order[t * shape.most + k]), row = pair - shape.first;
    if (row < shape.count) sum = fma(weights[pair], rows[ulong(row) * shape.width + n], sum);
  }
  out[ulong(t) * shape.width + n] = sum;
}
