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
// Columns of a state do not meet, so a threadgroup takes COLUMNS * SIMDGROUPS of them through all tokens by itself.
// What a few tokens need is loaded while those before are computed, normed once, and put into threadgroup memory; then
// a token waits for three shuffles and a row of multiplications. The chunked form (reference.gated_delta_chunk) has
// more arithmetic, and pays where there are matrix units.
//
// Threads: grid (Dv / (COLUMNS * SIMDGROUPS), H). Eight lanes share a column, each has four of every 32 rows. Bound by
// the latency of a token. Reference: gated_delta. Test: test_metal_prefill.py.

constant constexpr uint COLUMNS = 4;  // of a simdgroup
constant constexpr uint SIMDGROUPS = 8;
constant constexpr uint STAGED_QUADS = 1024;  // q and k of as many tokens as this holds: 16, or 8 where Dk > 128
constant constexpr uint STAGED_TOKENS = 16;   // at most
constant constexpr uint STAGED_VALUES = 512;  // v of the threadgroup's columns
constant constexpr uint FETCHED = 16;         // numbers of q and k that a thread brings
constant constexpr uint FEW_ROWS = 16;        // of a lane: Dk <= 128
constant constexpr uint MAX_ROWS = 32;        // Dk <= 256

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

// What a thread has on its way for the tokens that are staged next: `block` of them, as many as STAGED_QUADS hold.
struct Fetched {
  float rows[FETCHED];
  float values[2];
  float decay;
  float beta;
};

// A simdgroup brings every SIMDGROUPS-th row: q of a token, then its k.
template <uint ROWS>
inline void fetch(device const float* q, device const float* k, device const float* v, device const float* decay,
    device const float* beta, constant ScanShape& shape, uint first_token, uint3 group, uint simdgroup, uint lane,
    thread Fetched* to) {
  const uint tokens = shape.tokens, heads = shape.value_heads, key_width = shape.key_width, h = group.y;
  const uint start = h / (heads / shape.key_heads) * key_width, block = 256 / ROWS;
  for (uint i = 0; i < block / 4; i++) {
    const uint row = simdgroup + SIMDGROUPS * i, token = first_token + row / 2;
    device const float* source = row % 2 ? k + ulong(token) * shape.k_stride : q + ulong(token) * shape.q_stride;
    for (uint j = 0; j < ROWS / 4; j++) {
      const uint d = lane + 32 * j;
      to->rows[i * (ROWS / 4) + j] = token < tokens && d < key_width ? source[start + d] : 0.0f;
    }
  }
  const uint column = group.x * COLUMNS * SIMDGROUPS + lane;
  for (uint i = 0; i < block / 8; i++) {
    const uint token = first_token + simdgroup + SIMDGROUPS * i;
    const bool is_inside = token < tokens && column < shape.value_width;
    to->values[i] = is_inside ? v[ulong(token) * shape.v_stride + h * shape.value_width + column] : 0.0f;
  }
  const bool is_token = first_token + lane < tokens && lane < block;
  to->decay = is_token ? decay[(first_token + lane) * heads + h] : 0.0f;
  to->beta = is_token ? beta[(first_token + lane) * heads + h] : 0.0f;
}

// Put it where all simdgroups see it: q and k normed, decays as factors exp(decay).
template <uint ROWS>
inline void stage(thread const Fetched* from, float scale, uint simdgroup, uint lane, threadgroup float* rows,
    threadgroup float* values, threadgroup float* factors, threadgroup float* betas) {
  const uint block = 256 / ROWS;
  float squares[256 / ROWS / 4];
  for (uint i = 0; i < block / 4; i++) {
    squares[i] = 0.0f;
    for (uint j = 0; j < ROWS / 4; j++) {
      const float x = from->rows[i * (ROWS / 4) + j];
      squares[i] = fma(x, x, squares[i]);
    }
  }
  for (uint mask = 16; mask > 0; mask /= 2) {  // side by side
    for (uint i = 0; i < block / 4; i++) squares[i] += simd_shuffle_xor(squares[i], mask);
  }
  for (uint i = 0; i < block / 4; i++) {
    const uint row = simdgroup + SIMDGROUPS * i;
    const float factor = rsqrt(squares[i] + 1e-6f) * (row % 2 ? 1.0f : scale);
    for (uint j = 0; j < ROWS / 4; j++) {
      rows[row * ROWS * 8 + lane + 32 * j] = from->rows[i * (ROWS / 4) + j] * factor;
    }
  }
  for (uint i = 0; i < block / 8; i++) values[(simdgroup + SIMDGROUPS * i) * 32 + lane] = from->values[i];
  if (simdgroup == 0 && lane < block) {
    factors[lane] = exp(from->decay);
    betas[lane] = from->beta;
  }
}

inline float sum_four(float4 parts) { return (parts.x + parts.y) + (parts.z + parts.w); }

template <uint ROWS>
inline void load_key(threadgroup const float4* from, thread float4* key) {
  for (uint j = 0; j < ROWS / 4; j++) key[j] = from[8 * j];
}

// This lane's part of what a key recalls, or a query reads.
template <uint ROWS>
inline float multiply(thread const float* s, thread const float4* row) {
  float4 part = float4(0.0f);
  for (uint j = 0; j < ROWS / 4; j++) {
    part.x = fma(s[4 * j], row[j].x, part.x);
    part.y = fma(s[4 * j + 1], row[j].y, part.y);
    part.z = fma(s[4 * j + 2], row[j].z, part.z);
    part.w = fma(s[4 * j + 3], row[j].w, part.w);
  }
  return sum_four(part);
}

// s = factor s + key change
template <uint ROWS>
inline void update(thread float* s, thread const float4* key, float factor, float change) {
  for (uint j = 0; j < ROWS / 4; j++) {
    s[4 * j] = fma(key[j].x, change, s[4 * j] * factor);
    s[4 * j + 1] = fma(key[j].y, change, s[4 * j + 1] * factor);
    s[4 * j + 2] = fma(key[j].z, change, s[4 * j + 2] * factor);
    s[4 * j + 3] = fma(key[j].w, change, s[4 * j + 3] * factor);
  }
}

template <uint ROWS>
inline void scan(device const float* q, device const float* k, device const float* v, device const float* decay,
    device const float* beta, device float* state, device float* out, constant ScanShape& shape, uint3 group,
    uint simdgroup, uint lane, threadgroup float4* rows, threadgroup float* values, threadgroup float* factors,
    threadgroup float* betas) {
  const uint h = group.y, key_width = shape.key_width, value_width = shape.value_width;
  const uint block = 256 / ROWS, share = lane % 8;
  const uint own = simdgroup * COLUMNS + lane / 8, column = group.x * COLUMNS * SIMDGROUPS + own;
  device float* memory = state + ulong(h) * key_width * value_width + column;
  float s[ROWS];
  for (uint i = 0; i < ROWS; i++) {
    const uint row = i / 4 * 32 + share * 4 + i % 4;
    s[i] = row < key_width && column < value_width ? memory[row * value_width] : 0.0f;
  }
  const float scale = rsqrt(float(key_width));
  device float* read = out + h * value_width + column;
  const bool is_writer = share == 0 && column < value_width;
  float4 key[ROWS / 4];
  float4 query[ROWS / 4];
  float pending = 0.0f;  // this lane's part of what the last token reads, summed along with what the next recalls
  Fetched next;
  fetch<ROWS>(q, k, v, decay, beta, shape, 0, group, simdgroup, lane, &next);
  for (uint first = 0; first < shape.tokens; first += block) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    stage<ROWS>(&next, scale, simdgroup, lane, (threadgroup float*)rows, values, factors, betas);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    fetch<ROWS>(q, k, v, decay, beta, shape, first + block, group, simdgroup, lane, &next);
    threadgroup const float4* row = rows + share;
    load_key<ROWS>(row + ROWS * 2, key);
    const uint count = min(block, shape.tokens - first);
    for (uint t = 0; t < count; t++) {
      load_key<ROWS>(row + t * ROWS * 4, query);
      float recalled = multiply<ROWS>(s, key);
      for (uint mask = 1; mask < 8; mask *= 2) {
        recalled += simd_shuffle_xor(recalled, mask);
        pending += simd_shuffle_xor(pending, mask);
      }
      if (is_writer && first + t > 0) read[ulong(first + t - 1) * shape.value_heads * value_width] = pending;
      update<ROWS>(s, key, factors[t], betas[t] * (values[t * 32 + own] - factors[t] * recalled));
      load_key<ROWS>(row + min(t + 1, block - 1) * ROWS * 4 + ROWS * 2, key);
      pending = multiply<ROWS>(s, query);
    }
  }
  for (uint mask = 1; mask < 8; mask *= 2) pending += simd_shuffle_xor(pending, mask);
  if (is_writer) read[ulong(shape.tokens - 1) * shape.value_heads * value_width] = pending;
  for (uint i = 0; i < ROWS; i++) {
    const uint row = i / 4 * 32 + share * 4 + i % 4;
    if (row < key_width && column < value_width) memory[row * value_width] = s[i];
  }
}

[[kernel, max_total_threads_per_threadgroup(256)]] void delta_scan(device const float* q [[buffer(0)]],
    device const float* k [[buffer(1)]], device const float* v [[buffer(2)]], device const float* decay [[buffer(3)]],
    device const float* beta [[buffer(4)]], device float* state [[buffer(5)]], device float* out [[buffer(6)]],
    constant ScanShape& shape [[buffer(7)]], uint3 group [[threadgroup_position_in_grid]],
    uint simdgroup [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  threadgroup float4 rows[STAGED_QUADS];
  threadgroup float values[STAGED_VALUES];
  threadgroup float factors[STAGED_TOKENS];
  threadgroup float betas[STAGED_TOKENS];
  if (shape.key_width <= 128) {
    scan<FEW_ROWS>(
        q, k, v, decay, beta, state, out, shape, group, simdgroup, lane, rows, values, factors, betas);
  } else {
    scan<MAX_ROWS>(
        q, k, v, decay, beta, state, out, shape, group, simdgroup, lane, rows, values, factors, betas);
  }
}
