#include <metal_stdlib>
using namespace metal;
#include "matrix.h"
#include "order.h"
#include "sums.h"

// The router's choice: the K most probable of E experts, best first, a tie to the lower id, and their weights.
//
//   weights[k] = p[k] / sum of p over the chosen,   p = softmax(logits)
//   weights[K] = sigmoid(the shared expert's gate)
//
// logits   float [R, E + 1]; the last column belongs to the shared expert
// ids      int [R, K]
// weights  float [R, K + 1]
// table    Place [E + 1]: where each expert of this layer lies, and the shared one. Only read if places_wanted
// places   Place [K + 1], of row 0: the table's entries of the chosen, with their ranks. Only written if places_wanted
//
// Whatever the logits are, the ids are below E and differ; NaN comes after all numbers.
//
// Threads: grid (R), one simdgroup; a lane holds every 32nd logit, as an integer of the same order, and takes one of
// the choices. Bound by the latency of two reductions a choice. Reference: choose_experts. Test: test_metal_token.py.

constant constexpr uint MAX_EACH = 32;  // experts of a lane: E <= 1024

struct ChooseShape {
  uint experts;
  uint chosen;
  uint places_wanted;
};

// In lane k the k-th best of the experts and the place of its logit in the order of floats.
template <uint EACH>
inline void choose(
    device const float* row, uint experts, uint chosen, uint lane, thread uint* chosen_id, thread uint* chosen_order) {
  uint left[EACH];
  for (uint j = 0; j < EACH; j++) left[j] = j * 32 + lane < experts ? order_of(row[j * 32 + lane], LOWEST) : NOTHING;
  for (uint k = 0; k < chosen; k++) {
    uint best = left[0];
    for (uint j = 1; j < EACH; j++) best = max(best, left[j]);
    const uint top = simd_max(best);
    uint lowest = experts - 1;
    for (uint j = 0; j < EACH; j++) lowest = min(lowest, left[j] == top ? j * 32 + lane : experts - 1);
    const uint id = simd_min(lowest);
    for (uint j = 0; j < EACH; j++) left[j] = j * 32 + lane == id ? NOTHING : left[j];
    if (lane == k) {
      *chosen_id = id;
      *chosen_order = top;
    }
  }
}

[[kernel, max_total_threads_per_threadgroup(32)]] void choose_experts(device const float* logits [[buffer(0)]],
    device int* ids [[buffer(1)]], device float* weights [[buffer(2)]], device const Place* table [[buffer(3)]],
    device Place* places [[buffer(4)]], constant ChooseShape& shape [[buffer(5)]],
    uint3 group [[threadgroup_position_in_grid]], uint lane [[thread_index_in_simdgroup]]) {
  const uint experts = shape.experts, chosen = shape.chosen;
  device const float* row = logits + group.x * (experts + 1);
  const float shared_gate = row[experts];
  uint id = experts, order = NOTHING;  // the lane after the last choice is the shared expert's
  if (experts <= 256) {
    choose<8>(row, experts, chosen, lane, &id, &order);
  } else if (experts <= 512) {
    choose<16>(row, experts, chosen, lane, &id, &order);
  } else {
    choose<MAX_EACH>(row, experts, chosen, lane, &id, &order);
  }
  const float largest = float_at(simd_shuffle(order, 0));
  const float part = lane < chosen ? exp(float_at(order) - largest) : 0.0f;
  const float total = simd_sum(part);
  if (lane < chosen) ids[group.x * chosen + lane] = int(id);
  if (lane > chosen) return;
  weights[group.x * (chosen + 1) + lane] = lane < chosen ? part / total : sigmoid(shared_gate);
  if (shape.places_wanted && group.x == 0) {
    places[lane].offset = table[id].offset;
    places[lane].form = table[id].form;
    places[lane].rank = lane;
  }
}
