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
// Threads: grid (C / 256, T / TOKENS), one thread for each channel and TOKENS tokens; only the threads of the first
// tokens read the state, and they write it. Bound by the bytes of x. Reference: causal_conv. Test: test_metal_token.py.

constant constexpr uint MAX_TAPS = 8;
constant constexpr uint TOKENS = 16;

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
  const uint c = group.x * 256 + index, first = group.y * TOKENS;
  const uint channels = shape.channels, taps = shape.taps, kept = taps - 1;
  if (c >= channels) return;
  const uint unused = MAX_TAPS - taps;  // taps at the front
  float weights[MAX_TAPS];
  float inputs[MAX_TAPS - 1 + TOKENS];  // those before the first token at the front
  for (uint j = 0; j < MAX_TAPS; j++) weights[j] = j >= unused ? weight[c * taps + j - unused] : 0.0f;
  for (uint i = 0; i < MAX_TAPS - 1 + TOKENS; i++) {
    const uint t = first + i;  // of u, counted from MAX_TAPS - 1 tokens before x
    if (t >= shape.tokens + MAX_TAPS - 1) break;
    inputs[i] = 0.0f;
    if (t >= MAX_TAPS - 1) {
      inputs[i] = x[ulong(t - (MAX_TAPS - 1)) * shape.x_stride + c];
    } else if (t >= unused) {
      inputs[i] = state[(t - unused) * channels + c];
    }
  }
  for (uint i = 0; i < TOKENS; i++) {
    if (first + i >= shape.tokens) break;  // a single token is done here
    float sum = 0.0f;
    for (uint j = 0; j < MAX_TAPS; j++) {
      if (j >= unused) sum = fma(weights[j], inputs[i + j], sum);  // what is not multiplied may be infinite
    }
    out[ulong(first + i) * channels + c] = silu(sum);
  }
  if (first > 0) return;
  if (shape.tokens == 1) {  // all of them are here
    for (uint i = 1; i < MAX_TAPS; i++) {
      if (i > unused) state[(i - 1 - unused) * channels + c] = inputs[i];
    }
    return;
  }
  for (uint j = 0; j < kept; j++) {  // a place is read before it is written: those read are further on
    const uint t = shape.tokens + j;
    state[j * channels + c] = t < kept ? state[t * channels + c] : x[ulong(t - kept) * shape.x_stride + c];
  }
}
