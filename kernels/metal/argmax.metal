#include <metal_stdlib>
using namespace metal;

// The likeliest token of each row of logits, so that a greedy choice needs no logits on the host.
//
//   ids[r] = the lowest i with logits[r, i] = largest[r],  largest[r] = max over i;  NaN if any logit is
//
// logits   float [R, V];   ids   int [R];   largest   float [R]
//
// Threads: grid (R), 32 simdgroups. Bound by the bytes of the logits, which one threadgroup reads: 1 MB of them take
// less than two dispatches. Reference: torch.argmax. Test: test_metal_token.py.

struct ArgmaxShape {
  uint width;
};

// Whether a logit beats the best so far; NaN beats all, and nothing beats NaN.
inline bool is_above(float value, float best) { return best == best && !(value <= best); }

[[kernel, max_total_threads_per_threadgroup(1024)]] void argmax(device const float* logits [[buffer(0)]],
    device int* ids [[buffer(1)]], device float* largest [[buffer(2)]], constant ArgmaxShape& shape [[buffer(3)]],
    uint3 group [[threadgroup_position_in_grid]], uint index [[thread_index_in_threadgroup]],
    uint simdgroups [[simdgroups_per_threadgroup]]) {
  threadgroup float values[1024];
  threadgroup uint places[1024];
  device const float* row = logits + ulong(group.x) * shape.width;
  float best = row[min(index, shape.width - 1)];
  uint place = min(index, shape.width - 1);
  for (uint i = index + simdgroups * 32; i < shape.width; i += simdgroups * 32) {
    if (is_above(row[i], best)) {
      best = row[i];
      place = i;
    }
  }
  values[index] = best;
  places[index] = place;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint half_count = simdgroups * 16; half_count > 0; half_count /= 2) {
    if (index < half_count) {
      const float other = values[index + half_count];
      const bool is_equal = other == values[index] && places[index + half_count] < places[index];
      if (is_above(other, values[index]) || is_equal) {
        values[index] = other;
        places[index] = places[index + half_count];
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  if (index == 0) {
    ids[group.x] = int(places[0]);
    largest[group.x] = values[0];
  }
}
