// Sums over a threadgroup, and the few functions that are in the model's formulas. Put into kernel files by text, by
// msl.py.

inline float sigmoid(float x) { return 1.0f / (1.0f + exp(-x)); }
inline float silu(float x) { return x / (1.0f + exp(-x)); }
inline float softplus(float x) { return x > 20.0f ? x : log(1.0f + exp(x)); }  // as torch has it

// The sum over all threads, in each of them. `partial` holds one float for each simdgroup, up to 32.
inline float threadgroup_sum(float value, threadgroup float* partial, uint simdgroup, uint simdgroups, uint lane) {
  const float sum = simd_sum(value);
  if (lane == 0) partial[simdgroup] = sum;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  return simd_sum(lane < simdgroups ? partial[lane] : 0.0f);
}
