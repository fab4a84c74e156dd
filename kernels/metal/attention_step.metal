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
// stats         float [H, splits, 2]: that score (-inf in an empty split) and the sum of the weights
// gate          float: the gate of head h starts at h * 2 Dh + Dh, as the projection has it
// out           float [H, Dh]
//
// The number of splits is the grid's, whatever the context: a recorded dispatch stays right while the context grows.
//
// Threads, attention_split: grid (Hkv, splits), one simdgroup for each of the R heads that share keys and values, which
// so come from memory once; a lane holds every 32nd dimension; the softmax is taken along the way (online).
// attention_combine: grid (H), one thread for each dimension. Bound by the bytes of keys and values. Reference:
// attention, gated. Test: test_metal_token.py.

constant constexpr uint EACH = 8;  // dimensions of a lane: Dh <= 256

struct AttentionStepShape {
  uint heads;
  uint kv_heads;
  uint width;
  uint max_positions;
  uint splits;
};

[[kernel, max_total_threads_per_threadgroup(1024)]] void attention_split(device const float* q [[buffer(0)]],
    device const float* keys [[buffer(1)]], device const float* values [[buffer(2)]],
    device const int* position [[buffer(3)]], device float* partial [[buffer(4)]], device float* stats [[buffer(5)]],
    constant AttentionStepShape& shape [[buffer(6)]], uint3 group [[threadgroup_position_in_grid]],
    uint simdgroup [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  const uint context = uint(position[0]) + 1, width = shape.width;
  const uint each = (context + shape.splits - 1) / shape.splits;
  const uint first = min(group.y * each, context), end = min(first + each, context);
  const uint head = group.x * (shape.heads / shape.kv_heads) + simdgroup;
  device const float* key = keys + ulong(group.x) * shape.max_positions * width;
  device const float* value = values + ulong(group.x) * shape.max_positions * width;
  const float scale = rsqrt(float(width));
  float query[EACH];
  float sum[EACH];
  for (uint j = 0; j < EACH; j++) {
    const uint i = lane + 32 * j;
    query[j] = i < width ? q[head * width + i] * scale : 0.0f;
    sum[j] = 0.0f;
  }
  float largest = -INFINITY, total = 0.0f;
  for (uint s = first; s < end; s++) {
    float score = 0.0f;
    for (uint j = 0; j < EACH; j++) {
      const uint i = lane + 32 * j;
      if (i < width) score = fma(query[j], key[ulong(s) * width + i], score);
    }
    score = simd_sum(score);
    const float top = max(largest, score);
    const float kept = exp(largest - top), weight = exp(score - top);
    for (uint j = 0; j < EACH; j++) {
      const uint i = lane + 32 * j;
      if (i < width) sum[j] = fma(weight, value[ulong(s) * width + i], sum[j] * kept);
    }
    total = fma(total, kept, weight);
    largest = top;
  }
  const uint at = head * shape.splits + group.y;
  for (uint j = 0; j < EACH; j++) {
    const uint i = lane + 32 * j;
    if (i < width) partial[ulong(at) * width + i] = sum[j];
  }
  if (lane == 0) {
    stats[2 * at] = largest;
    stats[2 * at + 1] = total;
  }
}

[[kernel, max_total_threads_per_threadgroup(256)]] void attention_combine(device const float* partial [[buffer(0)]],
    device const float* stats [[buffer(1)]], device const float* gate [[buffer(2)]], device float* out [[buffer(3)]],
    constant AttentionStepShape& shape [[buffer(4)]], uint3 group [[threadgroup_position_in_grid]],
    uint index [[thread_index_in_threadgroup]]) {
  const uint head = group.x, width = shape.width, splits = shape.splits;
  if (index >= width) return;
  float largest = -INFINITY;
  for (uint i = 0; i < splits; i++) largest = max(largest, stats[2 * (head * splits + i)]);
  float sum = 0.0f, total = 0.0f;
  for (uint i = 0; i < splits; i++) {
    const uint at = head * splits + i;
    const float weight = exp(stats[2 * at] - largest);  // 0 for an empty split
    sum = fma(weight, partial[ulong(at) * width + index], sum);
    total = fma(weight, stats[2 * at + 1], total);
  }
  out[head * width + index] = sum / total * sigmoid(gate[head * 2 * width + width + index]);
}
