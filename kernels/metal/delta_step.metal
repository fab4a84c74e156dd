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
// Threads: grid (H). A thread owns one column of the state for ROWS_EACH consecutive rows, in registers: it is read and
// written once. Columns are padded to whole simdgroups; Dk / ROWS_EACH threads share one and meet in threadgroup
// memory. Bound by the bytes of the state. Reference: decay_and_strength, gated_delta, gated_rms_norm. Test:
// test_metal_token.py.

constant constexpr uint ROWS_EACH = 32;
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

// l2-normed and scaled, into threadgroup memory: by one simdgroup.
inline void load_normed(device const float* x, uint width, float scale, threadgroup float* out, uint lane) {
  float squares = 0.0f;
  for (uint i = lane; i < width; i += 32) squares = fma(x[i], x[i], squares);
  const float factor = rsqrt(simd_sum(squares) + 1e-6f) * scale;
  for (uint i = lane; i < width; i += 32) out[i] = x[i] * factor;
}

// The sum of the parts of a column.
inline float column_sum(threadgroup const float* parts, uint column, uint columns, uint count) {
  float sum = 0.0f;
  for (uint p = 0; p < count; p++) sum += parts[p * columns + column];
  return sum;
}

[[kernel, max_total_threads_per_threadgroup(1024)]] void delta_step(device const float* mixed [[buffer(0)]],
    device const float* projected [[buffer(1)]], device const float* a_log [[buffer(2)]],
    device const float* dt_bias [[buffer(3)]], device const float* norm [[buffer(4)]],
    device float* state [[buffer(5)]], device float* out [[buffer(6)]], constant DeltaShape& shape [[buffer(7)]],
    uint3 group [[threadgroup_position_in_grid]], uint index [[thread_index_in_threadgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]], uint simdgroups [[simdgroups_per_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  threadgroup float q[MAX_WIDTH];
  threadgroup float k[MAX_WIDTH];
  threadgroup float recalled[1024];  // of each part, then the same for what is read
  threadgroup float read[1024];
  threadgroup float partial[32];
  const uint h = group.x, key_head = h / (shape.value_heads / shape.key_heads);
  const uint keys = shape.key_width, values = shape.value_width;
  device const float* query = mixed + key_head * keys;
  if (simdgroup == 0) load_normed(query, keys, rsqrt(float(keys)), q, lane);
  if (simdgroup == simdgroups - 1) load_normed(query + shape.key_heads * keys, keys, 1.0f, k, lane);
  threadgroup_barrier(mem_flags::mem_threadgroup);

  const float decay = exp(-exp(a_log[h]) * softplus(projected[shape.a_offset + h] + dt_bias[h]));
  const float beta = sigmoid(projected[shape.b_offset + h]);
  const uint columns = (values + 31) / 32 * 32, parts = simdgroups * 32 / columns;
  const uint column = index % columns, part = index / columns, first = part * ROWS_EACH;
  const bool is_column = column < values;
  const uint rows = is_column && first < keys ? min(ROWS_EACH, keys - first) : 0u;
  device float* memory = state + (ulong(h) * keys + first) * values + column;
  float s[ROWS_EACH];
  float sum = 0.0f;
  for (uint i = 0; i < ROWS_EACH; i++) {
    s[i] = i < rows ? memory[i * values] * decay : 0.0f;
    if (i < rows) sum = fma(s[i], k[first + i], sum);
  }
  recalled[index] = sum;
  threadgroup_barrier(mem_flags::mem_threadgroup);

  const float v = is_column ? mixed[2 * shape.key_heads * keys + h * values + column] : 0.0f;
  const float change = beta * (v - column_sum(recalled, column, columns, parts));
  sum = 0.0f;
  for (uint i = 0; i < ROWS_EACH; i++) {
    if (i < rows) {
      s[i] = fma(k[first + i], change, s[i]);
      memory[i * values] = s[i];
      sum = fma(s[i], q[first + i], sum);
    }
  }
  read[index] = sum;
  threadgroup_barrier(mem_flags::mem_threadgroup);

  const bool is_output = is_column && part == 0;
  const float o = is_output ? column_sum(read, column, columns, parts) : 0.0f;
  const float squares = threadgroup_sum(o * o, partial, simdgroup, simdgroups, lane);
  if (is_output) {
    const float z = projected[shape.z_offset + h * values + column];
    out[h * values + column] = o * rsqrt(squares / float(values) + shape.eps) * norm[column] * silu(z);
  }
}
