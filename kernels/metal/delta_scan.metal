#include <metal_stdlib>
using namespace metal;

// The gated delta rule along the tokens of a prompt: the recurrence of delta_step.metal with its state in registers.
//
//   S = exp(decay) S;   S = S + k (beta (v - S^T k))^T;   o = S^T q          q, k l2-normed, q scaled by 1 / sqrt(Dk)
//
// q, k    float, token t's [Hk, Dk] at t * qk_stride; value head h reads key head h / (H / Hk)
// v       float, token t's [H, Dv] at t * v_stride
// decay   float [T, H], <= 0;   beta   float [T, H]
// state   float [H, Dk, Dv], replaced
// out     float [T, H, Dv]
//
// Columns of a state do not meet, so each simdgroup takes COLUMNS of them through all tokens by itself: a lane holds
// every 32nd row. The chunked form (reference.gated_delta_chunk) has more arithmetic, and pays where there are matrix
// units.
//
// Threads: grid (Dv / (COLUMNS * SIMDGROUPS), H). Bound by the latency of a token.
// Reference: gated_delta. Test: test_metal_prefill.py.

constant constexpr uint COLUMNS = 4;
constant constexpr uint SIMDGROUPS = 4;
constant constexpr uint EACH = 8;  // rows of a lane: Dk <= 256

struct ScanShape {
  uint key_heads;
  uint value_heads;
  uint key_width;
  uint value_width;
  uint tokens;
  uint q_stride;
  uint k_stride;
  uint v_stride;
};

// A head's row, l2-normed and scaled: every 32nd number.
inline void load_normed(device const float* x, uint width, float scale, uint lane, thread float* out) {
  float squares = 0.0f;
  for (uint j = 0; j < EACH; j++) {
    out[j] = lane + 32 * j < width ? x[lane + 32 * j] : 0.0f;
    squares = fma(out[j], out[j], squares);
  }
  const float factor = rsqrt(simd_sum(squares) + 1e-6f) * scale;
  for (uint j = 0; j < EACH; j++) out[j] *= factor;
}

[[kernel, max_total_threads_per_threadgroup(128)]] void delta_scan(device const float* q [[buffer(0)]],
    device const float* k [[buffer(1)]], device const float* v [[buffer(2)]], device const float* decay [[buffer(3)]],
    device const float* beta [[buffer(4)]], device float* state [[buffer(5)]], device float* out [[buffer(6)]],
    constant ScanShape& shape [[buffer(7)]], uint3 group [[threadgroup_position_in_grid]],
    uint simdgroup [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  const uint h = group.y, heads = shape.value_heads, keys = shape.key_width, values = shape.value_width;
  const uint key_head = h / (heads / shape.key_heads);
  const uint first = (group.x * SIMDGROUPS + simdgroup) * COLUMNS;
  device float* memory = state + ulong(h) * keys * values;
  float s[EACH][COLUMNS];
  for (uint j = 0; j < EACH; j++) {
    const uint row = lane + 32 * j;
    for (uint c = 0; c < COLUMNS; c++) {
      s[j][c] = row < keys && first + c < values ? memory[row * values + first + c] : 0.0f;
    }
  }
  const float scale = rsqrt(float(keys));
  for (uint t = 0; t < shape.tokens; t++) {
    float query[EACH];
    float key[EACH];
    load_normed(q + ulong(t) * shape.q_stride + key_head * keys, keys, scale, lane, query);
    load_normed(k + ulong(t) * shape.k_stride + key_head * keys, keys, 1.0f, lane, key);
    const float kept = exp(decay[t * heads + h]);
    for (uint c = 0; c < COLUMNS; c++) {
      float recalled = 0.0f;
      for (uint j = 0; j < EACH; j++) {
        s[j][c] *= kept;
        recalled = fma(s[j][c], key[j], recalled);
      }
      const uint column = min(first + c, values - 1);
      const float wanted = v[ulong(t) * shape.v_stride + h * values + column];
      const float change = beta[t * heads + h] * (wanted - simd_sum(recalled));
      float read = 0.0f;
      for (uint j = 0; j < EACH; j++) {
        s[j][c] = fma(key[j], change, s[j][c]);
        read = fma(s[j][c], query[j], read);
      }
      read = simd_sum(read);
      if (lane == 0 && first + c < values) out[(ulong(t) * heads + h) * values + column] = read;
    }
  }
  for (uint j = 0; j < EACH; j++) {
    const uint row = lane + 32 * j;
    for (uint c = 0; c < COLUMNS; c++) {
      if (row < keys && first + c < values) memory[row * values + first + c] = s[j][c];
    }
  }
}
