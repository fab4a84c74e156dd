#include <metal_stdlib>
using namespace metal;
#include "matrix.h"
#include "sums.h"
#include "half_numbers.h"
#include "vector.h"

// metal/experts.metal on NVIDIA's matrix units for halves: the same formulas and arguments, but for
//
// hidden     float [ranks, hidden_stride]: of each rank the products, spread over `units` units, then the same as
//            halves, then four words for each unit (`known` in vector.h)
//
// Threads, gate_up: grid (units * 2, places); of a threadgroup's four simdgroups two multiply a tile of gate, two one of
// up, each half of the columns. down: grid (rows / TILE_ROWS), a simdgroup for each place, up to DOWN_SIMDGROUPS, beyond
// which they take turns. Tiles as in vector.h. Bound by the bytes of the weights, and the more by products and by a
// kernel's start and end the fewer bits they have. Reference: run_experts, add_rows. Test: test_metal_matrices.py.

constant constexpr uint GATE_UP_THREADS = 128;
constant constexpr uint X_UNITS = 128;      // at most
constant constexpr uint X_QUADS = 1030;     // for their halves, and zeros
constant constexpr uint DOWN_SIMDGROUPS = 11;
constant constexpr uint HIDDEN_QUADS = 262;  // of a simdgroup: for the halves of 32 units, at most, and zeros
constant constexpr uint ALL_HIDDEN_QUADS = 2882;

struct ExpertsShape {
  uint places;
  uint x_units;
  uint units;  // that a rank's products are spread over: whole strips
  uint hidden_stride;
  uint rows;
};

// Tile `tile` of a rank's products to both its forms. value: a row's in lanes 0 to 15, zero in the others.
inline void put_hidden(float value, uint tile, uint units, uint lane, device float* hidden) {
  if (lane < TILE_ROWS) hidden[spread_place(tile * TILE_ROWS + lane, units)] = value;
  const Scaling scaling = scaling_of(simd_max(max_magnitude(0.0f, value)));
  const float total = simd_sum(value), other = simd_shuffle_xor(value, 4);
  uint high, low;
  split_pair(value * scaling.factor, other * scaling.factor, high, low);
  device uint* unit = (device uint*)(hidden + units * UNIT) + tile / 2 * (UNIT_QUADS * 4);
  if (lane < TILE_ROWS && lane % 8 < 4) {
    const uint at = tile % 2 * 8 + lane / 8 * 4 + lane % 4;
    unit[at] = high;
    unit[at + 16] = low;
  }
  device float* known = hidden + units * (UNIT + UNIT_QUADS * 4) + tile / 2 * 4 + tile % 2;
  if (lane == 0) {
    known[0] = scaling.worth;
    known[2] = total;
  }
}

[[kernel, max_total_threads_per_threadgroup(128)]] void experts_gate_up(device const uchar* bank0 [[buffer(0)]],
    device const uchar* bank1 [[buffer(1)]], device const uchar* bank2 [[buffer(2)]],
    constant ExpertForm* forms [[buffer(3)]], constant Place* places [[buffer(4)]], device const float* x [[buffer(5)]],
    device float* hidden [[buffer(6)]], constant ExpertsShape& shape [[buffer(7)]],
    uint3 group [[threadgroup_position_in_grid]], uint index [[thread_index_in_threadgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  threadgroup uint4 halves[X_QUADS];
  threadgroup uint4 known[X_UNITS];
  threadgroup float results[4][TILE_ROWS];
  // The kernel before may still be choosing the places, but x was there before it let this one begin.
  const uint x_units = shape.x_units, half_units = (x_units + STRIP_UNITS - 1) / STRIP_UNITS * STRIP_UNITS * 2;
  float4 fours[2][4];
#pragma unroll
  for (uint k = 0; k < 2; k++) {
    const uint half_unit = index + k * GATE_UP_THREADS, unit = half_unit / 2;
#pragma unroll
    for (uint i = 0; i < 4; i++) {
      fours[k][i] = 0.0f;
      if (unit < x_units) fours[k][i] = ((device const float4*)x)[(half_unit % 2 * 4 + i) * x_units + unit];
    }
  }
#pragma unroll
  for (uint k = 0; k < 2; k++) {
    const uint half_unit = index + k * GATE_UP_THREADS;
    if (half_unit < half_units) put_half_unit(fours[k], half_unit, halves, known);
  }
  threadgroup uint4* zeros = halves + (X_QUADS - ZERO_QUADS + ZERO_PLACE);
  if (index < 4) zeros[index] = 0;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  wait_for_last();
  launch_next();  // experts_down, which reads places, weights and x before it waits
  constant Place& place = places[group.y];
  constant ExpertForm& form = forms[place.form];
  device const uchar* expert = expert_at(bank0, bank1, bank2, form.bank, place.offset);
  device float* own = hidden + place.rank * shape.hidden_stride;
  const uint row = group.x * TILE_ROWS, rows = form.gate.rows;
  if (row >= rows) {  // of a smaller expert, all lanes alike
    if (simdgroup == 0) put_hidden(0.0f, group.x, shape.units, lane, own);
    return;
  }
  const Weights w = weights_at(expert, simdgroup % 2 ? form.up : form.gate);
  const uint spans = (x_units + SPAN_UNITS - 1) / SPAN_UNITS;
  const uint each = (half_units / 4 + STRIP_UNITS - 1) / STRIP_UNITS * STRIP_SPANS;  // whole strips
  const uint first = simdgroup / 2 * each;
  const Share share = {min(first, spans), min(first + each, spans)};
  if (w.storage >= BF16) {
    multiply_plain(w, row, share, x, x_units, lane, results[simdgroup]);
  } else {
    const Vector<threadgroup const uint4*> vector = {halves, zeros, known, nullptr};
    put_sums(multiply_tile<4, false>(w, row, share, vector, lane), lane, results[simdgroup]);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (simdgroup == 0) {
    const uint i = lane % TILE_ROWS;
    const float gate = results[0][i] + results[2][i], up = results[1][i] + results[3][i];
    const bool is_row = lane < TILE_ROWS && row + lane < rows;
    put_hidden(is_row ? silu(gate) * up : 0.0f, group.x, shape.units, lane, own);
  }
}

[[kernel, max_total_threads_per_threadgroup(352)]] void experts_down(device const uchar* bank0 [[buffer(0)]],
    device const uchar* bank1 [[buffer(1)]], device const uchar* bank2 [[buffer(2)]],
    constant ExpertForm* forms [[buffer(3)]], constant Place* places [[buffer(4)]],
    device const float* hidden [[buffer(5)]], device const float* weights [[buffer(6)]], device float* x [[buffer(7)]],
    constant ExpertsShape& shape [[buffer(8)]], uint3 group [[threadgroup_position_in_grid]],
    uint index [[thread_index_in_threadgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint simdgroups [[simdgroups_per_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  threadgroup uint4 halves[ALL_HIDDEN_QUADS];
  threadgroup float results[DOWN_SIMDGROUPS][TILE_ROWS];
  launch_next();
  const uint row = group.x * TILE_ROWS;
  threadgroup uint4* own = halves + simdgroup * HIDDEN_QUADS;
  threadgroup uint4* zeros = own + (HIDDEN_QUADS - ZERO_QUADS + ZERO_PLACE);
  if (lane < 4) zeros[lane] = 0;
  // Places, weights and x were there before experts_gate_up let this kernel begin.
  const float before = index < TILE_ROWS && row + index < shape.rows ? x[row + index] : 0.0f;
  float sum = 0.0f;
  for (uint p = simdgroup; p < shape.places; p += simdgroups) {
    constant Place& place = places[p];
    constant ExpertForm& form = forms[place.form];
    const float weight = weights[place.rank];
    const Weights w = weights_at(expert_at(bank0, bank1, bank2, form.bank, place.offset), form.down);
    const Share share = {0, (count_units(w.columns) + SPAN_UNITS - 1) / SPAN_UNITS};
    device const float* inputs = hidden + place.rank * shape.hidden_stride;
    if (w.storage >= BF16) {
      wait_for_last();
      multiply_plain(w, row, share, inputs, shape.units, lane, results[simdgroup]);
    } else {
      device const uint4* source = (device const uint4*)(inputs + shape.units * UNIT);
      const Vector<device const uint4*> vector = {own, zeros, source + shape.units * UNIT_QUADS, source};
      const float2 sums = multiply_tile<2, true>(w, row, share, vector, lane);
      put_sums(sums, lane, results[simdgroup]);
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
    sum = fma(weight, results[simdgroup][lane % TILE_ROWS], sum);
    simdgroup_barrier(mem_flags::mem_threadgroup);
  }
  if (lane < TILE_ROWS) results[simdgroup][lane] = sum;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (index < TILE_ROWS && row + index < shape.rows) {
    float total = 0.0f;
    for (uint i = 0; i < simdgroups; i++) total += results[i][index];
    x[row + index] = before + total;
  }
}
