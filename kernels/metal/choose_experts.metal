#include <metal_stdlib>
using namespace metal;
#include "matrix.h"
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
// Whatever the logits are, NaN included, the ids are below E.
//
// Threads: grid (R), one simdgroup; a lane holds every 32nd logit. Bound by the dispatch.
// Reference: choose_experts. Test: test_metal_token.py.

constant constexpr uint EACH = 32;  // experts of a lane: E <= 1024

struct ChooseShape {
  uint experts;
  uint chosen;
  uint places_wanted;
};

[[kernel, max_total_threads_per_threadgroup(32)]] void choose_experts(device const float* logits [[buffer(0)]],
    device int* ids [[buffer(1)]], device float* weights [[buffer(2)]], device const Place* table [[buffer(3)]],
    device Place* places [[buffer(4)]], constant ChooseShape& shape [[buffer(5)]],
    uint3 group [[threadgroup_position_in_grid]], uint lane [[thread_index_in_simdgroup]]) {
  const uint experts = shape.experts, chosen = shape.chosen;
  device const float* row = logits + group.x * (experts + 1);
  device float* row_weights = weights + group.x * (chosen + 1);
  float left[EACH];
  for (uint j = 0; j < EACH; j++) left[j] = j * 32 + lane < experts ? row[j * 32 + lane] : -INFINITY;
  float largest = 0.0f, total = 0.0f;
  for (uint k = 0; k < chosen; k++) {
    float best = -INFINITY;
    uint at = 0;
    for (uint j = 0; j < EACH; j++) {
      if (left[j] > best) {
        best = left[j];
        at = j;
      }
    }
    const float top = simd_max(best);
    const uint id = min(simd_min(best == top ? at * 32 + lane : experts - 1), experts - 1);
    for (uint j = 0; j < EACH; j++) {
      if (j * 32 + lane == id) left[j] = -INFINITY;
    }
    if (k == 0) largest = top;
    const float weight = exp(top - largest);
    total += weight;
    if (lane == 0) {
      ids[group.x * chosen + k] = int(id);
      row_weights[k] = weight;
      if (shape.places_wanted && group.x == 0) {
        places[k].offset = table[id].offset;
        places[k].form = table[id].form;
        places[k].rank = k;
      }
    }
  }
  if (lane == 0) {
    for (uint k = 0; k < chosen; k++) row_weights[k] /= total;
    row_weights[chosen] = sigmoid(row[experts]);
    if (shape.places_wanted && group.x == 0) {
      places[chosen].offset = table[experts].offset;
      places[chosen].form = table[experts].form;
      places[chosen].rank = chosen;
    }
  }
}
