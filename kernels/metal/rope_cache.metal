#include <metal_stdlib>
using namespace metal;

// Queries and keys normed and turned by their positions; keys and values into their caches. Everything between the
// projections of an attention layer and the attention itself.
//
//   head = rms_norm(head, q_norm or k_norm)
//   (x, y) of pair i = (x cos - y sin, y cos + x sin)      of the angle position * frequencies[i]
//
// projected    float [T, stride]: for each of H heads a query and its gate (Dh each), then Hkv keys, then Hkv values
// q_norm, k_norm   float [Dh], centred on zero
// frequencies  float [rotary / 2]: pairs are (i, i + rotary / 2), the other dimensions pass through
// position     int [1], of the first token
// q            float [T, H, Dh]
// keys, values float [Hkv, max_positions, Dh]: rows position .. position + T - 1 are written
//
// Threads: grid (H + 2 Hkv, T), one simdgroup for each head; a lane turns every 32nd pair. Bound by the dispatch.
// Reference: rms_norm, rope, KeyValueCache.append. Test: test_metal_token.py.

constant constexpr uint MAX_WIDTH = 256;
constant constexpr uint PAIRS = 4;  // of a lane

struct RopeShape {
  uint heads;
  uint kv_heads;
  uint width;
  uint rotary;
  uint max_positions;
  uint stride;
  float eps;
};

[[kernel, max_total_threads_per_threadgroup(32)]] void rope_cache(device const float* projected [[buffer(0)]],
    device const float* q_norm [[buffer(1)]], device const float* k_norm [[buffer(2)]],
    device const float* frequencies [[buffer(3)]], device const int* position [[buffer(4)]],
    device float* q [[buffer(5)]], device float* keys [[buffer(6)]], device float* values [[buffer(7)]],
    constant RopeShape& shape [[buffer(8)]], uint3 group [[threadgroup_position_in_grid]],
    uint lane [[thread_index_in_simdgroup]]) {
  threadgroup float head[MAX_WIDTH];
  const uint heads = shape.heads, kv_heads = shape.kv_heads, width = shape.width, half_width = shape.rotary / 2;
  const uint at = uint(position[0]) + group.y;
  device const float* row = projected + ulong(group.y) * shape.stride;
  if (group.x >= heads + kv_heads) {  // a value
    const uint kv = group.x - heads - kv_heads;
    device const float* value = row + (2 * heads + kv_heads + kv) * width;
    for (uint i = lane; i < width; i += 32) values[(ulong(kv) * shape.max_positions + at) * width + i] = value[i];
    return;
  }
  const bool is_key = group.x >= heads;
  const uint kv = group.x - heads;
  device const float* source = is_key ? row + (2 * heads + kv) * width : row + 2 * group.x * width;
  device const float* weight = is_key ? k_norm : q_norm;
  float own[MAX_WIDTH / 32];
  float gains[MAX_WIDTH / 32];
  for (uint j = 0; j < MAX_WIDTH / 32; j++) {
    const bool is_inside = lane + 32 * j < width;
    own[j] = is_inside ? source[lane + 32 * j] : 0.0f;
    gains[j] = is_inside ? weight[lane + 32 * j] : 0.0f;
  }
  float sines[PAIRS];
  float cosines[PAIRS];
  for (uint j = 0; j < PAIRS; j++) {
    if (32 * j < half_width) {  // alike in all lanes
      const float angle = float(at) * frequencies[min(lane + 32 * j, half_width - 1)];
      sines[j] = precise::sin(angle);
      cosines[j] = precise::cos(angle);
    }
  }
  float squares = 0.0f;
  for (uint j = 0; j < MAX_WIDTH / 32; j++) squares = fma(own[j], own[j], squares);
  const float factor = rsqrt(simd_sum(squares) / float(width) + shape.eps);
  device float* target =
      is_key ? keys + (ulong(kv) * shape.max_positions + at) * width : q + (ulong(group.y) * heads + group.x) * width;
  for (uint j = 0; j < MAX_WIDTH / 32; j++) {
    const uint i = lane + 32 * j;
    const float normed = own[j] * factor * (1.0f + gains[j]);
    if (i < shape.rotary) head[i] = normed;
    if (i >= shape.rotary && i < width) target[i] = normed;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint j = 0; j < PAIRS; j++) {
    const uint i = lane + 32 * j;
    if (i < half_width) {
      const float x = head[i], y = head[i + half_width];
      target[i] = x * cosines[j] - y * sines[j];
      target[i + half_width] = y * cosines[j] + x * sines[j];
    }
  }
}
