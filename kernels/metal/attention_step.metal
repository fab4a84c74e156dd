#include <metal_stdlib>
using namespace metal;
#include "sums.h"

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
// Threads, attention_split: grid (Hkv, splits). The R heads that share keys and values are dealt to blocks of HEADS, the
// positions to teams, and each team has a simdgroup for each block, so a row comes from memory once. A simdgroup takes
// STEP positions at once: a lane holds two times four dimensions, the HEADS x STEP scores are summed over the lanes
// together, one for each lane, and the softmax is taken along the way (online). attention_combine: grid (H, Dh / 32), a
// lane for each dimension, the splits dealt to the simdgroups. Bound by the bytes of keys and values. Reference:
// attention, gated. Test: test_metal_token.py.

constant constexpr uint SPLIT_POSITIONS = 32;  // a split has a multiple of these
constant constexpr uint MAX_SPLITS = 256;
constant constexpr uint HEADS = 4;
constant constexpr uint STEP = 8;
constant constexpr uint SIMDGROUPS = 8;
constant constexpr uint COMBINING = 4;  // simdgroups of attention_combine
constant constexpr uint BATCH = 8;      // splits of which a simdgroup reads at once
constant constexpr uint EACH = 8;  // dimensions of a lane: Dh <= 256
constant constexpr uint MAX_WIDTH = 256;

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

// Dimensions 4 lane to 4 lane + 3 of a row, and those 128 further on; zero beyond its width.
template <bool QUADS>
inline void load_dimensions(device const float* row, uint width, uint lane, thread float* out) {
  for (uint j = 0; j < EACH; j += 4) {
    const uint i = 32 * j + 4 * lane;
    if (QUADS) {
      const float4 quad = i < width ? *(device const float4*)(row + i) : float4(0.0f);
      out[j] = quad.x;
      out[j + 1] = quad.y;
      out[j + 2] = quad.z;
      out[j + 3] = quad.w;
    } else {
      for (uint c = 0; c < 4; c++) out[j + c] = i + c < width ? row[i + c] : 0.0f;
    }
  }
}

// Positions first, first + stride, ... up to the end, STEP of them each time. Lane h * STEP + p has head h's `largest`
// score so far, and the `total` weight of every STEP-th position.
template <bool QUADS>
inline void walk_positions(device const float* keys, device const float* values, uint width, uint first, uint end,
    uint stride, thread const float* query, uint lane, thread float* sum, thread float* largest, thread float* total) {
  for (uint s = first; s < end; s += stride) {
    float scores[HEADS * STEP];
    float row[EACH];
    for (uint p = 0; p < STEP; p++) {
      load_dimensions<QUADS>(keys + ulong(min(s + p, end - 1)) * width, width, lane, row);
      for (uint h = 0; h < HEADS; h++) {
        float score = 0.0f;
        for (uint j = 0; j < EACH; j++) score = fma(query[h * EACH + j], row[j], score);
        scores[h * STEP + p] = score;
      }
    }
    const float dealt = deal_sums(scores, lane);
    const float score = s + lane % STEP < end ? dealt : -INFINITY;
    float top = max(*largest, score);
    for (uint mask = 1; mask < STEP; mask *= 2) top = max(top, simd_shuffle_xor(top, mask));
    const float kept = exp(*largest - top), weight = exp(score - top);
    *total = fma(*total, kept, weight);
    *largest = top;
    for (uint h = 0; h < HEADS; h++) {
      const float factor = simd_shuffle(kept, h * STEP);
      for (uint j = 0; j < EACH; j++) sum[h * EACH + j] *= factor;
    }
    for (uint p = 0; p < STEP; p++) {
      load_dimensions<QUADS>(values + ulong(min(s + p, end - 1)) * width, width, lane, row);
      for (uint h = 0; h < HEADS; h++) {
        const float share = simd_shuffle(weight, h * STEP + p);
        for (uint j = 0; j < EACH; j++) sum[h * EACH + j] = fma(share, row[j], sum[h * EACH + j]);
      }
    }
  }
}

[[kernel, max_total_threads_per_threadgroup(256)]] void attention_split(device const float* q [[buffer(0)]],
    device const float* keys [[buffer(1)]], device const float* values [[buffer(2)]],
    device const int* position [[buffer(3)]], device float* partial [[buffer(4)]], device float* stats [[buffer(5)]],
    constant AttentionStepShape& shape [[buffer(6)]], uint3 group [[threadgroup_position_in_grid]],
    uint simdgroup [[simdgroup_index_in_threadgroup]], uint simdgroups [[simdgroups_per_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  threadgroup float tops[SIMDGROUPS * HEADS];
  threadgroup float totals[SIMDGROUPS * HEADS];
  threadgroup float sums[SIMDGROUPS * MAX_WIDTH];
  const uint context = uint(position[0]) + 1, width = shape.width, sharing = shape.heads / shape.kv_heads;
  const uint each = positions_of_split(context, shape.splits), start = group.y * each;
  if (start >= context) return;
  const uint end = min(start + each, context);
  const uint blocks = (sharing + HEADS - 1) / HEADS, teams = simdgroups / blocks;
  const uint block = simdgroup % blocks, team = simdgroup / blocks;
  const uint head = group.x * sharing + block * HEADS, heads_here = min(HEADS, sharing - block * HEADS);
  const ulong cache = ulong(group.x) * shape.max_positions * width;
  const bool has_quads = width % 4 == 0;
  const float scale = rsqrt(float(width));
  float query[HEADS * EACH];
  float sum[HEADS * EACH];
  for (uint h = 0; h < HEADS; h++) {
    load_dimensions<false>(q + (head + min(h, heads_here - 1)) * width, width, lane, query + h * EACH);
    for (uint j = 0; j < EACH; j++) {
      query[h * EACH + j] *= scale;
      sum[h * EACH + j] = 0.0f;
    }
  }
  float largest = -INFINITY, total = 0.0f;
  const uint first = start + team * STEP, stride = teams * STEP;
  if (has_quads) {
    walk_positions<true>(
        keys + cache, values + cache, width, first, end, stride, query, lane, sum, &largest, &total);
  } else {
    walk_positions<false>(
        keys + cache, values + cache, width, first, end, stride, query, lane, sum, &largest, &total);
  }
  for (uint mask = 1; mask < STEP; mask *= 2) total += simd_shuffle_xor(total, mask);
  if (lane % STEP == 0) {
    tops[simdgroup * HEADS + lane / STEP] = largest;
    totals[simdgroup * HEADS + lane / STEP] = total;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  float top = -INFINITY;
  for (uint t = 0; t < teams; t++) top = max(top, tops[(t * blocks + block) * HEADS + lane / STEP]);
  total = 0.0f;
  for (uint t = 0; t < teams; t++) {
    const uint i = (t * blocks + block) * HEADS + lane / STEP;
    total = fma(totals[i], exp(tops[i] - top), total);
  }
  const float own = exp(largest - top);  // 0 where a team had no position
  for (uint h = 0; h < HEADS; h++) {
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

[[kernel, max_total_threads_per_threadgroup(128)]] void attention_combine(device const float* partial [[buffer(0)]],
    device const float* stats [[buffer(1)]], device const int* position [[buffer(2)]],
    device const float* gate [[buffer(3)]], device float* out [[buffer(4)]],
    constant AttentionStepShape& shape [[buffer(5)]], uint3 group [[threadgroup_position_in_grid]],
    uint index [[thread_index_in_threadgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  threadgroup float weights[MAX_SPLITS];
  threadgroup float tops[COMBINING];
  threadgroup float totals[COMBINING];
  threadgroup float sums[COMBINING * 32];
  const uint head = group.x, width = shape.width, context = uint(position[0]) + 1;
  const uint each = positions_of_split(context, shape.splits), filled = (context + each - 1) / each;
  device const float* stat = stats + 2 * head * shape.splits;
  float top = -INFINITY;
  for (uint s = index; s < filled; s += COMBINING * 32) top = max(top, stat[2 * s]);
  top = simd_max(top);
  if (lane == 0) tops[simdgroup] = top;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const float largest = simd_max(tops[lane % COMBINING]);
  float total = 0.0f;
  for (uint s = index; s < filled; s += COMBINING * 32) {
    weights[s] = exp(stat[2 * s] - largest);
    total = fma(weights[s], stat[2 * s + 1], total);
  }
  total = threadgroup_sum(total, totals, simdgroup, COMBINING, lane);
  const uint column = min(group.y * 32 + lane, width - 1);
  device const float* part = partial + ulong(head) * shape.splits * width + column;
  float sum = 0.0f;
  for (uint s = simdgroup; s < filled; s += COMBINING * BATCH) {
    float batch[BATCH];  // on their way together
    for (uint i = 0; i < BATCH; i++) batch[i] = part[ulong(min(s + i * COMBINING, filled - 1)) * width];
    for (uint i = 0; i < BATCH; i++) {
      if (s + i * COMBINING < filled) sum = fma(weights[s + i * COMBINING], batch[i], sum);
    }
  }
  sums[index] = sum;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (simdgroup == 0 && group.y * 32 + lane < width) {
    for (uint i = 1; i < COMBINING; i++) sum += sums[i * 32 + lane];
    out[head * width + column] = sum / total * sigmoid(gate[head * 2 * width + width + column]);
  }
}
