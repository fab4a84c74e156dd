#include <metal_stdlib>
using namespace metal;
#include "matrix.h"
#include "sums.h"
#include "packed.h"
#include "byte_numbers.h"
#include "vector.h"

// metal/experts.metal on NVIDIA's matrix units for bytes: the same formulas and arguments, but for
//
// hidden     float [ranks, hidden_stride]: of each rank the products, spread over `units` units, whole strips; then
//            their digits; then KNOWN_QUADS for each 64 of them (fetch_vector): four worths of a first digit, as
//            bfloat16, each for the 16 products of one tile; the four tiles' sums in the first unit, and in the second
//
// Threads, gate_up: grid (units * 2, places); of a threadgroup's four simdgroups two multiply a tile of gate, two one
// of up, each half of the columns. A tile's products are those that one product of down takes of two units. down: grid
// (rows / TILE_ROWS), a simdgroup for each place, up to DOWN_SIMDGROUPS, beyond which they take turns.
// experts_gate_up_few and experts_down_few are for up to FEW_PLACES: fewer threadgroups on a multiprocessor, or fewer
// simdgroups in one, and more registers for each. Tiles as in vector.h. Bound by the bytes of the weights, and the more
// by products and by a kernel's start and end the fewer bits they have. Reference: run_experts, add_rows. Test:
// test_metal_matrices.py.

constant constexpr uint GATE_UP_THREADS = 128;
constant constexpr uint X_UNITS = 128;        // at most
constant constexpr uint X_QUADS = 771;        // for their digits, and zeros
constant constexpr uint X_KNOWN = 64;
constant constexpr uint GATE_UP_LINES = 512;  // for 16 words of each simdgroup
constant constexpr uint DOWN_SIMDGROUPS = 11;
constant constexpr uint FEW_PLACES = 10;
constant constexpr uint HIDDEN_QUADS = 192;   // of a simdgroup: for the digits of 32 units, at most
constant constexpr uint HIDDEN_KNOWN = 16;
constant constexpr uint HIDDEN_LINES = 64;    // for 8 words
constant constexpr uint DOWN_QUADS = 2115;    // for all simdgroups, and zeros
constant constexpr uint DOWN_KNOWN = 176;
constant constexpr uint DOWN_LINES = 704;
constant constexpr uint FEW_QUADS = 1923;
constant constexpr uint FEW_KNOWN = 160;
constant constexpr uint FEW_LINES = 640;

struct ExpertsShape {
  uint places;
  uint x_units;
  uint units;  // that a rank's products are spread over: whole strips
  uint hidden_stride;
  uint rows;
};

// The `tile`-th tile of a rank's products to both their forms. value: a row's in lanes 0 to 15, zero in the others.
inline void put_hidden(float value, TileRows rows, uint tile, uint units, uint lane, device float* hidden) {
  const uint row = row_at(rows, lane % TILE_ROWS), at = row % HALF_UNIT;
  const Scaling scaling = scaling_of(simd_max(max_magnitude(0.0f, value)));
  const uint number = number_of(value, scaling.factor);
  float total = value;
#pragma unroll
  for (uint i = 4; i > 0; i /= 2) total += simd_shuffle_xor(total, i);
  if (lane >= TILE_ROWS) return;
  hidden[spread_place(row, units)] = value;
  device uchar* digits = (device uchar*)(hidden + units * UNIT) + row / UNIT * (UNIT_QUADS * 16);
  digits += row % UNIT / HALF_UNIT * 16 + at % 4 * 4 + at / 4;
  digits[digit_place(0) * 4] = uchar(first_digit(number));
  digits[digit_place(1) * 4] = uchar(second_digit(number));
  digits[digit_place(2) * 4] = uchar(third_digit(number));
  device float* known = hidden + units * (UNIT + UNIT_QUADS * 4) + tile / 4 * (KNOWN_QUADS * 4);
  if (lane == 0) ((device ushort*)known)[tile % 4] = ushort(as_type<uint>(scaling.worth) >> 16);
  if (lane % 8 == 0) known[4 + lane / 8 * 4 + tile % 4] = total;
}

struct Memory {  // of a threadgroup
  threadgroup uint4* digits;
  threadgroup uint4* known;
  threadgroup uint4* lines;
  threadgroup uint4* zeros;
  threadgroup float* results;
};

// What experts_gate_up does.
inline void multiply_experts(device const uchar* bank0, device const uchar* bank1, device const uchar* bank2,
    constant ExpertForm* forms, constant Place* places, device const float* x, device float* hidden,
    constant ExpertsShape& shape, uint3 group, uint index, uint simdgroup, uint lane,
    thread const Memory& memory) {
  threadgroup float* results = memory.results;
  const Vector vector = {
      memory.digits, memory.known, memory.zeros, memory.lines + simdgroup * (16 * LINE_QUADS), nullptr, 0};
  // The kernel before may still be choosing the places, but x was there before it let this one begin.
  const uint x_units = shape.x_units, half_units = (x_units + STRIP_UNITS - 1) / STRIP_UNITS * STRIP_UNITS * 2;
#pragma unroll
  for (uint k = 0; k < 2; k++) {
    const uint half_unit = index + k * GATE_UP_THREADS;
    if (half_unit < half_units) put_half_unit((device const float4*)x, x_units, half_unit, vector);
  }
  if (index < ZERO_QUADS - ZERO_PLACE) memory.zeros[index] = 0;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  wait_for_last();
  launch_next();  // experts_down, which reads places, weights and x before it waits
  constant Place& place = places[group.y];
  constant ExpertForm& form = forms[place.form];
  device const uchar* expert = expert_at(bank0, bank1, bank2, form.bank, place.offset);
  device float* own = hidden + place.rank * shape.hidden_stride;
  const uint count = form.gate.rows;
  const TileRows rows = rows_of(group.x / 4, group.x % 4, form.down.storage == 2);
  if (rows.first >= count) {  // of a smaller expert, all lanes alike
    if (simdgroup == 0) put_hidden(0.0f, rows, group.x, shape.units, lane, own);
    return;
  }
  const Weights w = weights_at(expert, simdgroup % 2 ? form.up : form.gate);
  const uint spans = (x_units + SPAN_UNITS - 1) / SPAN_UNITS;
  const uint each = (half_units / 4 + STRIP_UNITS - 1) / STRIP_UNITS * STRIP_SPANS;  // whole strips
  const uint first = simdgroup / 2 * each;
  const Share share = {min(first, spans), min(first + each, spans)};
  if (w.storage >= BF16) {
    multiply_plain(w, rows, share, x, x_units, lane, results + simdgroup * TILE_ROWS);
  } else {
    put_sums(multiply_tile<false>(w, rows, share, vector, lane), lane, results + simdgroup * TILE_ROWS);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (simdgroup == 0) {
    const uint i = lane % TILE_ROWS;
    const float gate = results[i] + results[2 * TILE_ROWS + i];
    const float up = results[TILE_ROWS + i] + results[3 * TILE_ROWS + i];
    const bool is_row = lane < TILE_ROWS && row_at(rows, i) < count;
    put_hidden(is_row ? silu(gate) * up : 0.0f, rows, group.x, shape.units, lane, own);
  }
}

[[kernel, max_total_threads_per_threadgroup(128)]] void experts_gate_up(device const uchar* bank0 [[buffer(0)]],
    device const uchar* bank1 [[buffer(1)]], device const uchar* bank2 [[buffer(2)]],
    constant ExpertForm* forms [[buffer(3)]], constant Place* places [[buffer(4)]], device const float* x [[buffer(5)]],
    device float* hidden [[buffer(6)]], constant ExpertsShape& shape [[buffer(7)]],
    uint3 group [[threadgroup_position_in_grid]], uint index [[thread_index_in_threadgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  threadgroup uint4 digits[X_QUADS];
  threadgroup uint4 known[X_KNOWN];
  threadgroup uint4 lines[GATE_UP_LINES];
  threadgroup float results[4][TILE_ROWS];
  const Memory memory = {digits, known, lines, digits + (X_UNITS * UNIT_QUADS + ZERO_PLACE), results[0]};
  multiply_experts(bank0, bank1, bank2, forms, places, x, hidden, shape, group, index, simdgroup, lane, memory);
}

// The same text: how many threadgroups a multiprocessor holds differs (msl.py).
[[kernel, max_total_threads_per_threadgroup(128)]] void experts_gate_up_few(device const uchar* bank0 [[buffer(0)]],
    device const uchar* bank1 [[buffer(1)]], device const uchar* bank2 [[buffer(2)]],
    constant ExpertForm* forms [[buffer(3)]], constant Place* places [[buffer(4)]], device const float* x [[buffer(5)]],
    device float* hidden [[buffer(6)]], constant ExpertsShape& shape [[buffer(7)]],
    uint3 group [[threadgroup_position_in_grid]], uint index [[thread_index_in_threadgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  threadgroup uint4 digits[X_QUADS];
  threadgroup uint4 known[X_KNOWN];
  threadgroup uint4 lines[GATE_UP_LINES];
  threadgroup float results[4][TILE_ROWS];
  const Memory memory = {digits, known, lines, digits + (X_UNITS * UNIT_QUADS + ZERO_PLACE), results[0]};
  multiply_experts(bank0, bank1, bank2, forms, places, x, hidden, shape, group, index, simdgroup, lane, memory);
}

// What experts_down does.
inline void add_experts(device const uchar* bank0, device const uchar* bank1, device const uchar* bank2,
    constant ExpertForm* forms, constant Place* places, device const float* hidden, device const float* weights,
    device float* x, constant ExpertsShape& shape, uint3 group, uint index, uint simdgroup, uint simdgroups, uint lane,
    thread const Memory& memory) {
  launch_next();
  const uint row = group.x * TILE_ROWS;
  if (index < ZERO_QUADS - ZERO_PLACE) memory.zeros[index] = 0;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  threadgroup float* own = memory.results + simdgroup * TILE_ROWS;
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
      multiply_plain(w, TileRows{row, TOGETHER}, share, inputs, shape.units, lane, own);
    } else {
      const Vector vector = {memory.digits + simdgroup * HIDDEN_QUADS, memory.known + simdgroup * HIDDEN_KNOWN,
          memory.zeros, memory.lines + simdgroup * HIDDEN_LINES,
          (device const uint4*)(inputs + shape.units * UNIT), shape.units};
      put_sums(multiply_tile<true>(w, {row, TOGETHER}, share, vector, lane), lane, own);
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
    sum = fma(weight, own[lane % TILE_ROWS], sum);
    simdgroup_barrier(mem_flags::mem_threadgroup);
  }
  if (lane < TILE_ROWS) own[lane] = sum;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (index < TILE_ROWS && row + index < shape.rows) {
    float total = 0.0f;
    for (uint i = 0; i < simdgroups; i++) total += memory.results[i * TILE_ROWS + index];
    x[row + index] = before + total;
  }
}

[[kernel, max_total_threads_per_threadgroup(352)]] void experts_down(device const uchar* bank0 [[buffer(0)]],
    device const uchar* bank1 [[buffer(1)]], device const uchar* bank2 [[buffer(2)]],
    constant ExpertForm* forms [[buffer(3)]], constant Place* places [[buffer(4)]],
    device const float* hidden [[buffer(5)]], device const float* weights [[buffer(6)]], device float* x [[buffer(7)]],
    constant ExpertsShape& shape [[buffer(8)]], uint3 group [[threadgroup_position_in_grid]],
    uint index [[thread_index_in_threadgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint simdgroups [[simdgroups_per_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  threadgroup uint4 digits[DOWN_QUADS];
  threadgroup uint4 known[DOWN_KNOWN];
  threadgroup uint4 lines[DOWN_LINES];
  threadgroup float results[DOWN_SIMDGROUPS][TILE_ROWS];
  const Memory memory = {digits, known, lines, digits + (DOWN_SIMDGROUPS * HIDDEN_QUADS + ZERO_PLACE), results[0]};
  add_experts(bank0, bank1, bank2, forms, places, hidden, weights, x, shape, group, index, simdgroup, simdgroups, lane,
      memory);
}

[[kernel, max_total_threads_per_threadgroup(320)]] void experts_down_few(device const uchar* bank0 [[buffer(0)]],
    device const uchar* bank1 [[buffer(1)]], device const uchar* bank2 [[buffer(2)]],
    constant ExpertForm* forms [[buffer(3)]], constant Place* places [[buffer(4)]],
    device const float* hidden [[buffer(5)]], device const float* weights [[buffer(6)]], device float* x [[buffer(7)]],
    constant ExpertsShape& shape [[buffer(8)]], uint3 group [[threadgroup_position_in_grid]],
    uint index [[thread_index_in_threadgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint simdgroups [[simdgroups_per_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  threadgroup uint4 digits[FEW_QUADS];
  threadgroup uint4 known[FEW_KNOWN];
  threadgroup uint4 lines[FEW_LINES];
  threadgroup float results[FEW_PLACES][TILE_ROWS];
  const Memory memory = {digits, known, lines, digits + (FEW_PLACES * HIDDEN_QUADS + ZERO_PLACE), results[0]};
  add_experts(bank0, bank1, bank2, forms, places, hidden, weights, x, shape, group, index, simdgroup, simdgroups, lane,
      memory);
}
