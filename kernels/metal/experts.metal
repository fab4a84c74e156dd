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
// x          float [D], normed, for gate_up; the stream [D], added to, for down
// hidden     float [ranks, hidden_stride]
// weights    float [ranks]
//
// experts_gate_up may be called for some of the experts now and for the others when they have been read; experts_down
// is called once, with all places in the order of their ranks, so that the sum does not depend on what was in memory.
//
// Threads, gate_up: grid (rows of the widest expert, places), SIMDGROUPS simdgroups; a team of lanes computes ROWS rows
// of gate and of up. down: grid (rows), one simdgroup for each place, up to 32: each multiplies the same rows by its
// expert, then the results meet in threadgroup memory. Bound by the bytes of the weights. Reference: run_experts,
// add_rows. Test: test_metal_matrices.py.

constant constexpr uint MAX_PLACES = 32;
constant constexpr uint MAX_ROWS = 16;  // of a threadgroup of experts_down: 32 / lanes * ROWS, so lanes >= 8

struct GateUpShape {
  uint lanes;
  uint hidden_stride;
};

struct DownShape {
  uint places;
  uint lanes;
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
  const uint lanes = shape.lanes;
  const uint row = group.x * (SIMDGROUPS * 32 / lanes * ROWS) + team_row(simdgroup, lane, lanes);
  const Weights projections[2] = {weights_at(expert, form.gate), weights_at(expert, form.up)};
  float sums[2 * ROWS];
  Norm none = {x, false, 0.0f};
  if (form.gate.storage == form.up.storage) {
    row_products<2>(projections, row, lane, lanes, x, none, sums);
  } else {
    for (uint m = 0; m < 2; m++) row_products<1>(projections + m, row, lane, lanes, x, none, sums + m * ROWS);
  }
  for (uint r = 0; r < ROWS; r++) {
    const float gate = team_sum(sums[r], lanes);
    const float up = team_sum(sums[ROWS + r], lanes);
    if (lane % lanes == 0 && row + r < form.gate.rows) {
      hidden[places[group.y].rank * shape.hidden_stride + row + r] = gate / (1.0f + exp(-gate)) * up;
    }
  }
}

[[kernel, max_total_threads_per_threadgroup(1024)]] void experts_down(device const uchar* bank0 [[buffer(0)]],
    device const uchar* bank1 [[buffer(1)]], device const uchar* bank2 [[buffer(2)]],
    constant ExpertForm* forms [[buffer(3)]], constant Place* places [[buffer(4)]],
    device const float* hidden [[buffer(5)]], device const float* weights [[buffer(6)]], device float* x [[buffer(7)]],
    constant DownShape& shape [[buffer(8)]], uint3 group [[threadgroup_position_in_grid]],
    uint index [[thread_index_in_threadgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  threadgroup float results[MAX_PLACES][MAX_ROWS];
  const uint lanes = shape.lanes, in_group = 32 / lanes * ROWS, first = group.x * in_group;
  constant Place& place = places[simdgroup];
  constant ExpertForm& form = forms[place.form];
  const Weights w = weights_at(expert_at(bank0, bank1, bank2, form.bank, place.offset), form.down);
  float sums[ROWS];
  Norm none = {hidden, false, 0.0f};
  const uint row = first + team_row(0, lane, lanes);
  row_products<1>(&w, row, lane, lanes, hidden + place.rank * shape.hidden_stride, none, sums);
  for (uint r = 0; r < ROWS; r++) {
    const float sum = team_sum(sums[r], lanes);
    if (lane % lanes == 0) results[simdgroup][lane / lanes * ROWS + r] = sum;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint i = index; i < in_group && first + i < shape.rows; i += shape.places * 32) {
    float sum = 0.0f;
    for (uint j = 0; j < shape.places; j++) sum = fma(weights[places[j].rank], results[j][i], sum);
    x[first + i] += sum;
  }
}
