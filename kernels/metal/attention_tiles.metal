#include <metal_stdlib>
using namespace metal;

// Causal attention of the last T positions of a context, for a prompt: no matrix of scores is ever written.
//
//   out[t, h] = sum over s <= S - T + t of softmax(q[t, h] . keys[h / R, s] / sqrt(Dh)) values[h / R, s],  R = H / Hkv
//
// q, out        float [T, H, Dh]
// keys, values  float, kv head i's [S, Dh] at i * kv_stride
//
// Threads: grid (H, T / (QUERIES * SIMDGROUPS)); a simdgroup takes QUERIES consecutive tokens of a head along the
// context, so that each key and value is read once for them; a lane holds every 32nd dimension; the softmax is taken
// along the way. Bound by arithmetic. Reference: attention. Test: test_metal_prefill.py.

constant constexpr uint QUERIES = 4;
constant constexpr uint SIMDGROUPS = 4;
constant constexpr uint EACH = 8;  // dimensions of a lane: Dh <= 256

struct AttentionTilesShape {
  uint heads;
  uint kv_heads;
  uint width;
  uint tokens;
  uint context;
  uint kv_stride;
};

[[kernel, max_total_threads_per_threadgroup(128)]] void attention_tiles(device const float* q [[buffer(0)]],
    device const float* keys [[buffer(1)]], device const float* values [[buffer(2)]], device float* out [[buffer(3)]],
    constant AttentionTilesShape& shape [[buffer(4)]], uint3 group [[threadgroup_position_in_grid]],
    uint simdgroup [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  const uint head = group.x, width = shape.width, tokens = shape.tokens;
  const uint first = (group.y * SIMDGROUPS + simdgroup) * QUERIES, past = shape.context - tokens;
  const ulong kv = ulong(head / (shape.heads / shape.kv_heads)) * shape.kv_stride;
  const float scale = rsqrt(float(width));
  float query[QUERIES][EACH];
  float sum[QUERIES][EACH];
  float largest[QUERIES];
  float total[QUERIES];
  for (uint n = 0; n < QUERIES; n++) {
    for (uint j = 0; j < EACH; j++) {
      const uint i = lane + 32 * j;
      const bool is_inside = i < width && first + n < tokens;
      query[n][j] = is_inside ? q[(ulong(first + n) * shape.heads + head) * width + i] * scale : 0.0f;
      sum[n][j] = 0.0f;
    }
    largest[n] = -INFINITY;
    total[n] = 0.0f;
  }
  const uint end = first < tokens ? min(past + first + QUERIES, shape.context) : 0u;
  for (uint s = 0; s < end; s++) {
    float key[EACH];
    float value[EACH];
    for (uint j = 0; j < EACH; j++) {
      const uint i = lane + 32 * j;
      key[j] = i < width ? keys[kv + ulong(s) * width + i] : 0.0f;
      value[j] = i < width ? values[kv + ulong(s) * width + i] : 0.0f;
    }
    for (uint n = 0; n < QUERIES; n++) {
      float score = 0.0f;
      for (uint j = 0; j < EACH; j++) score = fma(query[n][j], key[j], score);
      score = simd_sum(score);
      if (s <= past + first + n) {  // alike in all lanes
        const float top = max(largest[n], score);
        const float kept = exp(largest[n] - top), weight = exp(score - top);
        for (uint j = 0; j < EACH; j++) sum[n][j] = fma(weight, value[j], sum[n][j] * kept);
        total[n] = fma(total[n], kept, weight);
        largest[n] = top;
      }
    }
  }
  for (uint n = 0; n < QUERIES; n++) {
    for (uint j = 0; j < EACH; j++) {
      const uint i = lane + 32 * j;
      if (i < width && first + n < tokens) {
        out[(ulong(first + n) * shape.heads + head) * width + i] = sum[n][j] / total[n];
      }
    }
  }
}
