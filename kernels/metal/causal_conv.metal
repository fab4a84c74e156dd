#include <metal_stdlib>
using namespace metal;
#include "sums.h"

// Depthwise causal convolution and SiLU along the tokens, whose last inputs the state keeps.
//
//   out[t, c] = silu(sum over j of weight[c, j] * u[t + j, c])      u = state, then x
//
// x        float [T, x_stride], of which the first C columns are read
// weight   float [C, W]; the last tap multiplies the current token
// state    float [W - 1, C], the inputs before x; replaced by the last W - 1 inputs
// out      float [T, C]
//
// Threads: one for each channel, which walks along the tokens; grid (C / 256). Bound by the bytes of x.
// Reference: causal_conv. Test: test_metal_token.py.

constant constexpr uint MAX_TAPS = 8;

struct ConvShape {
  uint channels;
  uint taps;
  uint tokens;
  uint x_stride;
};

[[kernel, max_total_threads_per_threadgroup(256)]] void causal_conv(device const float* x [[buffer(0)]],
    device const float* weight [[buffer(1)]], device float* state [[buffer(2)]], device float* out [[buffer(3)]],
    constant ConvShape& shape [[buffer(4)]], uint3 group [[threadgroup_position_in_grid]],
    uint index [[thread_index_in_threadgroup]]) {
  const uint c = group.x * 256 + index;
  if (c >= shape.channels) return;
  float taps[MAX_TAPS];
  float past[MAX_TAPS];  // the last W inputs, the current one at the end
  for (uint j = 0; j < MAX_TAPS; j++) {
    const bool is_used = j < shape.taps;
    taps[j] = is_used ? weight[c * shape.taps + j] : 0.0f;
    past[j] = is_used && j + 1 < shape.taps ? state[j * shape.channels + c] : 0.0f;
  }
  for (uint t = 0; t < shape.tokens; t++) {
    const float now = x[ulong(t) * shape.x_stride + c];
    float sum = 0.0f;
    for (uint j = 0; j < MAX_TAPS; j++) {
      if (j + 1 == shape.taps) past[j] = now;
      sum = fma(taps[j], past[j], sum);
    }
    out[ulong(t) * shape.channels + c] = silu(sum);
    for (uint j = 0; j + 1 < MAX_TAPS; j++) past[j] = past[j + 1];
  }
  for (uint j = 0; j < MAX_TAPS; j++) {
    if (j + 1 < shape.taps) state[j * shape.channels + c] = past[j];
  }
}
