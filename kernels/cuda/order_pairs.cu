#include <metal_stdlib>
using namespace metal;
#include "matrix.h"

// A prompt's pairs of a token and an expert in the order of experts, for experts_halves.cu, without the processor.
//
//   counts[e] = how many tokens chose e                                                          count_choices
//   the shared expert's pairs come first, one for each token, then those of expert 0, 1, ..., each by token    order_pairs
//
// ids        int [T, K], of a token all different;   weights   float [T, K];   shared   float [T]: the shared expert's
// table      Place [E + 1]: where each expert lies, and the shared one
// tokens     int [pairs];   pair_weights   float [pairs];   pairs = T * (K + 1)
// order      int [T, K + 1]: which pairs a token has, ascending
// segments   Segment [parts, slots]: a part is `part` pairs, and the pairs of its segments count from its first one. What
//            an expert has in a part is cut in nearly equal pieces of at most TILE_TOKENS pairs. The slots between
//            those of two experts, and at the end, are empty: a slot is found without knowing how many come before it
//
// Threads: grid (E), and (E + 1) with the shared expert last. Bound by the cache: each reads all ids. Reference:
// cut_segments of prompt_launches.py, and numpy's argsort. Test: test_metal_prefill.py.

constant constexpr uint TILE_TOKENS = 64;  // as in halves.h
constant constexpr uint PAIR_SIMDGROUPS = 8;
constant constexpr uint PAIR_THREADS = 256;

struct PairShape {
  uint tokens;
  uint chosen;
  uint experts;
  uint parts;
  uint part;
  uint slots;
};

struct Choice {
  uint rank;  // of the expert among the token's, K if it is not chosen
  uint lower;  // experts of lower ids that are
};

inline Choice find_choice(device const int* ids, uint chosen, uint expert) {
  Choice found = {chosen, 0};
  for (uint k = 0; k < chosen; k++) {
    const uint id = uint(ids[k]);
    if (id == expert) found.rank = k;
    if (id < expert) found.lower++;
  }
  return found;
}

// The sum over all threads, in each of them.
inline uint sum_all(uint value, threadgroup uint* partial, uint simdgroup, uint lane) {
  const uint sum = simd_sum(value);
  if (lane == 0) partial[simdgroup] = sum;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  return simd_sum(lane < PAIR_SIMDGROUPS ? partial[lane] : 0u);
}

// The sum over the lanes before this one.
inline uint sum_before(uint value, uint lane) {
  uint sum = value;
#pragma unroll
  for (uint step = 1; step < 32; step *= 2) {
    const uint other = simd_shuffle(sum, ushort(lane - min(lane, step)));
    if (lane >= step) sum += other;
  }
  return sum - value;
}

[[kernel, max_total_threads_per_threadgroup(256)]] void count_choices(device const int* ids [[buffer(0)]],
    device int* counts [[buffer(1)]], constant PairShape& shape [[buffer(2)]],
    uint3 group [[threadgroup_position_in_grid]], uint index [[thread_index_in_threadgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  threadgroup uint partial[PAIR_SIMDGROUPS];
  uint count = 0;
  for (uint i = index; i < shape.tokens * shape.chosen; i += PAIR_THREADS) {
    if (uint(ids[i]) == group.x) count++;
  }
  count = sum_all(count, partial, simdgroup, lane);
  if (index == 0) counts[group.x] = int(count);
}

// The segments of an expert that has the pairs from `first` up to `end`, and the empty slots behind them. number: of the
// expert in the order of pairs, the shared one's is 0.
inline void put_segments(device const Place& place, uint first, uint end, uint number, constant PairShape& shape,
    device Segment* segments, uint index) {
  const bool is_last = number == shape.experts;
  for (uint n = 0; n < shape.parts; n++) {
    const uint start = n * shape.part;
    const uint from = min(max(first, start) - start, shape.part), to = min(max(end, start) - start, shape.part);
    const uint slot = from / TILE_TOKENS + number, next = is_last ? shape.slots : to / TILE_TOKENS + number + 1;
    const uint count = to - from, pieces = (count + TILE_TOKENS - 1) / TILE_TOKENS;
    for (uint i = index; i < next - slot; i += PAIR_THREADS) {
      device Segment& segment = segments[n * shape.slots + slot + i];
      const uint begin = i < pieces ? count * i / pieces : 0, stop = i < pieces ? count * (i + 1) / pieces : 0;
      segment.place.offset = place.offset;
      segment.place.form = place.form;
      segment.place.rank = 0;
      segment.first = from + begin;
      segment.count = stop - begin;
    }
  }
}

[[kernel, max_total_threads_per_threadgroup(256)]] void order_pairs(device const int* ids [[buffer(0)]],
    device const float* weights [[buffer(1)]], device const float* shared [[buffer(2)]],
    device const int* counts [[buffer(3)]], device const Place* table [[buffer(4)]], device int* tokens [[buffer(5)]],
    device float* pair_weights [[buffer(6)]], device int* order [[buffer(7)]], device Segment* segments [[buffer(8)]],
    constant PairShape& shape [[buffer(9)]], uint3 group [[threadgroup_position_in_grid]],
    uint index [[thread_index_in_threadgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  threadgroup uint partial[PAIR_SIMDGROUPS];
  threadgroup uint found[PAIR_SIMDGROUPS];
  const uint expert = group.x, chosen = shape.chosen, all = shape.tokens;
  if (expert == shape.experts) {  // the shared one
    for (uint t = index; t < all; t += PAIR_THREADS) {
      tokens[t] = int(t);
      pair_weights[t] = shared[t];
      order[t * (chosen + 1)] = int(t);
    }
    put_segments(table[expert], 0, all, 0, shape, segments, index);
    return;
  }
  uint earlier = 0;
  for (uint i = index; i < expert; i += PAIR_THREADS) earlier += uint(counts[i]);
  const uint first = all + sum_all(earlier, partial, simdgroup, lane);
  put_segments(table[expert], first, first + uint(counts[expert]), expert + 1, shape, segments, index);
  // A simdgroup has neighbouring tokens: it counts its own, and then knows where they go.
  const uint each = (all + PAIR_SIMDGROUPS - 1) / PAIR_SIMDGROUPS;
  const uint begin = min(simdgroup * each, all), end = min(begin + each, all);
  uint own = 0;
  for (uint t = begin + lane; t < end; t += 32) {
    if (find_choice(ids + t * chosen, chosen, expert).rank < chosen) own++;
  }
  own = simd_sum(own);
  if (lane == 0) found[simdgroup] = own;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  uint next = first + simd_sum(lane < simdgroup ? found[lane] : 0u);
  for (uint at = begin; at < end; at += 32) {
    const uint t = at + lane;
    Choice choice = {chosen, 0};
    if (t < end) choice = find_choice(ids + t * chosen, chosen, expert);
    const uint is_chosen = choice.rank < chosen ? 1 : 0, pair = next + sum_before(is_chosen, lane);
    if (is_chosen) {
      tokens[pair] = int(t);
      pair_weights[pair] = weights[t * chosen + choice.rank];
      order[t * (chosen + 1) + 1 + choice.lower] = int(pair);
    }
    next += simd_sum(is_chosen);
  }
}
