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

// One step of deal_sums: values i and i + HALF of both halves of the lanes become value i of one.
template <uint HALF>
inline void fold_lanes(thread float* values, uint lane) {
  const bool is_upper = (lane & HALF) != 0;
  for (uint i = 0; i < HALF; i++) {
    const float kept = is_upper ? values[i + HALF] : values[i], given = is_upper ? values[i] : values[i + HALF];
    values[i] = kept + simd_shuffle_xor(given, HALF);
  }
}

// In lane i the sum of values[i] over all lanes: 31 shuffles for 32 sums, where each by itself takes five.
inline float deal_sums(thread float* values, uint lane) {
  fold_lanes<16>(values, lane);
  fold_lanes<8>(values, lane);
  fold_lanes<4>(values, lane);
  fold_lanes<2>(values, lane);
  fold_lanes<1>(values, lane);
  return values[0];
}
