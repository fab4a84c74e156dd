#include <metal_stdlib>
using namespace metal;
#include "order.h"

// The likeliest token of each row of logits, so that a greedy choice needs no logits on the host. In two dispatches,
// the best of each part of a row and the best of those.
//
//   ids[r] = the lowest i with logits[r, i] = largest[r],  largest[r] = max over i;  NaN if any logit is
//
// logits   float [R, V];   ids   int [R];   largest   float [R]
// part_ids, part_orders   int, uint [R, parts]: of each part the lowest id of the largest, and its order (order.h)
//
// Threads: argmax_parts: grid (parts, R), 8 simdgroups, PART logits each; argmax: grid (R), one simdgroup. Bound by the
// bytes of the logits. Reference: torch.argmax. Test: test_metal_token.py.

constant constexpr uint PART = 4096;
constant constexpr uint SIMDGROUPS = 8;
constant constexpr uint EACH = 16;  // logits of a thread

struct ArgmaxShape {
  uint width;
  uint parts;
};

// The largest of all lanes' orders, and the lowest of the ids that have it.
inline uint best_of_simdgroup(uint order, thread uint* id) {
  const uint top = simd_max(order);
  *id = simd_min(order == top ? *id : 0xffffffffu);
  return top;
}

[[kernel, max_total_threads_per_threadgroup(256)]] void argmax_parts(device const float* logits [[buffer(0)]],
    device int* part_ids [[buffer(1)]], device uint* part_orders [[buffer(2)]],
    constant ArgmaxShape& shape [[buffer(3)]], uint3 group [[threadgroup_position_in_grid]],
    uint index [[thread_index_in_threadgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  threadgroup uint orders[SIMDGROUPS];
  threadgroup uint ids[SIMDGROUPS];
  const uint first = group.x * PART + index, last = shape.width - 1;
  device const float* row = logits + ulong(group.y) * shape.width;
  float values[EACH];  // on their way together; beyond the end the last one again
  for (uint j = 0; j < EACH; j++) values[j] = row[min(first + j * SIMDGROUPS * 32, last)];
  uint best = NOTHING, id = last;
  for (uint j = 0; j < EACH; j++) {
    const uint order = order_of(values[j], HIGHEST);
    id = order > best ? min(first + j * SIMDGROUPS * 32, last) : id;
    best = max(best, order);
  }
  best = best_of_simdgroup(best, &id);
  if (lane == 0) {
    orders[simdgroup] = best;
    ids[simdgroup] = id;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  id = ids[lane % SIMDGROUPS];
  best = best_of_simdgroup(orders[lane % SIMDGROUPS], &id);
  if (index == 0) {
    part_ids[group.y * shape.parts + group.x] = int(id);
    part_orders[group.y * shape.parts + group.x] = best;
  }
}

[[kernel, max_total_threads_per_threadgroup(32)]] void argmax(device const int* part_ids [[buffer(0)]],
    device const uint* part_orders [[buffer(1)]], device int* ids [[buffer(2)]], device float* largest [[buffer(3)]],
    constant ArgmaxShape& shape [[buffer(4)]], uint3 group [[threadgroup_position_in_grid]],
    uint lane [[thread_index_in_simdgroup]]) {
  const uint first = group.x * shape.parts;
  uint best = NOTHING, id = shape.width - 1;
  for (uint i = lane; i < shape.parts; i += 32) {
    const uint order = part_orders[first + i];
    id = order > best ? uint(part_ids[first + i]) : id;
    best = max(best, order);
  }
  best = best_of_simdgroup(best, &id);
  if (lane == 0) {
    ids[group.x] = int(id);
    largest[group.x] = float_at(best);
  }
}
