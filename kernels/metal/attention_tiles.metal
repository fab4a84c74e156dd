#include <metal_stdlib>
using namespace metal;
#include "sums.h"
#include "attention.h"

// Causal attention of the last T positions of a context, for a prompt: no matrix of scores is ever written.
//
//   out[t, h] = sum over s <= S - T + t of softmax(q[t, h] . keys[h / R, s] / sqrt(Dh)) values[h / R, s],  R = H / Hkv
//
// q, out        float [T, H, Dh]
// keys, values  float, kv head i's [S, Dh] at i * kv_stride
//
// Threads: grid (Hkv, T R / (QUERIES * SIMDGROUPS)). A simdgroup takes QUERIES consecutive tokens of a head along the
// context; its neighbours take the same tokens of the heads that share keys and values, so that these come from memory
// once, and from the cache for the others. The last tokens come first: they have the longest way. Bound by arithmetic.
// Reference: attention. Test: test_metal_prefill.py.

constant constexpr uint SIMDGROUPS = 8;

struct AttentionTilesShape {
  uint heads;
  uint kv_heads;
  uint width;
  uint tokens;
  uint context;
  uint kv_stride;
};

[[kernel, max_total_threads_per_threadgroup(256)]] void attention_tiles(device const float* q [[buffer(0)]],
    device const float* keys [[buffer(1)]], device const float* values [[buffer(2)]], device float* out [[buffer(3)]],
    constant AttentionTilesShape& shape [[buffer(4)]], uint3 group [[threadgroup_position_in_grid]],
    uint simdgroup [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  const uint width = shape.width, tokens = shape.tokens, past = shape.context - tokens;
  const uint sharing = shape.heads / shape.kv_heads, blocks = (tokens + QUERIES - 1) / QUERIES;
  const uint place = group.y * SIMDGROUPS + simdgroup;
  if (place >= blocks * sharing) return;
  const uint head = group.x * sharing + place % sharing, first = (blocks - 1 - place / sharing) * QUERIES;
  const uint end = min(past + first + QUERIES, shape.context), limit = min(past + first + lane / STEP + 1, end);
  const uint stride = shape.heads * width, count = min(QUERIES, tokens - first);
  float sum[QUERIES * EACH];
  float largest, total;
  q += (ulong(first) * shape.heads + head) * width;
  keys += ulong(group.x) * shape.kv_stride;
  values += ulong(group.x) * shape.kv_stride;
  if (width % 4 == 0 && shape.kv_stride % 4 == 0) {
    walk_positions<true>(
        q, stride, count, keys, values, width, 0, end, STEP, limit, lane, sum, &largest, &total);
  } else {
    walk_positions<false>(
        q, stride, count, keys, values, width, 0, end, STEP, limit, lane, sum, &largest, &total);
  }
  for (uint mask = 1; mask < STEP; mask *= 2) total += simd_shuffle_xor(total, mask);
  for (uint n = 0; n < QUERIES; n++) {
    const float factor = 1.0f / simd_shuffle(total, n * STEP);
    device float* row = out + (ulong(first + n) * shape.heads + head) * width;
    for (uint j = 0; j < EACH; j++) {
      const uint i = j / 4 * 128 + 4 * lane + j % 4;
      if (i < width && first + n < tokens) row[i] = sum[n * EACH + j] * factor;
    }
  }
}
