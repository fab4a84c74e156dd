#include <metal_stdlib>
using namespace metal;
#include "sums.h"
#include "attention.h"

// Attention of one token over its whole context, in two dispatches: splits of the context, then their sum and the gate.
//
//   out[h] = sigmoid(gate[h]) * sum over s of softmax(q[h] . keys[h / R, s] / sqrt(Dh)) values[h / R, s],  R = H / Hkv
//
// q             float [H, Dh]
// keys, values  float [Hkv, max_positions, Dh], filled up to and with `position`, int [1]
// partial       float [H, splits, Dh]: the weighted sum of a split, relative to the largest score in it
// stats         float [H, splits, 2]: that score and the sum of the weights
// gate          float: the gate of head h starts at h * 2 Dh + Dh, as the projection has it
// out           float [H, Dh]
//
// The number of splits is the grid's, whatever the context: a recorded dispatch stays right while the context grows.
// How many positions a split has follows from the context; splits beyond it write nothing, and nothing is read of them.
//
// Threads, attention_split: grid (Hkv, splits). The R heads that share keys and values are dealt to blocks of QUERIES,
// the positions to teams, and each team has a simdgroup for each block, so a row comes from memory once.
// attention_combine: grid (H, Dh / 32), a lane for each dimension, the splits dealt to the simdgroups. Bound by the
// bytes of keys and values. Reference: attention, gated. Test: test_metal_token.py.

constant constexpr uint SPLIT_POSITIONS = 32;  // a split has a multiple of these
constant constexpr uint MAX_SPLITS = 256;
constant constexpr uint SIMDGROUPS = 8;
constant constexpr uint COMBINE_SIMDGROUPS = 4;  // of attention_combine
constant constexpr uint BATCH = 8;               // splits of which a simdgroup of it reads at once

struct AttentionStepShape {
  uint heads;
  uint kv_heads;
  uint width;
  uint max_positions;
  uint splits;
};

inline uint positions_of_split(uint context, uint splits) {
  const uint each = (context + splits - 1) / splits;
  return (each + SPLIT_POSITIONS - 1) / SPLIT_POSITIONS * SPLIT_POSITIONS;
}

[[kernel, max_total_threads_per_threadgroup(256)]] void attention_split(device const float* q [[buffer(0)]],
    device const float* keys [[buffer(1)]], device const float* values [[buffer(2)]],
    device const int* position [[buffer(3)]], device float* partial [[buffer(4)]], device float* stats [[buffer(5)]],
    constant AttentionStepShape& shape [[buffer(6)]], uint3 group [[threadgroup_position_in_grid]],
    uint simdgroup [[simdgroup_index_in_threadgroup]], uint simdgroups [[simdgroups_per_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  threadgroup float tops[SIMDGROUPS * QUERIES];
  threadgroup float totals[SIMDGROUPS * QUERIES];
  threadgroup float sums[SIMDGROUPS * MAX_WIDTH];
  const uint context = uint(position[0]) + 1, width = shape.width, sharing = shape.heads / shape.kv_heads;
  const uint each = positions_of_split(context, shape.splits), start = group.y * each;
  if (start >= context) return;
  const uint end = min(start + each, context);
  const uint blocks = (sharing + QUERIES - 1) / QUERIES, teams = simdgroups / blocks;
  const uint block = simdgroup % blocks, team = simdgroup / blocks;
  const uint head = group.x * sharing + block * QUERIES, heads_here = min(QUERIES, sharing - block * QUERIES);
  const ulong cache = ulong(group.x) * shape.max_positions * width;
  float sum[QUERIES * EACH];
  float largest, total;
  const uint first = start + team * STEP, stride = teams * STEP;
  keys += cache;
  values += cache;
  q += head * width;
  if (width % 4 == 0) {
    walk_positions<true>(
        q, width, heads_here, keys, values, width, first, end, stride, end, lane, sum, &largest, &total);
  } else {
    walk_positions<false>(
        q, width, heads_here, keys, values, width, first, end, stride, end, lane, sum, &largest, &total);
  }
  for (uint mask = 1; mask < STEP; mask *= 2) total += simd_shuffle_xor(total, mask);
  if (lane % STEP == 0) {
    tops[simdgroup * QUERIES + lane / STEP] = largest;
    totals[simdgroup * QUERIES + lane / STEP] = total;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  float top = -INFINITY;
  for (uint t = 0; t < teams; t++) top = max(top, tops[(t * blocks + block) * QUERIES + lane / STEP]);
  total = 0.0f;
  for (uint t = 0; t < teams; t++) {
    const uint i = (t * blocks + block) * QUERIES + lane / STEP;
    total = fma(totals[i], exp(tops[i] - top), total);
  }
  const float own = exp(largest - top);  // 0 where a team had no position
  for (uint h = 0; h < QUERIES; h++) {
    const float factor = simd_shuffle(own, h * STEP);
    for (uint j = 0; j < EACH; j++) {
      sum[h * EACH + j] *= factor;
      sums[simdgroup * MAX_WIDTH + j * 32 + lane] = sum[h * EACH + j];
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (team == 0 && h < heads_here) {
      for (uint t = 1; t < teams; t++) {
        threadgroup const float* other = sums + (t * blocks + block) * MAX_WIDTH;
        for (uint j = 0; j < EACH; j++) sum[h * EACH + j] += other[j * 32 + lane];
      }
      device float* out = partial + ((head + h) * shape.splits + group.y) * ulong(width);
      for (uint j = 0; j < EACH; j++) {
        const uint i = j / 4 * 128 + 4 * lane + j % 4;
        if (i < width) out[i] = sum[h * EACH + j];
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  if (team == 0 && lane % STEP == 0 && lane / STEP < heads_here) {
    const uint at = 2 * ((head + lane / STEP) * shape.splits + group.y);
    stats[at] = top;
    stats[at + 1] = total;
  }
}

// A column of the splits that a simdgroup takes from s on, on their way together.
inline void load_batch(device const float* part, uint width, uint s, uint filled, thread float* batch) {
  for (uint i = 0; i < BATCH; i++) batch[i] = part[ulong(min(s + i * COMBINE_SIMDGROUPS, filled - 1)) * width];
}

[[kernel, max_total_threads_per_threadgroup(128)]] void attention_combine(device const float* partial [[buffer(0)]],
    device const float* stats [[buffer(1)]], device const int* position [[buffer(2)]],
    device const float* gate [[buffer(3)]], device float* out [[buffer(4)]],
    constant AttentionStepShape& shape [[buffer(5)]], uint3 group [[threadgroup_position_in_grid]],
    uint index [[thread_index_in_threadgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  threadgroup float weights[MAX_SPLITS];
  threadgroup float tops[COMBINE_SIMDGROUPS];
  threadgroup float totals[COMBINE_SIMDGROUPS];
  threadgroup float sums[COMBINE_SIMDGROUPS * 32];
  const uint head = group.x, width = shape.width, context = uint(position[0]) + 1;
  const uint each = positions_of_split(context, shape.splits), filled = (context + each - 1) / each;
  const uint column = min(group.y * 32 + lane, width - 1);
  device const float* part = partial + ulong(head) * shape.splits * width + column;
  device const float* stat = stats + 2 * head * shape.splits;
  float batch[BATCH];
  load_batch(part, width, simdgroup, filled, batch);
  float top = -INFINITY;
  for (uint s = index; s < filled; s += COMBINE_SIMDGROUPS * 32) top = max(top, stat[2 * s]);
  top = simd_max(top);
  if (lane == 0) tops[simdgroup] = top;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const float largest = simd_max(tops[lane % COMBINE_SIMDGROUPS]);
  float total = 0.0f;
  for (uint s = index; s < filled; s += COMBINE_SIMDGROUPS * 32) {
    weights[s] = exp(stat[2 * s] - largest);
    total = fma(weights[s], stat[2 * s + 1], total);
  }
  total = threadgroup_sum(total, totals, simdgroup, COMBINE_SIMDGROUPS, lane);
  float sum = 0.0f;
  for (uint s = simdgroup; s < filled; s += COMBINE_SIMDGROUPS * BATCH) {
    for (uint i = 0; i < BATCH; i++) {
      if (s + i * COMBINE_SIMDGROUPS < filled) sum = fma(weights[s + i * COMBINE_SIMDGROUPS], batch[i], sum);
    }
    load_batch(part, width, s + COMBINE_SIMDGROUPS * BATCH, filled, batch);
  }
  sums[index] = sum;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (simdgroup == 0 && group.y * 32 + lane < width) {
    for (uint i = 1; i < COMBINE_SIMDGROUPS; i++) sum += sums[i * 32 + lane];
    out[head * width + column] = sum / total * sigmoid(gate[head * 2 * width + width + column]);
  }
}
