#include <metal_stdlib>
using namespace metal;
#include "matrix.h"

// Rows of the embedding for token ids: out[t, k] = matrix[token_ids[t], k], in float32 to the last bit.
//
// weights    the memory that holds the matrix
// token_ids  int [T]
// out        float [T, K]
//
// Threads: grid (K / 256, T), one thread for each column. Bound by the dispatch. Reference: embed. Test:
// test_metal_matrices.py.

inline float weight_at(thread const Weights& w, ulong row, uint column) {
  if (w.storage >= BF16) return load_plain(w, row * w.columns + column);
  const uint bits = w.storage, low = column * bits;
  device const uchar* bytes = w.data + row * (w.columns / 8 * bits) + low / 8;
  // Three bits may reach into the next byte; a row ends with a whole byte, so where they do there is one.
  const uint next = low % 8 + bits > 8 ? bytes[1] : 0;
  const uint q = (bytes[0] | next << 8) >> (low % 8) & ((1u << bits) - 1u);
  const ulong group = row * (w.columns >> w.shift) + (column >> w.shift);
  return fma(float(q), widen_bf16(w.scales[group]), widen_bf16(w.biases[group]));  // q * scale is exact
}

[[kernel, max_total_threads_per_threadgroup(256)]] void embed(device const uchar* weights [[buffer(0)]],
    constant MatrixForm& matrix [[buffer(1)]], device const int* token_ids [[buffer(2)]],
    device float* out [[buffer(3)]], uint3 group [[threadgroup_position_in_grid]],
    uint index [[thread_index_in_threadgroup]]) {
  const uint column = group.x * 256 + index;
  const Weights w = weights_at(weights, matrix);
  if (column < w.columns) out[ulong(group.y) * w.columns + column] = weight_at(w, token_ids[group.y], column);
}
