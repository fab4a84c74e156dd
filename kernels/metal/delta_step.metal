#include <metal_stdlib>
using namespace metal;
#include "sums.h"

// One token of the gated delta rule with everything around it, all heads: gates, l2 norms, recurrence, gated norm.
//
//   decay = -exp(a_log) softplus(a + dt_bias)      beta = sigmoid(b)
//   q, k = l2norm(q) / sqrt(Dk), l2norm(k)         value head h reads key head h / (H / Hk)
//   S = exp(decay) S;   S = S + k (beta (v - S^T k))^T;   o = S^T q
//   out = o / rms(o) * norm * silu(z)
//
// mixed      float [C], q then k then v, after the convolution
// projected  float [R], where z [H, Dv], a [H] and b [H] start at their offsets
// a_log, dt_bias   float [H];   norm   float [Dv]
// state      float [H, Dk, Dv], replaced
// out        float [H, Dv]
//
// Threads: grid (H). A simdgroup owns ROWS rows of 128 columns of the state, a lane four columns of each, in registers:
// the state is read and written once, and all of it is on its way before anything else is done. Simdgroups that share
// columns meet in threadgroup memory. Bound by the bytes of the state. Reference: decay_and_strength, gated_delta,
// gated_rms_norm. Test: test_metal_token.py.

constant constexpr uint ROWS = 16;
constant constexpr uint SIMDGROUPS = 16;  // at most
constant constexpr uint MAX_WIDTH = 256;

struct DeltaShape {
  uint key_heads;
  uint value_heads;
  uint key_width;
  uint value_width;
  uint z_offset;
  uint a_offset;
  uint b_offset;
  float eps;
};

// l2-normed and scaled, into threadgroup memory, zero from the width on: by one simdgroup.
inline void load_normed(device const float* x, uint width, float scale, threadgroup float* out, uint lane) {
  float own[MAX_WIDTH / 32];
  float squares = 0.0f;
  for (uint j = 0; j < MAX_WIDTH / 32; j++) {
    own[j] = lane + 32 * j < width ? x[lane + 32 * j] : 0.0f;
    squares = fma(own[j], own[j], squares);
  }
  const float factor = rsqrt(simd_sum(squares) + 1e-6f) * scale;
  for (uint j = 0; j < MAX_WIDTH / 32; j++) out[lane + 32 * j] = own[j] * factor;
}

inline float4 four(float x, float y, float z, float w) {
  float4 result;
  result.x = x;
  result.y = y;
  result.z = z;
  result.w = w;
  return result;
}

// Four columns of a row, of which `count` exist: all or none where rows start on 16 bytes.
template <bool ALIGNED>
inline float4 load_four(device const float* from, uint count) {
  if (ALIGNED) return count ? *(device const float4*)from : float4(0.0f);
  return four(count > 0 ? from[0] : 0.0f, count > 1 ? from[1] : 0.0f, count > 2 ? from[2] : 0.0f,
      count > 3 ? from[3] : 0.0f);
}

template <bool ALIGNED>
inline void store_four(device float* to, float4 value, uint count) {
  if (ALIGNED) {
    if (count) *(device float4*)to = value;
  } else {
    if (count > 0) to[0] = value.x;
    if (count > 1) to[1] = value.y;
    if (count > 2) to[2] = value.z;
    if (count > 3) to[3] = value.w;
  }
}

inline float4 fma_four(float a, float4 b, float4 c) {
  return four(fma(a, b.x, c.x), fma(a, b.y, c.y), fma(a, b.z, c.z), fma(a, b.w, c.w));
}

// The sum of all parts of a lane's four columns: of the simdgroups of `strip`, each `strips` further on.
inline float4 sum_of_parts(threadgroup const float* parts, uint strip, uint strips, uint simdgroups, uint lane) {
  float4 sum = float4(0.0f);
  for (uint i = strip; i < simdgroups; i += strips) {
    threadgroup const float* part = parts + i * 128 + lane;
    sum = four(sum.x + part[0], sum.y + part[32], sum.z + part[64], sum.w + part[96]);
  }
  return sum;
}

inline void store_part(threadgroup float* parts, float4 sum, uint simdgroup, uint lane) {
  threadgroup float* part = parts + simdgroup * 128 + lane;
  part[0] = sum.x;
  part[32] = sum.y;
  part[64] = sum.z;
  part[96] = sum.w;
}

[[kernel, max_total_threads_per_threadgroup(512)]] void delta_step(device const float* mixed [[buffer(0)]],
    device const float* projected [[buffer(1)]], device const float* a_log [[buffer(2)]],
    device const float* dt_bias [[buffer(3)]], device const float* norm [[buffer(4)]],
    device float* state [[buffer(5)]], device float* out [[buffer(6)]], constant DeltaShape& shape [[buffer(7)]],
    uint3 group [[threadgroup_position_in_grid]], uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint simdgroups [[simdgroups_per_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  threadgroup float q[MAX_WIDTH];
  threadgroup float k[MAX_WIDTH];
  threadgroup float recalled[SIMDGROUPS * 128];  // of each part, then the same for what is read
  threadgroup float read[SIMDGROUPS * 128];
  threadgroup float partial[32];
  const uint h = group.x, key_head = h / (shape.value_heads / shape.key_heads);
  const uint key_width = shape.key_width, value_width = shape.value_width;
  const uint strips = (value_width + 127) / 128, strip = simdgroup % strips, first = simdgroup / strips * ROWS;
  const uint column = strip * 128 + 4 * lane, count = column < value_width ? min(4u, value_width - column) : 0u;
  const uint rows = min(ROWS, key_width - first);
  const bool is_aligned = value_width % 4 == 0;
  device float* memory = state + (ulong(h) * key_width + first) * value_width + column;
  float4 s[ROWS];
  if (is_aligned) {
    for (uint i = 0; i < ROWS; i++) s[i] = load_four<true>(memory + i * value_width, i < rows ? count : 0u);
  } else {
    for (uint i = 0; i < ROWS; i++) s[i] = load_four<false>(memory + i * value_width, i < rows ? count : 0u);
  }
  const float4 v = load_four<false>(mixed + 2 * shape.key_heads * key_width + h * value_width + column, count);
  const float decay = exp(-exp(a_log[h]) * softplus(projected[shape.a_offset + h] + dt_bias[h]));
  const float beta = sigmoid(projected[shape.b_offset + h]);
  device const float* query = mixed + key_head * key_width;
  if (simdgroup == 0) load_normed(query, key_width, rsqrt(float(key_width)), q, lane);
  if (simdgroup == simdgroups - 1) load_normed(query + shape.key_heads * key_width, key_width, 1.0f, k, lane);
  threadgroup_barrier(mem_flags::mem_threadgroup);

  float4 sum = float4(0.0f);
  for (uint i = 0; i < ROWS; i++) {
    s[i] = four(s[i].x * decay, s[i].y * decay, s[i].z * decay, s[i].w * decay);
    sum = fma_four(k[first + i], s[i], sum);
  }
  store_part(recalled, sum, simdgroup, lane);
  threadgroup_barrier(mem_flags::mem_threadgroup);

  sum = sum_of_parts(recalled, strip, strips, simdgroups, lane);
  const float4 change = four(beta * (v.x - sum.x), beta * (v.y - sum.y), beta * (v.z - sum.z), beta * (v.w - sum.w));
  sum = float4(0.0f);
  for (uint i = 0; i < ROWS; i++) {
    s[i] = fma_four(k[first + i], change, s[i]);
    sum = fma_four(q[first + i], s[i], sum);
  }
  if (is_aligned) {
    for (uint i = 0; i < ROWS; i++) store_four<true>(memory + i * value_width, s[i], i < rows ? count : 0u);
  } else {
    for (uint i = 0; i < ROWS; i++) store_four<false>(memory + i * value_width, s[i], i < rows ? count : 0u);
  }
  store_part(read, sum, simdgroup, lane);
  const bool is_output = simdgroup < strips;
  const float4 z = load_four<false>(projected + shape.z_offset + h * value_width + column, is_output ? count : 0u);
  const float4 gain = load_four<false>(norm + column, is_output ? count : 0u);
  threadgroup_barrier(mem_flags::mem_threadgroup);

  sum = sum_of_parts(read, strip, strips, simdgroups, lane);
  const float own = fma(sum.x, sum.x, fma(sum.y, sum.y, fma(sum.z, sum.z, sum.w * sum.w)));
  const float squares = threadgroup_sum(is_output ? own : 0.0f, partial, simdgroup, simdgroups, lane);
  const float factor = rsqrt(squares / float(value_width) + shape.eps);
  const float4 result = four(sum.x * factor * gain.x * silu(z.x), sum.y * factor * gain.y * silu(z.y),
      sum.z * factor * gain.z * silu(z.z), sum.w * factor * gain.w * silu(z.w));
  store_four<false>(out + h * value_width + column, result, is_output ? count : 0u);
}
