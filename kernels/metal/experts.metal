#include <metal_stdlib>
using namespace metal;
#include "matrix.h"

// All chosen experts of one token, and the shared one, in two dispatches. Each may have bits of its own.
//
//   hidden[rank, i] = silu(gate[i] . x) * (up[i] . x)             experts_gate_up
//   x[n] += sum over ranks, in their order, of weights[rank] * (down[n] . hidden[rank])      experts_down
//
// bank0 ...  three memories that may hold experts: two of slots, because one buffer may not be larger than three
//            quarters of a Mac's memory, and the resident weights for the shared expert. ExpertForm.bank picks one.
// forms      ExpertForm [any], one for each kind of block in each bank
// places     Place [n]: which experts, and where they lie
// x          gate_up: float, the normed stream spread over whole units (matrix.h); down: the stream [D], added to
// hidden     float [ranks, hidden_stride], each row spread over hidden_stride / UNIT units
// weights    float [ranks]
//
// experts_gate_up may be called for some of the experts now and for the others when they have been read; experts_down
// is called once, with all places in the order of their ranks, so that the sum does not depend on what was in memory.
//
// Threads, gate_up: grid (rows of the widest expert, places), SIMDGROUPS simdgroups; a team of lanes computes
// GATE_UP_ROWS rows of gate and of up. down: grid (rows), one simdgroup for each place, up to 12, beyond
// which they take turns: each multiplies its expert by `chunks` times DOWN_ROWS rows a team, then the results meet in
// threadgroup memory. Bound by the bytes of the weights.
// Reference: run_experts, add_rows. Test: test_metal_matrices.py.

constant constexpr uint MAX_PLACES = 32;
constant constexpr uint GATE_UP_ROWS = 2;
constant constexpr uint DOWN_ROWS = 4;
constant constexpr uint MAX_CHUNKS = 4;
constant constexpr uint MAX_ROWS = 64;  // of a threadgroup of experts_down: chunks * 32 / lanes * DOWN_ROWS, lanes >= 8

struct GateUpShape {
  uint shift;  // a team has two to the power of it lanes
  uint hidden_stride;
};

struct DownShape {
  uint places;
  uint chunks;
  uint shift;  // a team has two to the power of it lanes
  uint hidden_stride;
  uint rows;
};

[[kernel, max_total_threads_per_threadgroup(128)]] void experts_gate_up(device const uchar* bank0 [[buffer(0)]],
    device const uchar* bank1 [[buffer(1)]], device const uchar* bank2 [[buffer(2)]],
    constant ExpertForm* forms [[buffer(3)]], constant Place* places [[buffer(4)]], device const float* x [[buffer(5)]],
    device float* hidden [[buffer(6)]], constant GateUpShape& shape [[buffer(7)]],
    uint3 group [[threadgroup_position_in_grid]], uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  constant ExpertForm& form = forms[places[group.y].form];
  device const uchar* expert = expert_at(bank0, bank1, bank2, form.bank, places[group.y].offset);
  const uint units = shape.hidden_stride / UNIT, lanes = 1u << shape.shift, first = lane & (lanes - 1);
  const uint row = (((group.x * SIMDGROUPS + simdgroup) * 32 + lane) >> shape.shift) * GATE_UP_ROWS;
  const Weights projections[2] = {weights_at(expert, form.gate), weights_at(expert, form.up)};
  const uint x_units = count_units(form.gate.columns);
  const Walk walk = {first, x_units, lanes, 0, x_units};
  device const float4* inputs = (device const float4*)x;
  float sums[2 * GATE_UP_ROWS];
  for (uint r = 0; r < 2 * GATE_UP_ROWS; r++) sums[r] = 0.0f;
  if (form.gate.storage == form.up.storage && form.gate.storage <= 4) {
    add_products<2, GATE_UP_ROWS>(projections, row, walk, inputs, sums);
  } else {
    add_products<1, GATE_UP_ROWS>(projections, row, walk, inputs, sums);
    add_products<1, GATE_UP_ROWS>(projections + 1, row, walk, inputs, sums + GATE_UP_ROWS);
  }
  team_sums<2 * GATE_UP_ROWS>(sums, shape.shift);
  if (first > 0) return;
#pragma unroll
  for (uint r = 0; r < GATE_UP_ROWS; r++) {
    const float gate = sums[r], up = sums[GATE_UP_ROWS + r];
    if (row + r < form.gate.rows) {
      const uint place = spread_place(row + r, units);
      hidden[places[group.y].rank * shape.hidden_stride + place] = gate / (1.0f + exp(-gate)) * up;
    }
  }
}

[[kernel, max_total_threads_per_threadgroup(384)]] void experts_down(device const uchar* bank0 [[buffer(0)]],
    device const uchar* bank1 [[buffer(1)]], device const uchar* bank2 [[buffer(2)]],
    constant ExpertForm* forms [[buffer(3)]], constant Place* places [[buffer(4)]],
    device const float* hidden [[buffer(5)]], device const float* weights [[buffer(6)]], device float* x [[buffer(7)]],
    constant DownShape& shape [[buffer(8)]], uint3 group [[threadgroup_position_in_grid]],
    uint index [[thread_index_in_threadgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint simdgroups [[simdgroups_per_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  threadgroup float results[MAX_PLACES][MAX_ROWS];
  const uint lanes = 1u << shape.shift, team = lane >> shape.shift, in_chunk = (32 >> shape.shift) * DOWN_ROWS;
  const uint in_group = shape.chunks * in_chunk, first = group.x * in_group;
  for (uint p = simdgroup; p < shape.places; p += simdgroups) {
    constant Place& place = places[p];
    constant ExpertForm& form = forms[place.form];
    const float weight = weights[place.rank];
    const Weights w = weights_at(expert_at(bank0, bank1, bank2, form.bank, place.offset), form.down);
    const Walk walk = {lane & (lanes - 1), count_units(w.columns), lanes, 0, shape.hidden_stride / UNIT};
    device const float4* inputs = (device const float4*)(hidden + place.rank * shape.hidden_stride);
    for (uint row = team * DOWN_ROWS; row < in_group; row += in_chunk) {
      float sums[DOWN_ROWS];
      for (uint r = 0; r < DOWN_ROWS; r++) sums[r] = 0.0f;
      add_products<1, DOWN_ROWS>(&w, first + row, walk, inputs, sums);
      team_sums<DOWN_ROWS>(sums, shape.shift);
#pragma unroll
      for (uint r = 0; r < DOWN_ROWS; r++) {
        if (walk.first == 0) results[p][row + r] = weight * sums[r];
      }
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint i = index; i < in_group && first + i < shape.rows; i += simdgroups * 32) {
    float sum = 0.0f;
    for (uint p = 0; p < shape.places; p++) sum += results[p][i];
    x[first + i] += sum;
  }
}
